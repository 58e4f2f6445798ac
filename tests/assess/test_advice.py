"""Advice on simulated runs whose future is known, and on what a person may bring: too little,
nothing, rounding.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from runs import write_run
from simulated import LABELLED, Run, judge, recorded, simulate

from relexkit.assess.advice import HEADLINES, Check, advise
from relexkit.cli import main
from relexkit.ingest.importer import import_checkpoints

QUICK = (
    "walk, momentum",
    "walk, irregular steps",
    "line, fair",
    "line, irregular steps",
    "line, decaying rate",
    "slow turn",
    "line that breaks off soon after",
    "line that dies soon after",
    "fast turn, momentum",
    "saturated",
    "turned just now",
    "line below the spacing",
    "sparse reward",
    "five steps",
    "two steps",
)


@pytest.mark.parametrize("name", QUICK)
def test_advice_is_right(name: str) -> None:
    verdict, right = judge(LABELLED[name], seed=0)
    assert right, verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELLED)
def test_advice_is_right_on_the_labelled_set(name: str) -> None:
    """34 kinds of run, three seeds each; docs/advice.md has the confusion table."""
    wrong = [
        verdict
        for verdict, right in (judge(LABELLED[name], seed) for seed in range(3))
        if not right
    ]
    assert not wrong


def test_advice_brings_its_numbers_and_what_would_change_it() -> None:
    gram = recorded(simulate(Run(drift=0.5), 48, 0), np.arange(1, 49))
    advice = advise(gram)
    assert advice.verdict == "extrapolate"
    assert advice.headline.startswith(
        f"The weights extrapolate to about step {advice.target} with --method {advice.method};"
    )
    assert advice.target == 96, "no farther than the record reaches"
    assert "of this run's own past" in advice.reasons[0]
    assert any(r.startswith("Drift to noise") for r in advice.reasons)
    assert any("relexkit sweep" in w for w in advice.would_change)
    assert json.loads(json.dumps(advice.document()))["record"]["model"][-1]["passed"] is True


def test_a_single_small_matrix_is_enough_while_training() -> None:
    gram = recorded(simulate(Run(), 24, 1), np.arange(1, 25), num_tensors=1)
    assert advise(gram).verdict == "not-a-line"


def test_nothing_moved() -> None:
    gram = recorded(np.zeros((10, 30)), np.arange(1, 11))
    advice = advise(gram)
    assert advice.verdict == "keep-training"
    assert advice.reasons == ("Nothing has moved over 10 recorded steps.",)


def test_a_jump_is_no_line() -> None:
    """Somebody else's checkpoint in between: one step leaps a hundred times as far as the
    others.
    """
    deltas = simulate(Run(), 40, 2)
    deltas[20:] += 100 * np.random.default_rng(0).standard_normal(deltas.shape[1])
    assert advise(recorded(deltas, np.arange(1, 41))).verdict in ("not-a-line", "keep-training")


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (Check(1.5, 0.3, 3, 4), True),
        (Check(1.5, 0.3, 2, 4), False),
        (Check(1.5, 0.05, 4, 4), False),
        (Check(1.5, 0.9, 1, 1), False),
    ],
)
def test_one_success_is_no_record(check: Check, passed: bool) -> None:
    assert check.passed is passed


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(
        tmp_path,
        motion="drift",
        density=1.0,
        shapes={"w": (40, 8)},
        steps=tuple(range(1, 13)),
        extras=False,
    )
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store.path
    assert main(["advise", store]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split(" to about")[0] + "." in {
        h.split(" to about")[0].rstrip(".") + "." for h in HEADLINES.values()
    }
    assert "Why:" in out
    assert "What would change this:" in out
    assert main(["advise", store, "--json", "--until", "3"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "keep-training"
    assert document["steps"] == [1, 2, 3]
    assert document["reasons"] == ["3 recorded steps: too few to tell a drift from a walk."]
    assert main(["advise", store, "--until", "0"]) == 1
    assert "--until 0 keeps no step" in capsys.readouterr().err
