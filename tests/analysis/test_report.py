"""The report page: what it says of a run, and of stores that have little to say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from runs import write_run
from simulated import Run, recorded, simulate
from test_figures import assert_readable

from relexkit.analysis import style
from relexkit.analysis.claims import measure_claims
from relexkit.analysis.glossary import explained
from relexkit.analysis.page import Subject, build_page
from relexkit.analysis.report import write_report
from relexkit.analysis.sweep_figures import sweep_figure
from relexkit.assess.advice import advise
from relexkit.assess.backtest import CHEAP, backtest
from relexkit.assess.observed import Observed
from relexkit.cli import main
from relexkit.errors import RelexkitError
from relexkit.geometry.spectrum import spectrum
from relexkit.gram_matrix import Gram
from relexkit.ingest.importer import import_checkpoints


class Outline(HTMLParser):
    """Tags that are opened and closed in order, identifiers, images and links."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def gram() -> Gram:
    return recorded(simulate(Run(drift=0.3, beta=0.9), 20, 0), np.arange(1, 21))


@pytest.fixture(scope="module")
def page(gram: Gram) -> str:
    subject = Subject(
        "run <1>.zarr", "a/run <1>.zarr", "a model", "sorting", "2026-11-27", [("base", "a & b")]
    )
    metrics = {"reward": np.linspace(0, 1, 20), "kl": np.linspace(0, 0.1, 20)}
    return build_page(subject, Observed(gram, metrics))


def test_page_is_whole_and_needs_no_network(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    loaded = [s for s in outline.sources if not s.startswith(("#", "data:"))]
    assert loaded  # the papers: links, which load nothing
    assert all(re.match(r"https://(arxiv\.org/abs/|github\.com/)", s) for s in loaded)
    assert "default-src 'none'" in page
    assert not re.search(r"(src=|url\(|@import|fetch\()\s*[\"']?http", page)
    assert len(outline.ids) == len(set(outline.ids))
    wanted = "reward null skill forecast directions coefficients cosines map-relex variance along"
    assert set(wanted.split()) <= set(outline.ids)


def test_verdict_command_reward_and_pictures_come_first(page: str) -> None:
    places = ["<h1>", 'class="lead"', 'class="copy"', 'id="reward"', 'id="null"', 'id="skill"']
    found = [page.index(place) for place in [*places, 'id="forecast"', "<nav", 'id="why"']]
    assert found == sorted(found)
    assert "<title>run &lt;1&gt;.zarr: a model</title>" in page
    assert "2026-11-27" in page
    assert "arXiv:2605.21468" in page
    anchors = re.findall(r'<a href="#([^"]+)"', page)
    assert anchors
    assert all(f'<section id="{anchor}"' in page for anchor in anchors)


def test_values_under_the_pointer_are_those_of_the_run(page: str, gram: Gram) -> None:
    [text] = re.findall(r'id="values">(.*?)</script>', page, re.DOTALL)
    [axes] = json.loads(text)["reward"]["axes"]
    [series] = axes["series"]
    np.testing.assert_allclose(
        series["v"], np.column_stack([gram.steps, np.linspace(0, 1, 20)]), rtol=1e-3, atol=1e-9
    )
    left, top, right, bottom = axes["box"]
    assert all(left <= x <= right and top <= y <= bottom for x, y in series["p"])
    [cells] = [axes["cells"] for axes in json.loads(text)["map-relex"]["axes"]]
    skill = np.maximum(backtest(gram, ["relex"]).skill("relex"), -1)
    np.testing.assert_allclose(np.array(cells["v"], float), skill, atol=6e-4)


def test_words_of_the_glossary_are_explained() -> None:
    text = explained("Skill, the skill of hold; hold <again>: see arXiv:2605.21468.")
    assert text.count('data-meaning="the last recorded step kept') == 1
    assert "hold</span>; hold &lt;again&gt;" in text
    assert '<a href="https://arxiv.org/abs/2605.21468">arXiv:2605.21468</a>.' in text


def test_page_says_what_was_found_and_escapes_it(page: str, gram: Gram) -> None:
    assert advise(gram).headline in re.sub("<[^>]+>", "", page)
    assert "run &lt;1&gt;.zarr" in page
    assert "a &amp; b" in page
    assert "<1>" not in page
    assert "relexkit backtest &#x27;a/run &lt;1&gt;.zarr&#x27; --plot figures" in page


def claims_of(run: Run, num_steps: int = 40) -> dict[str, tuple[str, str]]:
    gram = recorded(simulate(run, num_steps, 1), np.arange(1, num_steps + 1))
    whole = spectrum(gram, scope="global")
    found = measure_claims(gram, whole, backtest(gram, (*CHEAP, "model")), advise(gram), {})
    return {claim.claimed: (claim.verdict, claim.measured) for claim in found}


def test_claims_on_a_walk_are_without_evidence() -> None:
    claims = claims_of(Run(beta=0.9))
    assert claims["The whole trajectory is a line, all else is noise"][0] == "no evidence"
    assert claims["50 steps and a line reach 20 times further at equal quality"] == (
        "fails",
        "RELEX never beat standing still",
    )
    first = claims["The first direction holds 92 % of the variance"]
    assert first[0] in ("no evidence", "fails")
    assert len(claims) == 7


def test_claims_on_a_line_hold() -> None:
    claims = claims_of(Run(drift=1.0))
    assert claims["The whole trajectory is a line, all else is noise"][0] == "holds"
    assert claims["The first direction holds 92 % of the variance"][0] == "holds"
    # forty steps cannot check twenty times further
    assert (
        claims["50 steps and a line reach 20 times further at equal quality"][0] == "not measured"
    )
    assert claims["More directions or curved fits do not help"][0] == "holds"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_steps_give_a_shorter_page(gram: Gram, count: int) -> None:
    page = build_page(Subject("run", "run.zarr"), Observed(gram.until(count), {}))
    assert Outline(page).open == []
    assert "Keep training." in page
    assert ("<svg" in page) == (count > 1)


def test_nothing_moved_says_so() -> None:
    page = build_page(
        Subject("run", "run.zarr"), Observed(recorded(np.zeros((5, 30)), np.arange(1, 6)), {})
    )
    assert "Nothing moved: all 3 tensors equal the base" in page


def test_command_writes_the_page_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(
        tmp_path,
        motion="drift",
        density=1.0,
        shapes={"w": (40, 8)},
        steps=tuple(range(1, 9)),
        extras=False,
    )
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store.path
    assert main(["report", store, "-o", str(tmp_path / "new" / "report.html")]) == 0
    assert capsys.readouterr().out == ""
    page = (tmp_path / "new" / "report.html").read_text()
    assert Outline(page).open == []
    assert "none were logged" in page
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]


def test_a_missing_store_is_a_stated_error(tmp_path: Path) -> None:
    with pytest.raises(RelexkitError, match="no such store"):
        write_report(tmp_path / "absent.zarr", tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


SWEEP = {
    "task": "sorting",
    "last_step": 20,
    "num_problems": 64,
    "recommendation": "Keep step 20: nothing beats it.",
    "baseline": {"accuracy": 0.7, "interval": [0.58, 0.8]},
    "candidates": [
        {
            "name": f"{method} at {target}",
            "method": method,
            "num_problems": n,
            "accuracy": a,
            "interval": [a - 0.1, a + 0.1],
        }
        for method, target, n, a in (
            ("model", 30, 64, 0.66),
            ("relex", 30, 8, 0.5),
            ("two-point", 40, 16, 0.6),
        )
    ],
}


def test_results_of_a_sweep_come_first(gram: Gram) -> None:
    page = build_page(Subject("run", "run.zarr"), Observed(gram, {}), sweep=SWEEP)
    assert page.index('<section id="task"') < page.index('<section id="why"')
    assert '<figure id="sweep"' in page
    assert "Keep step 20: nothing beats it." in page


def test_sweep_figure_is_readable() -> None:
    with style.styled():
        figure = sweep_figure(SWEEP)
    assert_readable(figure)
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "model at 30  (64)"


@pytest.mark.parametrize("text", ["no json", "[]", '{"candidates": []}'])
def test_what_is_no_sweep_says_what_to_do(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path, density=1.0, shapes={"w": (40, 8)}, steps=(1, 2), extras=False)
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store.path
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(
        RelexkitError,
        match="is not what relexkit sweep --json prints; run the sweep with --json again",
    ):
        write_report(store, tmp_path / "report.html", sweep=tmp_path / "sweep.json")
    assert not (tmp_path / "report.html").exists()
