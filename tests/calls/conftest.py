"""Two recorded runs of one small model, which the calls are made on."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Run, write_run

from relexkit import import_checkpoints


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Path]:
    """What was written, and a folder with their stores ``a.zarr`` and ``b.zarr``."""
    folder = tmp_path_factory.mktemp("calls")
    runs = []
    for name, seed in (("a", 1), ("b", 2)):
        run = write_run(
            folder / name,
            motion="drift",
            density=0.5,
            steps=range(1, 13),
            head="tied",
            seed=seed,
            extras=False,
            metrics=True,
        )
        import_checkpoints(run.source, folder / f"{name}.zarr", base=run.base)
        runs.append(run)
    return runs[0], runs[1], folder
