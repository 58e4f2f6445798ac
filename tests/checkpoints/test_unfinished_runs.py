"""Questions about runs that have hardly begun, are still recorded, or jumped: answers, or one line
that says what to do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from simulated import Run, simulate
from stores import store_of
from tiny_models import save_tiny_model

from relexkit import Recorder, TrajectoryStore, observe
from relexkit.cli import main
from relexkit.geometry.trajectory_model import fit_whole
from relexkit.trainer.policy.setup import load_model

TASK = f"{Path(__file__).parents[1] / 'dense_task.py'}:make_for_sweep"
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


def asked(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    status = main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def store_at(path: Path, steps: np.ndarray, jump: int | None = None) -> TrajectoryStore:
    deltas = 1e-3 * simulate(Run(drift=0.5), int(steps[-1]), 0, 40)[steps - 1]
    metrics = {} if jump is None else {"jump_steps": np.where(steps == jump, 5.0, np.nan)}
    return store_of(
        path, dict(zip(NAMES, np.split(deltas, 2, axis=1), strict=True)), steps, metrics=metrics
    )


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_steps_without_metrics(tmp_path, capsys, count) -> None:
    store = store_at(tmp_path / "run.zarr", np.arange(1, count + 1))
    status, out, _ = asked(capsys, "spectrum", store.path)
    assert status == 0
    assert ("record more steps" in out) == (count == 1)
    status, out, _ = asked(capsys, "advise", store.path)
    assert (status, out.splitlines()[0]) == (0, "Keep training.")
    assert "At least 8 recorded steps" in out
    status, out, err = asked(capsys, "backtest", store.path)
    assert status == 2 - count
    assert ("record at least 2 steps" in err) == (count == 1)
    assert ("2 recorded steps cannot tell" in out or "1 recorded step cannot tell" in out) == (
        count == 2
    ), "the model says why"
    status, _, err = asked(capsys, "linearity", store.path)
    assert status == 1
    assert (
        err == f"relexkit: {count} recorded step{'s fit' if count == 2 else ' fits'} every line;"
        " expected at least 3: record more\n"
    )
    status, _, _ = asked(capsys, "report", store.path, "-o", tmp_path / "report.html")
    assert status == 0
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("command", ["spectrum", "backtest", "advise", "linearity"])
def test_a_jump_ends_what_is_looked_at_and_is_said(tmp_path, capsys, command) -> None:
    jumped, plain = (
        store_at(tmp_path / name, np.arange(1, 13), jump)
        for name, jump in (("jumped", 9), ("plain", None))
    )
    status, out, err = asked(capsys, command, jumped.path, "--json")
    assert status == 0
    assert err.count("step 9 is a jump: only the steps of training before it are looked at") == 1
    until = {} if command == "backtest" else {"--until": 8}
    if not until:
        assert max(row["target"] for row in json.loads(out)["grid"]) == 8
        return
    same = out.replace(jumped.path, plain.path)
    assert asked(capsys, command, plain.path, "--json", "--until", 8) == (0, same, "")


@pytest.fixture
def after_a_jump(tmp_path) -> tuple[TrajectoryStore, TrajectoryStore]:
    """A run with jumps to 9 and 25, and the steps between them as a run of its own."""
    steps = np.arange(1, 31)
    deltas = np.random.default_rng(1).integers(-8, 9, (30, 50)).cumsum(axis=0).astype(np.float32)
    metrics = {"jump_steps": np.where(np.isin(steps, (9, 25)), 5.0, np.nan), "reward": steps / 30}
    jumped = store_of(tmp_path / "jumped.zarr", {"w": deltas}, steps, metrics=metrics)
    between = {"w": deltas[9:24] - deltas[8]}
    return jumped, store_of(tmp_path / "alone.zarr", between, np.arange(1, 16))


def test_the_steps_after_a_jump_are_a_run_of_their_own(after_a_jump) -> None:
    jumped, alone = after_a_jump
    found, expected = observe(jumped, since=9), observe(alone)
    assert found.gram.steps.tolist() == expected.gram.steps.tolist()
    np.testing.assert_allclose(found.gram.matrices, expected.gram.matrices, rtol=1e-6)
    np.testing.assert_array_equal(found.gram.changed, expected.gram.changed)
    np.testing.assert_array_equal(found.gram.moved, expected.gram.moved)
    np.testing.assert_array_equal(found.metrics["reward"], np.arange(10, 25) / 30)
    first = fit_whole(observe(jumped).gram)  # the optimizer goes on as it was before the jump
    assert found.gram.momentum == pytest.approx(first.momentum)
    assert observe(jumped, since=9, until=13).gram.steps.tolist() == [1, 2, 3, 4]


def targets(document: dict) -> list[int]:
    """The steps that an answer is about."""
    return document.get("steps") or [row["target"] for row in document["grid"]]


@pytest.mark.parametrize("command", ["spectrum", "backtest", "advise"])
def test_a_command_looks_at_the_steps_after_a_jump(after_a_jump, capsys, command) -> None:
    jumped, alone = after_a_jump
    status, out, err = asked(capsys, command, jumped.path, "--since", 9, "--json")
    expected = json.loads(asked(capsys, command, alone.path, "--json")[1])
    assert (status, err) == (0, "")
    assert targets(json.loads(out)) == targets(expected)
    _, out, err = asked(capsys, command, jumped.path, "--since", 30)
    assert err == (
        f"relexkit: {jumped.path}: no step follows 30 before the next jump or --until; expected one"
        " of its steps with later ones: 30 steps from 1 to 30\n"
    )


def test_a_run_that_begins_with_a_jump_is_refused(tmp_path, capsys) -> None:
    store = store_at(tmp_path / "run.zarr", np.arange(1, 5), jump=1)
    for command in ("spectrum", "backtest", "advise", "linearity"):
        status, out, err = asked(capsys, command, store.path)
        assert (status, out) == (1, "")
        assert (
            err
            == f"relexkit: {store.path}: begins with a jump at step 1; expected steps of training"
            " before it\n"
        )


@pytest.fixture
def recorded(tmp_path) -> Iterator[Path]:
    """A store to which a recorder appends as fast as it can, with three steps or more."""
    model, tokenizer = load_model(str(save_tiny_model(tmp_path / "base")), torch.device("cpu"))
    path, stop, begun = tmp_path / "run.zarr", threading.Event(), threading.Event()

    def record() -> None:
        rng = torch.Generator().manual_seed(0)
        with Recorder(model, path, tokenizer=tokenizer, sketch=False) as recorder:
            for step in range(1, 10_000):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 1e-3 * torch.randn(parameter.shape, generator=rng)
                recorder.record(step, {"reward": step / 100})
                if step == 5:
                    begun.set()
                if stop.wait(0.1):
                    return

    writer = threading.Thread(target=record)
    writer.start()
    try:
        assert begun.wait(60)
        yield path
    finally:
        stop.set()
        writer.join()
    TrajectoryStore(path).verify()


def test_commands_answer_while_the_run_is_recorded(recorded, capsys) -> None:
    """Every command sees a run that ends with some committed step, later ones a longer run."""
    counts = []
    for command, more in (
        ("spectrum", ()),
        ("backtest", ("--method", "two-point")),
        ("spectrum", ()),
    ):
        status, out, err = asked(capsys, command, recorded, "--json", *more)
        assert status == 0, (command, err)
        counts.append(len(json.loads(out).get("steps", [])))
    assert counts[2] > counts[0] >= 4


@pytest.mark.slow
def test_advice_sweep_and_report_while_the_run_is_recorded(recorded, capsys, tmp_path) -> None:
    sweeping = (
        "--task",
        TASK,
        "--to",
        "4000",
        "--method",
        "two-point",
        "--num-problems",
        "16",
        "--max-completion-length",
        "4",
    )
    for command, more in (
        ("advise", ()),
        ("sweep", sweeping),
        ("report", ("-o", tmp_path / "report.html")),
    ):
        status, _, err = asked(capsys, command, recorded, *more)
        assert status == 0, (command, err)
    assert (tmp_path / "report.html").stat().st_size > 10_000
