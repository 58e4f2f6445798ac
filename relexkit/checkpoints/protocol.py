"""What every reader gives: a checkpoint that is read in pieces, and a run of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

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
