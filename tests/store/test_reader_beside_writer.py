"""A reader beside a recorder that goes back to an earlier step and records other weights under the
same numbers: what is read is the old run or the new one, or is refused.

What the recorder does to the disk is written down once, file by file; then it is done again while a
reader reads, a few files at a time, between any two of its reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relexkit import Recorder, TrajectoryStore, gram
from relexkit.errors import StoreError
from relexkit.store import durable
from relexkit.store.fastpath.arrays import ReadableArrays
from relexkit.store.fastpath.local import DurableStore

Change = Callable[[Path], Any]
STEPS, BACK_TO = 6, 2
PACES = (0.0, 0.002, 0.05, 1.0, 200.0)
"""Mean number of changes between two reads; without any, what is read is the old run."""


class Model(torch.nn.Module):
    """A part with a log and one with rows of deltas."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = torch.nn.Parameter(torch.randn(300).bfloat16())
        self.dense = torch.nn.Parameter(torch.randn(200))


def record(model: Model, path: Path, first: int, seed: int, resume_from: int | None) -> None:
    torch.manual_seed(seed)
    with Recorder(model, path, resume_from=resume_from, sketch=False) as recorder:
        for step in range(first, STEPS + 1):
            with torch.no_grad():
                model.sparse += torch.randn(300).bfloat16() * (torch.rand(300) < 0.2)
                model.dense += torch.randn(200)
            recorder.record(step, {"reward": float(seed)})


def written_down(path: Path, work: Callable[[], None]) -> list[Change]:
    """What ``work`` does to the files of a store, one change after the other."""
    changes: list[Change] = []
    rename, delete_dir = durable.rename, DurableStore.delete_dir

    def noted(source: Path, target: Path) -> None:
        content, place = source.read_bytes(), target.relative_to(path)
        changes.append(lambda store: replace(store / place, content))
        rename(source, target)

    async def deleted(self: DurableStore, prefix: str) -> None:
        changes.append(lambda store: shutil.rmtree(store / prefix, ignore_errors=True))
        await delete_dir(self, prefix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "rename", noted)
        patch.setattr(DurableStore, "delete_dir", deleted)
        work()
    return changes


def replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("temporary")
    temporary.write_bytes(content)
    temporary.replace(path)


def whole_step(store: TrajectoryStore) -> list[np.ndarray]:
    """Every part at the last step but one."""
    parts = enumerate(store.layout.parts)
    return [store.read_state(part, STEPS - 2, 0, spec.numel) for part, spec in parts]


def matrices(store: TrajectoryStore) -> list[np.ndarray]:
    return [gram(store).matrices]


@pytest.mark.parametrize("num_reads", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_what_is_read_is_the_old_run_or_the_new_one_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_reads: int
) -> None:
    torch.manual_seed(0)
    model, old, new = Model(), tmp_path / "old.zarr", tmp_path / "new.zarr"
    record(model, old, 1, 1, None)
    shutil.copytree(old, new)
    store = TrajectoryStore(old)
    with torch.no_grad():  # as it was at the step that the run goes back to
        for part, weight in enumerate((model.sparse, model.dense)):
            bits = store.read_state(part, BACK_TO - 1, 0, weight.numel())
            signed = bits.view(np.int16 if bits.itemsize == 2 else np.int32)
            weight.copy_(torch.from_numpy(signed).view(weight.dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relexkit.record.recorder.check_equals", lambda *_: None)  # rounded deltas
        changes = written_down(new, lambda: record(model, new, BACK_TO + 1, 2, BACK_TO))
    assert len(changes) > 30
    reads = (whole_step, matrices)
    expected = [[read(TrajectoryStore(path)) for path in (old, new)] for read in reads]
    for path in (old, new):
        shutil.rmtree(path / "gram")
    random, outcomes = np.random.default_rng(0), {"old": 0, "new": 0, "refused": 0}
    for number in range(num_reads):
        path, kind = tmp_path / "read.zarr", number % len(reads)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(old, path)
        pending = list(changes)
        pace = PACES[number // len(reads) % len(PACES)]

        def go_on(path: Path = path, pending: list[Change] = pending, pace: float = pace) -> None:
            for _ in range(min(len(pending), random.poisson(pace))):
                pending.pop(0)(path)

        outcome = read_beside(TrajectoryStore(path), reads[kind], go_on, monkeypatch)
        for _ in range(len(pending)):
            pending.pop(0)(path)
        later = reads[kind](TrajectoryStore(path))  # with what the reader may have kept there
        assert same(later, expected[kind][1]), f"read {number} leaves something stale"
        if outcome is None:
            outcomes["refused"] += 1
        else:
            [name] = [
                n for n, e in zip(("old", "new"), expected[kind], strict=True) if same(outcome, e)
            ]
            outcomes[name] += 1
    assert min(outcomes.values()) > num_reads // 20, outcomes


def read_beside(
    store: TrajectoryStore,
    read: Callable[[TrajectoryStore], list[np.ndarray]],
    go_on: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> list[np.ndarray] | None:
    """What ``read`` gives while ``go_on`` is called before and after everything that is read; None
    if it refuses, as it must, without calling the store damaged.
    """
    guard = ReadableArrays.guard

    def beside(self: ReadableArrays, where: Any, what: Callable[[], Any]) -> Any:
        go_on()
        try:
            return guard(self, where, what)
        finally:
            go_on()

    with monkeypatch.context() as patch:
        patch.setattr(ReadableArrays, "guard", beside)
        try:
            return read(store)
        except StoreError as error:
            if "other steps were recorded in place" not in str(error):
                raise
            return None


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """Matrices of which some rows were known are equal but for rounding."""
    return all(
        np.array_equal(a, b)
        or (a.dtype == np.float64 and np.allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()))
        for a, b in zip(found, expected, strict=True)
    )
