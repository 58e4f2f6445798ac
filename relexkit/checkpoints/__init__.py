"""Readers of what trainers write: one module per format behind one small protocol, and detection.

A *run* is a folder with one checkpoint per recorded step; a *checkpoint* is one set of weights. To
add a format, add a line to the table in ``formats``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from relexkit.errors import CheckpointError
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


def open_run(source: Path, *, source_format: str | None = None, step_map: str | None = None) -> Run:
    """A folder of checkpoints in any format that is known; where several lie side by side, the most
    precise one.

    Args:
        source_format: name of the format to take (``formats.FORMATS``).
        step_map: optimizer steps per label, or a JSON file ``{label: step}``, for folders that are
            not numbered by optimizer steps.

    Reads the headers of every checkpoint.

    Raises:
        CheckpointError: no folder, no steps, none of them whole, or two folders for the same step.
    """
    from relexkit.checkpoints.runs import FolderRun, hub_hint, read_step_map

    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no such folder; expected one with a sub-folder for each"
            f" step{hub_hint(source)}"
        )
    return FolderRun(source, source_format, None if step_map is None else read_step_map(step_map))


def open_checkpoint(folder: Path, *, source_format: str | None = None) -> Checkpoint:
    """Open a single checkpoint folder (a base model, or the input of ``relexkit round``), the most
    precise one in it.
    """
    from relexkit.checkpoints.runs import best_checkpoint

    return best_checkpoint(folder, source_format)
