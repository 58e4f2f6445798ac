"""When a run is asked for a jump again, as a function of what its store tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import store_of
from tiny_models import tiny_model

from relexkit import Prediction, TrajectoryStore, apply, predict_weights
from relexkit.assess.jump_decision import FixedJumps, Jumps
from relexkit.geometry.trajectory_model import fit_trajectory
from relexkit.gram_matrix.jumps import Attempt, attempts, jumps
from relexkit.gram_matrix.segment import segment_gram
from relexkit.record.jumping import Jumper

NONE, BACK, KEPT = 0, 1, 2


def attempt(step: int, kind: int) -> Attempt:
    method = None if kind == NONE else "drift"
    return Attempt(step, 8 if kind else 0, method, kind == KEPT, {"p_value": 0.25})


class Recorded:
    """A recorder of a store that is there already."""

    def __init__(self, store: TrajectoryStore):
        self.store = store

    def flush(self) -> None:
        """Nothing is in flight."""


def recorded(folder: Path, told: list[Attempt]) -> Recorded:
    """A store whose steps tell of attempts, as a training records them."""
    steps, rows = [], []
    by_step = {a.step: a for a in told}
    step = 0
    while step < 200:
        before = by_step.get(step)
        step += before.length if before is not None and before.kept else 1
        steps.append(step)
        rows.append({} if before is None else before.metrics)
    names = {name for row in rows for name in row}
    metrics = {n: np.array([row.get(n, np.nan) for row in rows]) for n in names}
    deltas = {"w": np.ones((len(steps), 4), np.float32)}
    return Recorded(store_of(folder / "s.zarr", deltas, np.array(steps), metrics=metrics))


@pytest.mark.parametrize(
    ("told", "start", "skipped", "next_question"),
    [
        ([], 0, 0, 24),
        ([(24, KEPT)], 32, 8, 56),
        ([(24, BACK)], 0, 0, 24 + 48),
        ([(24, BACK), (72, BACK)], 0, 0, 72 + 96),
        ([(24, BACK), (72, KEPT)], 80, 8, 80 + 24),
        ([(24, NONE)], 0, 0, 24 + 6),
        ([(24, NONE), (30, NONE), (42, NONE)], 0, 0, 42 + 24),
        ([(24, NONE), (30, BACK), (78, NONE)], 0, 0, 78 + 6),
        ([(24, NONE), (30, BACK), (78, NONE), (84, BACK)], 0, 0, 84 + 96),
    ],
)
def test_the_next_question_follows_from_the_store_alone(
    tmp_path: Path, told: list, start: int, skipped: int, next_question: int
) -> None:
    made = [attempt(step, kind) for step, kind in told]
    recorder = recorded(tmp_path, made)
    assert attempts(recorder.store) == made
    jumper = Jumper(Jumps(every=24), recorder, torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert (jumper._start, jumper.skipped) == (start, skipped)
    due = [step for step in range(next_question + 1) if jumper.due(step, 100)]
    assert due == [next_question]
    assert not jumper.due(next_question, 5)  # no room for the shortest jump, of six steps


def test_a_segment_after_a_jump_comes_with_the_momentum_of_the_first_steps(tmp_path: Path) -> None:
    """A fixed rule predicts from the steps since the last jump alone."""
    rng = np.random.default_rng(0)
    gradients = 0.4 * rng.normal(size=600) + rng.normal(size=(32, 600))
    state, position, path = 0.0, 0.0, []
    for step, gradient in enumerate(gradients, 1):
        state = 0.9 * state + 0.1 * gradient
        position = position + state / (1 - 0.9**step) + (6 * state if step == 17 else 0)
        path.append(position)
    steps = np.r_[1:17, 22, 23:38]
    landed = np.where(steps == 22, 6.0, np.nan)
    deltas = {"w": np.array(path, np.float32)}
    store = store_of(tmp_path / "s.zarr", deltas, steps, metrics={"jump_steps": landed})
    first = fit_trajectory(segment_gram(store, 0, 16).matrices[0], steps[:16], num_parameters=600)
    assert first.momentum == pytest.approx(0.9, abs=0.05)
    told = {}
    for rule in (Jumps(every=12), FixedJumps(train_steps=12, jump_steps=6)):
        jumper = Jumper(rule, Recorded(store), torch.nn.Linear(2, 2))  # type: ignore[arg-type]
        assert jumper._start == 22
        told[type(rule)] = jumper._segment().momentum
        assert jumper._segment().steps.tolist() == list(range(1, 16))
    assert told == {Jumps: first.momentum, FixedJumps: None}


def test_without_a_rule_nothing_is_ever_due(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    assert not Jumper(None, None, model).due(10**6, 10**6)
    recorder = recorded(tmp_path, [attempt(24, KEPT), attempt(60, BACK)])
    goes_on = Jumper(None, recorder, model)  # type: ignore[arg-type]
    assert goes_on.skipped == 8
    assert not goes_on.due(10**6, 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_jump_together_and_take_it_back_bit_for_bit(
    tmp_path: Path, kind: str
) -> None:
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    program = Path(__file__).parents[1] / "jump_processes.py"
    ran = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(program), str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    left = torch.load(tmp_path / "weights.pt")
    before, after, landed = left["seen"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert jumps(store).tolist() == [store.steps[-1]] == [15]
    assert [a.outcome for a in attempts(store)] == ["taken back", "kept"]
    predicted = tiny_model()
    segment = segment_gram(store, 0).until(12)
    weights = predict_weights(segment, [15.0], Prediction(method="two-point"))[0]
    apply(store, predicted, weights)
    for name, tensor in predicted.state_dict().items():
        assert torch.equal(tensor, landed[name]), name
    tokens = torch.arange(12).reshape(2, 6) % 15
    torch.testing.assert_close(predicted(input_ids=tokens).logits, left["logits"])
