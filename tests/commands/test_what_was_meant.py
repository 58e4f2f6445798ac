"""A place that is written otherwise than expected: the message says what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import write_run

from relexkit import TrajectoryStore, import_checkpoints
from relexkit.cli import main
from relexkit.errors import CheckpointError, StoreError


def test_a_folder_that_holds_a_store_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "x", shapes={"w": (5,)}, steps=(1,))
    import_checkpoints(run.source, tmp_path / "RUN/run.zarr", base=run.base)
    with pytest.raises(StoreError, match=r"did you mean .*RUN/run\.zarr\?"):
        TrajectoryStore(tmp_path / "RUN")
    assert main(["info", str(tmp_path / "RUN")]) == 1
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["zip::s3://bucket/run.zarr", "run.zip::run.zarr"])
def test_a_chain_of_addresses_is_named(path: str) -> None:
    with pytest.raises(StoreError, match="is a chain of addresses; expected one"):
        TrajectoryStore(path)


def test_the_name_of_a_repository_says_how_it_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path, shapes={"w": (5,)}, steps=(1,))
    with pytest.raises(CheckpointError, match=r"is written hf://Org/Model-1\.5B"):
        import_checkpoints(run.source, tmp_path / "s.zarr", base="Org/Model-1.5B")
    with pytest.raises(CheckpointError, match=r"is written hf://Org/Model-1\.5B"):
        import_checkpoints("Org/Model-1.5B", tmp_path / "s.zarr", base=run.base)
