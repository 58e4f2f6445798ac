"""What every reader gives: a checkpoint that is read in pieces, and a run of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from relexkit.weights.layout import Factors
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

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Tensors of which it holds the change of the base as a product of two factors, and not the
        values: ``factor_bits`` reads them, ``read_into`` does not. Empty for whole weights.
        """

    def factor_bits(self, name: str) -> np.ndarray:
        """Raw bits of the factors of a tensor, ``left`` before ``right``, flat."""

    @property
    def still(self) -> Collection[str]:
        """Float tensors that are known to be the base's."""

    @property
    def adapter(self) -> Any:
        """The adapter that this is, without the base that it is to be seen over; else None."""

    def check_trained(self) -> None:
        """Refuse a step that says by itself that it was not trained.

        Raises:
            CheckpointError: it says so.
        """

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files by name."""

    def metrics(self) -> dict[str, float]:
        """What the trainer logged for this step (reward, learning_rate, ...); empty if nothing was
        found.
        """

    def close(self) -> None:
        """Release files."""


class WholeTensors:
    """The adapter methods of a checkpoint that is not an adapter; the base class of readers."""

    factors: Mapping[str, Factors] = MappingProxyType({})
    still: Collection[str] = frozenset()

    @property
    def adapter(self) -> Any:
        """None."""
        return None

    def factor_bits(self, name: str) -> np.ndarray:
        """There are no factors."""
        raise KeyError(name)

    def check_trained(self) -> None:
        """Whole weights do not say whether they were trained."""


@runtime_checkable
class ChangingCheckpoint(Checkpoint, Protocol):
    """A checkpoint that knows what changed since an earlier step, so that nothing has to be
    compared.
    """

    @property
    def since(self) -> int | None:
        """The step (0 for the base) that changes count from; None if that is not a step
        of the run.
        """

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
