"""A checkpoint seen with other names or further metrics, and a run whose checkpoints are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from relexkit.checkpoints.protocol import Checkpoint, Run, WholeTensors
from relexkit.weights.safetensors_io import TensorInfo


class CheckpointView(WholeTensors):
    """``checkpoint`` with further metrics, and with the tensors that ``stored`` names.

    Args:
        stored: name -> name in the checkpoint, in the order of reading; None for all, unchanged.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        metrics: Mapping[str, float] | None = None,
        stored: Mapping[str, str] | None = None,
    ):
        self.inner = checkpoint
        self.further = dict(metrics or {})
        self._stored = stored
        self.description = checkpoint.description
        self.tensors: Mapping[str, TensorInfo] = checkpoint.tensors
        if stored is not None:
            self.tensors = {name: checkpoint.tensors[inner] for name, inner in stored.items()}

    @property
    def adapter(self) -> Any:
        """The adapter that this is a view of."""
        return self.inner.adapter

    def place(self, name: str) -> tuple[str, int]:
        """The tensor of ``inner`` that ``name`` lies in, and its first element there."""
        return name if self._stored is None else self._stored[name], 0

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``relexkit.checkpoints.Checkpoint``."""
        inside, first = self.place(name)
        self.inner.read_into(inside, first + start, out)

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files by name."""
        return self.inner.files()

    def metrics(self) -> dict[str, float]:
        """What the trainer logged, and the further metrics."""
        return {**self.inner.metrics(), **self.further}

    def close(self) -> None:
        """Close the checkpoint."""
        self.inner.close()


class RunView:
    """A run whose checkpoints are seen through ``view``; see ``relexkit.checkpoints.Run``."""

    def __init__(self, run: Run, view: Callable[[Checkpoint], Checkpoint]):
        self._run, self._view = run, view
        self.description, self.steps, self.notes, self.left_out = (
            run.description,
            run.steps,
            run.notes,
            run.left_out,
        )

    def checkpoint(self, step: int) -> Checkpoint:
        """Open one step."""
        return self._view(self._run.checkpoint(step))
