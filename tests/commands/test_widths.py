"""What commands print at 80 and 120 columns: no line is wider, no name is cut, no word broken."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runs import write_run

from relexkit.cli import main
from relexkit.ingest.importer import import_checkpoints
from relexkit.trainer.commands.evaluate import print_evaluations
from relexkit.trainer.commands.evaluate_harness import print_scores
from relexkit.trainer.commands.g2d import print_summaries
from relexkit.trainer.commands.probe import print_linearity
from relexkit.trainer.commands.sweep import print_candidates
from relexkit.trainer.commands.tokens import print_shares
from relexkit.trainer.evaluation.evaluate import Evaluation
from relexkit.trainer.experiments.outputs import OutputLinearity

NAMES = [
    f"model.layers.{layer}.{module}.weight"
    for layer in (0, 11)
    for module in ("self_attn.q_proj", "mlp.down_proj", "post_attention_layernorm")
]
COMMANDS = {
    "info": "info RUN",
    "verify": "verify RUN",
    "gram": "gram RUN",
    "spectrum": "spectrum RUN",
    "modules": "spectrum RUN --scope module",
    "linearity": "linearity RUN --scope tensor",
    "backtest": "backtest RUN --scope tensor",
    "advise": "advise RUN --until 500",
    "extrapolate": "extrapolate RUN --to 20 7 --rank 100 --until 900 -o OUT",
    "checkout": "checkout RUN --step 3 -o OUT",
    "dry run": "import SOURCE --base BASE -o OTHER --dry-run",
    "source": "info SOURCE",
}


class Terminal(io.StringIO):
    """Text that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("run")
    made = write_run(
        folder,
        motion="drift",
        density=1.0,
        shapes=dict.fromkeys(NAMES, (24, 8)),
        steps=tuple(range(1, 13)),
        metrics=True,
        extras=False,
    )
    path = import_checkpoints(made.source, folder / "run.zarr", base=made.base).store.path
    return path, str(made.source)


def screen(words: list[str], width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that a command prints on a terminal of that width."""

    def command() -> None:
        assert main(words) == 0

    return shown(command, width, monkeypatch)


def shown(print_it: Callable[[], None], width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that a function prints on a terminal of that width."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    print_it()
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", terminal.getvalue())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_wider_and_no_name_is_cut(
    name: str,
    width: int,
    run: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(run[0]).parent)
    known = {"RUN": "run.zarr", "SOURCE": "run", "BASE": "base", "OTHER": "o.zarr"}
    known["OUT"] = str(tmp_path / "out")
    text = screen([known.get(w, w) for w in COMMANDS[name].split()], width, monkeypatch)
    too_wide = [line for line in text.splitlines() if len(line.rstrip()) > width]
    # a path is one word, which nothing may break
    assert [line for line in too_wide if " " in line.strip()] == [], name
    assert "…" not in text
    if "--scope tensor" in COMMANDS[name] or name == "spectrum":
        assert all(tensor.removesuffix(".weight") in text for tensor in NAMES)


def evaluation(right: int) -> Evaluation:
    rng = np.random.default_rng(right)
    return Evaluation(
        task="arithmetic",
        split="validation",
        seed=0,
        temperature=1.0,
        max_completion_length=16,
        keys=tuple(map(str, range(40))),
        greedy_N=(np.arange(40) < right).astype(float),
        sampled_NS=rng.integers(0, 2, (40, 8)).astype(float),
        texts=("",) * 40,
        mean_length=12.5,
        truncated=0.0,
    )


CANDIDATES = ("relex at 1200 (rank 20, fit sinusoid, window 10, scale 0.5)", "drift at 1200")
MODELS = ("runs/first-long-name-of-a-run/checkpoint-1200", "base", "two-point 1000 -> 1200")


def print_models(wide: bool) -> None:
    found = {name: evaluation(10 * place + 5) for place, name in enumerate(MODELS)}
    print_evaluations(found, (1, 4), wide=wide)


def print_harness(wide: bool) -> None:
    pytest.importorskip("lm_eval")
    from relexkit.trainer.evaluation.harness import Score

    score = Score("gsm8k", "exact_match,strict-match", 0.5, (0.4, 0.6), np.tile([0.0, 1.0], 20))
    print_scores({name: [score] for name in MODELS})


def print_race(wide: bool) -> None:
    one = {"num_problems": 400, "accuracy": 0.5, "interval": (0.45, 0.55), "stopped": True}
    one |= {"difference": -0.1, "difference_interval": (-0.15, -0.05), "tied": True}
    document = {"task": "arithmetic", "last_step": 1000, "num_problems": 400, "baseline": one}
    document |= {"answers": 900, "answers_of_full_grid": 1200, "recommendation": "Keep it. " * 20}
    print_candidates(document | {"candidates": [{"name": n} | one for n in CANDIDATES]}, wide=wide)


def print_pairs_trained(wide: bool) -> None:
    accuracy = {"greedy": {"accuracy": 0.5, "interval": (0.45, 0.55)}}
    told = {"pairs": 1024, "mixed": 128, "prompts": 4096, "entropy": 0.5, "margin": -0.25}
    summary = {"step": 1000, "before": accuracy, "after": accuracy}
    summary["informativeness"] = told | {"accuracy_spread": 0.125}
    print_summaries(
        [summary | {"difference": {"accuracy": 0.1, "interval": (-0.05, 0.25)}}], wide=wide
    )


def print_tokens(wide: bool) -> None:
    classes = {"shared": 0.5, "only right answers": 0.25, "only wrong answers": 0.25}
    token = {"text": "a token that is very long " * 6, "class": "shared", "share": 0.5}
    shares = {"rollouts": 4096, "weighted": True, "classes": classes, "classes_weighted": classes}
    print_shares(shares | {"tokens": [token | {"share_weighted": 0.25}]})


def print_probe(wide: bool) -> None:
    steps, values = np.arange(1, 21), np.linspace(0.0, 1.0, 20)[:, None] * np.ones(30)
    ends = values[:2]
    found = OutputLinearity(steps, values, values[1], np.array([50.0, 1e3]), ends, ends + 0.1)
    print_linearity(found, "trajectory-model")


TRAINER: dict[str, tuple[Callable[[bool], None], list[str], str]] = {
    "evaluate": (print_models, list(MODELS), "sampled"),
    "harness": (print_harness, [*MODELS, "exact_match,strict-match"], ""),
    "sweep": (print_race, list(CANDIDATES), "its 95 %"),
    "g2d": (print_pairs_trained, ["1000"], "mixed prompts"),
    "tokens": (print_tokens, ["a token that is very long " * 6], ""),
    "probe": (print_probe, ["step 1000"], ""),
}
"""What prints a result of the size of real ones, names in it, and a column that goes at 80."""


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", TRAINER)
def test_tables_of_the_trainer_fit(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    show, names, goes = TRAINER[name]
    text = shown(lambda: show(False), width, monkeypatch)
    assert [line for line in text.splitlines() if len(line.rstrip()) > width] == []
    assert "…" not in text
    letters = re.sub(r"\s", "", text)
    for one in names if width == 120 or name != "harness" else ():
        assert re.sub(r"\s", "", one)[:20] in letters
    if goes and width == 80:
        assert goes not in text.splitlines()[1]
        assert "--wide shows all" in text
        assert goes in shown(lambda: show(True), width, monkeypatch)


def test_narrow_tables_say_what_they_left_out(
    run: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = screen(["spectrum", run[0]], 80, monkeypatch)
    assert "--wide shows all" in narrow
    assert "straight (walk)" not in narrow.splitlines()[1]
    wide = screen(["spectrum", run[0], "--wide"], 80, monkeypatch)
    assert "straight (walk)" in wide.splitlines()[1]
    assert "--wide shows all" not in wide


def test_words_are_not_broken_and_commands_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from relexkit.commands.console import show

    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", terminal)
    sentence = "  - neighbouring update-cosines are near one on a line"
    command = "  relexkit sweep some/long/path/run.zarr --task TASK --to 300 --method drift"
    show(f"{sentence}\n{command}")
    lines = terminal.getvalue().splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert " ".join(" ".join(lines[:2]).split()) == sentence.strip()
    assert "".join(lines[2:]).replace("\\", "").split() == command.split()
    assert [line.endswith(" \\") for line in lines[2:]] == [True] * (len(lines) - 3) + [False]


def test_what_means_less_than_it_seems_is_said(
    run: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # drawn in full by the tests of the report
    monkeypatch.setattr("relexkit.analysis.report.build_page", lambda *_, **__: "")
    words = ["extrapolate", run[0], "--to", "7", "20", "--until", "500", "--rank", "100"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "--until 500: the run ends with step 12; all of it is used" in said
    assert "--rank 100: 12 steps have at most 12 directions; all of them are used" in said
    assert f"relexkit checkout {run[0]} --step 7 -o DIR gives the trained one" in said
    assert said.count("--until 500") == 1
    assert "--to 20:" not in said
    assert main(["advise", run[0], "--until", "12"]) == 0
    assert "--until" not in capsys.readouterr().err
    for words in (["spectrum", run[0]], ["report", run[0], "-o", str(tmp_path / "page.html")]):
        assert main([*words, "--until", "13"]) == 0
        assert "--until 13: the run ends with step 12; all of it" in capsys.readouterr().err


def test_work_that_counts_nothing_is_told_and_full_bars_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from relexkit.commands.console import progress_bar

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(after=0) as progress:
        while "working" not in terminal.getvalue():  # the bar starts in a thread of its own
            pass
        progress("pass", 1, 3)
        while "1/3" not in terminal.getvalue():
            pass
        progress("pass", 3, 3)
        seen = len(terminal.getvalue())
    last = terminal.getvalue()[seen:]
    assert "working" in last
    assert "3/3" not in last


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from relexkit.commands.console import progress_bar

    with progress_bar(after=0) as progress:
        progress("pass", 1, 3)
    assert capsys.readouterr().err == ""
