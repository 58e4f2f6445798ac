"""Advice on simulated runs whose future is known, and on what a person may bring: too little,
nothing, rounding.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from runs import write_run
from simulated import LABELLED, Run, judge, observe, recorded, simulate
from study_runs import study_run

from relexkit.assess.advice import HEADLINES, Check, advise, objection
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


@pytest.mark.parametrize(
    ("name", "decided"),
    [
        ("line, fair", False),
        ("walk, momentum", True),
        ("sparse reward", True),
        ("line below the spacing", True),
    ],
)
def test_a_verdict_that_is_known_without_the_record_makes_no_checks(
    name: str, decided: bool
) -> None:
    gram, metrics, _ = observe(LABELLED[name], 0)
    whole, short = advise(gram, metrics), advise(gram, metrics, record=False)
    assert short.verdict == whole.verdict
    assert short.headline == whole.headline
    assert bool(whole.record)
    assert bool(short.record) is not decided


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
        f"The weights extrapolate to about step {advice.target} with --method {advice.method},"
    )
    assert advice.target == 96, "no farther than the record reaches"
    assert "of this run's own past" in advice.reasons[0]
    assert any(r.startswith("Drift to noise") for r in advice.reasons)
    assert any("relexkit sweep" in w for w in advice.would_change)
    assert json.loads(json.dumps(advice.document()))["record"]["drift"][-1]["passed"] is True
    assert advice.next_command is not None
    assert f"--to 96 --method {advice.method}" in advice.next_command


def test_a_single_small_matrix_is_enough_while_training() -> None:
    gram = recorded(simulate(Run(), 24, 1), np.arange(1, 25), num_tensors=1)
    assert advise(gram).verdict == "not-a-line"


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_a_walk_that_coasts_is_told_one_thing(seed: int) -> None:
    """The trajectory model follows momentum and is nearer to the weights; the advice, its reasons
    and the next command all say not to go on.
    """
    gram = recorded(simulate(Run(beta=0.9), 48, seed), np.arange(1, 49))
    advice = advise(gram)
    assert advice.verdict == "not-a-line"
    assert "model" not in advice.record
    assert not any("extrapolate" in reason or "best" in reason for reason in advice.reasons)
    assert advice.next_command is not None
    assert advice.next_command.endswith("--method average")
    for method in ("relex", "two-point", "model", "drift"):
        against = objection(advice, method, 48.0, [60.0, 96.0], "run.zarr")
        assert against is not None
        assert against.startswith("This run is not on a line: do not extrapolate it.")
        assert "relexkit advise run.zarr" in against
        assert "\n" not in against
    assert objection(advice, "average", 48.0, [96.0], "run.zarr") is None
    assert objection(advice, "relex", 48.0, [40.0], "run.zarr") is None


def test_a_line_objects_to_what_failed_in_its_own_past_alone() -> None:
    gram = recorded(simulate(Run(drift=0.5), 48, 0), np.arange(1, 49))
    advice = advise(gram)
    failed = (Check(1.1, -0.5, 0, 4),)
    told = dataclasses.replace(advice, record=advice.record | {"relex": failed})
    assert objection(advice, "drift", 48.0, [96.0], "run.zarr") is None
    beyond = objection(advice, "drift", 48.0, [97.0], "run.zarr")
    assert beyond is not None
    assert "up to step 96" in beyond
    against = objection(told, "relex", 48.0, [60.0], "run.zarr")
    assert against is not None
    assert "0 of 4 checks won, skill -0.50" in against


@pytest.mark.parametrize("run", [Run(drift=0.5), Run(drift=0.15, beta=0.9), Run(beta=0.9)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_saving_less_often_turns_no_advice_around(run: Run, seed: int) -> None:
    """Fewer saved steps may say less, never the opposite."""
    deltas, said = simulate(run, 60, seed), set()
    for every in (1, 3, 6, 12):
        steps = np.arange(every, 61, every)
        metrics = {"frac_reward_zero_std": np.zeros(len(steps))}
        advice = advise(recorded(deltas, steps), metrics)
        assert not any("informative" in reason for reason in advice.reasons)
        said.add(advice.verdict)
    assert not {"extrapolate", "not-a-line"} <= said


@pytest.mark.parametrize(
    ("arm", "seed", "until", "verdict"),
    [
        ("plain-3e-6", 4, 50, "extrapolate"),
        ("plain-1e-5", 4, 50, "keep-training"),
        ("plain-1e-4", 1, 50, "not-a-line"),
    ],
)
def test_how_often_a_real_run_was_saved_turns_no_advice_around(
    arm: str, seed: int, until: int, verdict: str
) -> None:
    """From 16 saved steps on it is the same; from fewer the same, or that they are too few."""
    for every in (1, 3, 5, 10):
        run = study_run(arm, seed, until, every)
        advice = advise(run)
        if advice.verdict != verdict:
            assert len(run.steps) < 16
            assert "too few" in advice.reasons[0]
        else:
            assert verdict != "not-a-line" or len(run.steps) >= 16
            assert advice.method == ("drift" if verdict == "extrapolate" else None)


def test_few_saved_steps_are_too_few_and_not_coasting() -> None:
    steps = np.arange(10, 70, 10)
    gram = recorded(simulate(Run(drift=0.5), 60, 0), steps)
    advice = advise(gram, {"frac_reward_zero_std": np.zeros(6)})
    assert advice.verdict == "keep-training"
    assert advice.reasons == (
        "6 recorded steps: too few to tell a drift from a walk; it takes 16, evenly spread.",
    )


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
    assert document["reasons"] == [
        "3 recorded steps: too few to tell a drift from a walk; it takes 16, evenly spread."
    ]
    assert main(["advise", store, "--until", "0"]) == 1
    assert "--until 0 keeps no step" in capsys.readouterr().err


def test_extrapolate_warns_in_one_line_where_the_advice_speaks_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(
        tmp_path,
        motion="drift",
        density=1.0,
        shapes={"w": (40, 8)},
        steps=tuple(range(1, 7)),
        extras=False,
    )
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store.path

    def warnings(*options: str) -> list[str]:
        method = options[1] if options else "relex"
        last = options[3] if len(options) > 2 else "6"
        folder = str(tmp_path / method)
        assert main(["extrapolate", store, "-o", folder, "--to", "60", *options]) == 0
        out, err = capsys.readouterr()
        assert f"step-60, {method} from steps 1 to {last}" in out
        return [line for line in err.splitlines() if line.startswith("warning: ")]

    assert warnings() == [
        f"warning: Keep training. relex was asked for 10 times the last step; `relexkit advise"
        f" {store}` says why"
    ]
    assert len(warnings("--method", "two-point")) == 1, "the Gram matrices are there by now"
    assert warnings("--method", "hold") == []
    assert warnings("--method", "average") == []
    (so_far,) = warnings("--method", "least-squares", "--until", "5")
    assert so_far.endswith(f"`relexkit advise {store} --until 5` says why")
