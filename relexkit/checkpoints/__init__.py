"""Readers of what trainers write: one module per format behind one small protocol, and detection.

A *run* is a folder with one checkpoint per recorded step; a *checkpoint* is one set of weights. To add a format, write a
module with a function ``detect(folder) -> Run | None`` and add it to ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from relexkit.errors import CheckpointError
from relexkit.safetensors_io import TensorInfo


class Checkpoint(Protocol):
    """One set of weights, readable in pieces."""

    @property
    def description(self) -> str:
        """What this is, in words."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor in the order in which reading is cheapest."""

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with raw bits of elements ``start:start+len(out)`` (of bytes, for tensors that are not float)."""

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files by name."""

    def metrics(self) -> dict[str, float]:
        """What the trainer logged for this step (reward, learning_rate, ...); empty if nothing was found."""

    def close(self) -> None:
        """Release files."""


class Run(Protocol):
    """A folder of checkpoints."""

    description: str
    steps: list[int]
    """Optimizer steps in ascending order, each once."""

    def checkpoint(self, step: int) -> Checkpoint:
        """Open the checkpoint of one of ``steps``."""


def open_run(source: Path) -> Run:
    """Detect the format of a folder of checkpoints.

    Raises:
        CheckpointError: no folder, no format fits, no steps, or two folders for the same step.
    """
    from relexkit.checkpoints import huggingface

    formats = (huggingface.detect,)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; expected one with a sub-folder for each step")
    for detect in formats:
        run = detect(source)
        if run is not None:
            return run
    raise CheckpointError(f"{source}: holds no steps; expected sub-folders named checkpoint-N, global_step_N, step_N or step-N")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a single checkpoint folder (a base model, or the input of ``relexkit round``)."""
    from relexkit.checkpoints.huggingface import HuggingFaceCheckpoint

    return HuggingFaceCheckpoint(folder)
