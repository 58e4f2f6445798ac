"""A write that fails, once, while everything after it would succeed: nothing later is committed,
and the same command completes the store.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import raw_bits, store_content, write_run

from relexkit import Recorder, TrajectoryStore, gram, import_checkpoints
from relexkit.cli import main
from relexkit.errors import StoreError
from relexkit.gram_matrix.exact import known_steps
from relexkit.ingest.write_queue import WriteQueue
from relexkit.store import durable

PLACES = {
    "sparse": ("indices/c/1/0", "data/c/1/0", "indptr/c/1/0"),
    "float": ("deltas/0/c/1/0",),
}
ALWAYS = ("checksums/c/1/0", "steps/c/0")


def fail_once(monkeypatch: pytest.MonkeyPatch, what: str, place: str, skip: int = 0) -> list[Path]:
    """Let ``durable``'s function ``what`` fail the first time that its path ends with ``place``,
    after ``skip`` times.
    """
    real, failed, seen = getattr(durable, what), [], [0]

    def once(path: Any, *others: Any) -> Any:
        name = others[0] if what == "rename" else path.name if what == "write" else path
        if not failed and str(name).removesuffix(".partial").endswith(place):
            seen[0] += 1
            if seen[0] > skip:
                failed.append(name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *others)

    monkeypatch.setattr(durable, what, once)
    return failed


@pytest.mark.parametrize("what", ["create", "write", "fsync", "rename"])
@pytest.mark.parametrize("encoding", ["sparse", "float"])
def test_after_a_failed_write_nothing_later_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, what: str
) -> None:
    kind = {"dtype": "bfloat16"} if encoding == "sparse" else {"dtype": "float32", "density": 1.0}
    run = write_run(tmp_path, steps=(1, 2, 3, 4), extras=False, **kind)
    whole = store_content(
        Path(import_checkpoints(run.source, tmp_path / "w", base=run.base).store.path)
    )
    for number, place in enumerate((*PLACES[encoding], *ALWAYS)):
        out = tmp_path / f"{number}.zarr"
        import_checkpoints(run.source, out, base=run.base, steps=":1")
        with monkeypatch.context() as patch:
            failed = fail_once(patch, what, place)
            with pytest.raises(StoreError, match=r"No space .* the 1 recorded steps are intact"):
                import_checkpoints(run.source, out, base=run.base)
            assert failed
        store = TrajectoryStore(out)
        store.verify()
        assert store.steps.tolist() == [1]
        result = import_checkpoints(run.source, out, base=run.base)
        assert result.added == [2, 3, 4]
        result.store.verify()
        assert store_content(out) == whole


def test_a_fresh_import_that_fails_is_completed_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, steps=(1, 2, 3), extras=False)
    whole = store_content(
        Path(import_checkpoints(run.source, tmp_path / "w", base=run.base).store.path)
    )
    for number, (place, steps) in enumerate(
        [
            ("base/0/c/0", None),
            ("s.zarr/zarr.json", None),
            ("data/c/0/0", []),
            ("data/c/2/0", [1, 2]),
        ]
    ):
        out = tmp_path / str(number) / "s.zarr"
        with monkeypatch.context() as patch:
            assert fail_once(patch, "write", place, skip=place.startswith("s.")) == []
            with pytest.raises(StoreError, match="No space"):
                import_checkpoints(run.source, out, base=run.base)
        if steps is None:
            with pytest.raises(StoreError, match="its creation was interrupted"):
                TrajectoryStore(out)
        else:
            assert TrajectoryStore(out).steps.tolist() == steps
        import_checkpoints(run.source, out, base=run.base)
        assert store_content(out) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recorder_takes_no_step_after_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40, bias=False).to(dtype)
    path, history = tmp_path / "s.zarr", {}

    def step(number: int) -> None:
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight) * 0.1
        history[number] = model.weight.detach().clone()

    recorder = Recorder(model, path, encoding="exact")
    step(1)
    recorder.record(1)
    step(2)
    fail_once(monkeypatch, "write", "c/1/0")
    recorder.record(2)
    for number in (3, 4):
        step(number)
        with pytest.raises(StoreError, match="the 1 recorded steps are intact"):
            recorder.record(number)
    with pytest.raises(StoreError, match="No space"):
        recorder.close()
    store = TrajectoryStore(path)
    store.verify()
    assert store.steps.tolist() == [1]
    with torch.no_grad():
        model.weight.copy_(history[1])
    with Recorder(model, path, encoding="exact", resume_from=1) as recorder:
        for number in (2, 3, 4):
            with torch.no_grad():
                model.weight.copy_(history[number])
            recorder.record(number)
    store = TrajectoryStore(path)
    store.verify()
    for row, number in enumerate(store.steps):
        state = store.read_state(0, row, 0, 1600)
        np.testing.assert_array_equal(state, raw_bits(history[int(number)]))


def test_the_queue_makes_no_call_after_a_failed_one() -> None:
    queue, made = WriteQueue(100), []

    def write(number: int, payload: bytes) -> None:
        if number == 2:
            raise ValueError("the second one")
        made.append(number)

    with contextlib.suppress(ValueError):  # the failure may show at any later call
        for number in range(1, 10):
            queue.put(write, number, [bytes(10)])
    with pytest.raises(ValueError, match="the second one"):
        queue.finish()
    with pytest.raises(ValueError, match="the second one"):
        queue.close()
    assert made == [1]


@pytest.mark.parametrize("what", ["create", "fsync", "rename"])
def test_gram_matrices_that_cannot_be_kept_are_said_and_computed_later(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    run = write_run(tmp_path, steps=(1, 2, 4), extras=False)
    words = ["import", str(run.source), "--base", str(run.base), "-o"]
    assert main([*words, str(tmp_path / "whole.zarr")]) == 0
    assert "warning" not in capsys.readouterr().err
    out = tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        failed = fail_once(patch, what, "gram/0/matrices/c/0/0/0")
        assert main([*words, str(out)]) == 0
        assert failed
    said = capsys.readouterr().err
    [warning] = [line for line in said.splitlines() if line.startswith("warning:")]
    assert f"the Gram matrices cannot be kept in {out}" in warning
    assert "the steps are safe" in warning
    store = TrajectoryStore(out)
    store.verify()
    assert store.steps.tolist() == [1, 2, 4]
    assert known_steps(store) == 0
    expected = gram(TrajectoryStore(tmp_path / "whole.zarr"))
    np.testing.assert_array_equal(gram(store).matrices, expected.matrices)
    assert known_steps(TrajectoryStore(out)) == 3
