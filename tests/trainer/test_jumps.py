"""Jumps inside a training: kept or taken back, recorded, and the same after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import assert_same_run, logged, settings, weights
from tiny_models import save_tiny_model

from relexkit import RelexkitError, TrajectoryStore, gram
from relexkit.assess.jump_decision import Decision, Jumps, RewardTest
from relexkit.gram_matrix.jumps import attempts, jumps
from relexkit.record import jumping
from relexkit.trainer.loop.rollout_log import read_rollouts
from relexkit.trainer.loop.train import train

EVERY, LENGTH, STEPS = 12, 6, 32
FORCED = Decision(LENGTH, "two-point", "forced", {"drift_to_noise": 3.0, "skill": 0.5})
BETTER, WORSE = RewardTest(0.2, 0.3, 0.9), RewardTest(0.3, 0.1, 0.001)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def jumping_run(base: Path, output: Path, **options: Any) -> Path:
    given = {"max_steps": STEPS, "save_steps": 6, "jumps": {"every": EVERY}} | options
    return train(settings(base, output, **given))


Force = Callable[..., list[int]]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Makes every attempt a jump, far beyond the prediction, and the tests say what is given, the
    last one again and again; the steps that were asked about.
    """

    def forced(*tests: RewardTest) -> list[int]:
        asked: list[int] = []

        def decide(self: Jumps, segment: Any, most: int) -> Decision:
            asked.append(len(segment.steps))
            return FORCED

        def test(before_PG: np.ndarray, after_PG: np.ndarray) -> RewardTest:
            assert before_PG.shape == after_PG.shape == (4, 4)
            return tests[min(len(asked), len(tests)) - 1]

        monkeypatch.setattr(Jumps, "decide", decide)
        monkeypatch.setattr(jumping, "reward_test", test)
        return asked

    return forced


def test_a_jump_that_is_taken_back_leaves_the_run_as_if_it_had_never_been(
    base: Path, tmp_path: Path, force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = jumping_run(base, tmp_path / "plain", jumps=None)
    asked = force(WORSE)
    moved = []
    whole = jumping.apply

    def far(store: Any, model: Any, weights_NT: np.ndarray) -> None:
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        whole(store, model, 50 * weights_NT)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved.append(float((after - before).norm()))

    monkeypatch.setattr(jumping, "apply", far)
    jumped = jumping_run(base, tmp_path / "jumped")
    assert asked == [EVERY]  # the next question waits twice as long, past the end
    assert len(moved) == 1
    assert moved[0] > 1
    assert torch.equal(weights(plain), weights(jumped))
    assert read_rollouts(plain / "rollouts").equals(read_rollouts(jumped / "rollouts"))
    stores = [TrajectoryStore(folder / "run.zarr") for folder in (plain, jumped)]
    np.testing.assert_array_equal(stores[0].steps, stores[1].steps)
    np.testing.assert_array_equal(stores[0].checksums(), stores[1].checksums())
    own = {name: v for name, v in stores[1].metrics().items() if not name.startswith("jump/")}
    for name, values in own.items():
        np.testing.assert_array_equal(values, stores[0].metrics()[name], err_msg=name)
    assert not len(jumps(stores[1]))
    assert gram(stores[1]).steps.tolist() == list(range(1, STEPS + 1))


def test_decisions_are_told_by_the_store_and_the_wait_doubles_after_each_that_failed(
    base: Path, tmp_path: Path, force: Force
) -> None:
    asked = force(BETTER, WORSE, BETTER)
    folder = jumping_run(base, tmp_path / "run", max_steps=80)
    store = TrajectoryStore(folder / "run.zarr")
    found = attempts(store)
    # 12 trained, jump to 18; at 30 taken back; at 54 (24 later) kept, to 60; at 72 kept, to 78
    assert [(a.step, a.length, a.outcome) for a in found] == [
        (12, 6, "kept"),
        (30, 6, "taken back"),
        (54, 6, "kept"),
        (72, 6, "kept"),
    ]
    assert asked == [12, 12, 36, 12]  # steps since the last jump that stayed
    assert jumps(store).tolist() == [18, 60, 78]
    for attempt in found:
        assert attempt.method == "two-point"
        assert attempt.numbers["rollouts"] == 16
        assert attempt.numbers["drift_to_noise"] == 3
        assert attempt.numbers["after"] == (0.1 if attempt.outcome == "taken back" else 0.3)
    steps = [entry["step"] for entry in logged(folder)]
    assert steps == store.steps.tolist() == [s for s in range(1, 81) if not _skipped(s)]
    problems = read_rollouts(folder / "rollouts").to_pandas()
    plain = jumping_run(base, tmp_path / "plain", max_steps=20, jumps=None)
    expected = read_rollouts(plain / "rollouts").to_pandas()
    trained = problems["step"].unique()[:20]  # a jump skips steps, and no prompts
    seen = problems[problems["step"].isin(trained)]["problem"].tolist()
    assert seen == expected["problem"].tolist()


def _skipped(step: int) -> bool:
    return any(led_to - LENGTH < step < led_to for led_to in (18, 60, 78))


@pytest.fixture(scope="module")
def finished() -> dict[RewardTest, Path]:
    """Undisturbed runs, by what the tests say, as they are needed."""
    return {}


POINTS = ("_decide", "before", "_jump", "after", "_conclude", "later")
CUTS = [
    *((verdict, point) for verdict in (BETTER, WORSE) for point in POINTS),
    (WORSE, "_take_back"),
]


@pytest.mark.parametrize(("verdict", "point"), CUTS)
def test_an_interruption_at_any_point_of_a_jump_ends_with_the_same_bits(
    base: Path,
    tmp_path: Path,
    force: Force,
    monkeypatch: pytest.MonkeyPatch,
    finished: dict[RewardTest, Path],
    verdict: RewardTest,
    point: str,
) -> None:
    force(verdict)
    if verdict not in finished:
        finished[verdict] = jumping_run(base, tmp_path / "whole", max_steps=21, save_steps=5)

    class Interrupted(Exception):
        pass

    counts = {"roll_out": 0}
    real = {
        name: getattr(jumping.Jumper, name)
        for name in ("_decide", "_jump", "_conclude", "_take_back")
    }

    def stop_after(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **options: Any) -> Any:
            result = real[name](self, *args, **options)
            raise Interrupted(result)

        return method

    from relexkit.trainer.loop import train as program

    roll_out = program.roll_out
    stop_at = {"before": EVERY + 1, "after": EVERY + 2, "later": EVERY + 3}.get(point)

    def counted(*args: Any, **options: Any) -> Any:
        counts["roll_out"] += 1
        if counts["roll_out"] == stop_at:
            raise Interrupted
        return roll_out(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(program, "roll_out", counted)
        if point in real:
            patch.setattr(jumping.Jumper, point, stop_after(point))
        with pytest.raises(Interrupted):
            jumping_run(base, tmp_path / "parted", max_steps=21, save_steps=5)
    jumping_run(base, tmp_path / "parted", max_steps=21, save_steps=5)
    assert_same_run(finished[verdict], tmp_path / "parted")


def test_without_evidence_nothing_is_sampled_twice_and_the_reason_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jumping_run(base, tmp_path / "run", max_steps=15, learning_rate=1e-9)
    (attempt,) = attempts(TrajectoryStore(folder / "run.zarr"))
    assert (attempt.step, attempt.length, attempt.outcome) == (EVERY, 0, "no jump")
    assert "rollouts" not in attempt.numbers
    assert f"step {EVERY}: no jump: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jumps": {"every": 8}}, "jumps: every 8 steps are too few"),
        ({"jumps": {"often": 8}}, "jumps: key 'often' is unknown; expected every, methods"),
        ({"jumps": "sometimes"}, "jumps"),
        ({"jumps": "adaptive", "record_every": 2}, "jumps: predicts from recorded steps"),
        ({"jumps": "adaptive", "steps_per_generation": 2}, "25 trained steps to be a multiple"),
        ({"jumps": "adaptive", "generation_batch_size": 12}, "3 prompts of a generation do not"),
        (
            {"jumps": "adaptive", "regrounding": {"train_steps": 5, "jump_steps": 5}},
            "expected one of them",
        ),
    ],
)
def test_jumps_that_cannot_be_are_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as refused:
        settings(base, tmp_path / "run", **options)
    assert isinstance(refused.value, RelexkitError | ValueError)
