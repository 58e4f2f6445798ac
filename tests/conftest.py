"""Fixtures that several test files share: small runs and their stores, written once a session and
never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Run, write_run

from relexkit import TrajectoryStore, import_checkpoints


@pytest.fixture(scope="session", autouse=True)
def unflushed_disk() -> Iterator[None]:
    """Tests do not wait for the disk; those of what is flushed, and when, put their own function
    there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relexkit.store.durable.fsync", lambda path: None)
        yield


@pytest.fixture(scope="session")
def bfloat16_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Bfloat16, irregular steps, 2 % of the bits change at a step. Read only."""
    return write_run(
        tmp_path_factory.mktemp("bfloat16"),
        dtype="bfloat16",
        head="tied",
        buffers=True,
        metrics=True,
    )


@pytest.fixture(scope="session")
def float32_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Float32, a straight line and a walk in every weight. Read only."""
    return write_run(
        tmp_path_factory.mktemp("float32"),
        dtype="float32",
        motion="drift",
        density=1.0,
        seed=1,
        metrics=True,
    )


@pytest.fixture(scope="session")
def bfloat16_store(bfloat16_run: Run, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """The store of ``bfloat16_run``: sparse update log. Read only: copy the folder before changing
    it.
    """
    return _store(bfloat16_run, tmp_path_factory.mktemp("stores") / "bfloat16.zarr")


@pytest.fixture(scope="session")
def float32_store(float32_run: Run, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """The store of ``float32_run``: rows of float deltas with ten mantissa bits. Read only."""
    return _store(float32_run, tmp_path_factory.mktemp("stores") / "float32.zarr")


def _store(run: Run, path: Path) -> TrajectoryStore:
    return import_checkpoints(run.source, path, base=run.base).store
