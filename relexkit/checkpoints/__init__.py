"""Readers of what trainers write: one module per format behind one small protocol, and detection.

A *run* is a folder with one checkpoint per recorded step; a *checkpoint* is one set of weights. To
add a format, add a line to the table in ``formats``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from relexkit.errors import CheckpointError
from relexkit.store import TrajectoryStore
from relexkit.weights.safetensors_io import TensorInfo


class Checkpoint(Protocol):
    """One set of weights, readable in pieces."""

    @property
    def description(self) -> str:
        """What this is, in words."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor in the order in which reading is cheapest."""

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with raw bits of elements ``start:start+len(out)`` (of bytes, for tensors
        that are not float).
        """

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files by name."""

    def metrics(self) -> dict[str, float]:
        """What the trainer logged for this step (reward, learning_rate, ...); empty if nothing was
        found.
        """

    def close(self) -> None:
        """Release files."""


@runtime_checkable
class ChangingCheckpoint(Checkpoint, Protocol):
    """A checkpoint that knows what changed since an earlier step, so that nobody has to compare."""

    @property
    def since(self) -> int | None:
        """The step (0 for the base) that changes count from; None if that is no step of the run."""

    def changed(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending elements ``int64 [n]`` of a tensor whose bits differ from ``since``, their bits
        then and now.
        """


class Run(Protocol):
    """A folder of checkpoints."""

    description: str
    """Format and folder, as kept in a store."""
    steps: list[int]
    """Optimizer steps in ascending order, each once."""
    notes: list[str]
    """What a person should know: the format that was taken, what else lies there."""
    left_out: dict[str, str]
    """Steps that are not whole, and the reasons."""

    def checkpoint(self, step: int) -> Checkpoint:
        """Open the checkpoint of one of ``steps``."""


class SavedRun(Run, Protocol):
    """A run in a folder, or below a URL, that a trainer may still be writing."""

    format: str
    """Name of the format, as for ``open_run``."""

    def folder(self, step: int) -> Path:
        """The local folder of a step, with all that the trainer saved there."""

    def stamp(self, step: int) -> list[tuple[str, int, str]]:
        """Name, size and time of every file of a step; nothing if it goes away meanwhile."""

    def is_marked(self, step: int) -> bool:
        """True if the file that the trainer writes last is there."""


def open_run(
    source: str | Path,
    *,
    source_format: str | None = None,
    step_map: str | None = None,
    kept: TrajectoryStore | None = None,
    scratch: Path | None = None,
) -> SavedRun:
    """A folder of checkpoints in any format that is known; where several lie side by side, the most
    precise one. Of URLs only those of weight-sync versions.

    Args:
        source_format: name of the format to take (``formats.FORMATS``).
        step_map: optimizer steps per label, or a JSON file ``{label: step}``, for folders that are
            not numbered by optimizer steps.
        kept: a store of the run, from whose last step deltas may go on.
        scratch: folder for what has to be unpacked; the system's if not given.

    Reads the headers of every checkpoint.

    Raises:
        CheckpointError: no folder, no steps, none of them whole, or two folders for the same step.
    """
    from relexkit.checkpoints.runs import FolderRun, read_step_map
    from relexkit.checkpoints.version_run import WeightSyncRun, find_versions

    label_step = None if step_map is None else read_step_map(step_map)
    is_url = "://" in str(source)
    if not is_url and not Path(source).is_dir():
        raise CheckpointError(
            f"{source}: no such folder; expected one with a sub-folder for each step"
        )
    if is_url or (source_format in (None, "weight-sync") and find_versions(source)):
        return WeightSyncRun(source, label_step=label_step, kept=kept, scratch=scratch)
    return FolderRun(Path(source), source_format, label_step)


def open_checkpoint(folder: Path, *, source_format: str | None = None) -> Checkpoint:
    """Open a single checkpoint folder (a base model, or the input of ``relexkit round``), the most
    precise one in it.
    """
    from relexkit.checkpoints.runs import best_checkpoint

    return best_checkpoint(folder, source_format)
