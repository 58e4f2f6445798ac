"""A checkpoint by the parts and columns of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from relexkit.checkpoints import Checkpoint
from relexkit.errors import CheckpointError
from relexkit.store import TrajectoryStore
from relexkit.store.encodings.bits import apply_update
from relexkit.store.encodings.protocol import Place
from relexkit.weights.columns import read_columns
from relexkit.weights.dtypes import nonfinite_index
from relexkit.weights.layout import Layout
from relexkit.weights.safetensors_io import TensorInfo


@dataclass(frozen=True)
class Columns:
    """The weights of a checkpoint that has the tensors of a layout; ``where`` names it in
    messages.
    """

    checkpoint: Checkpoint
    layout: Layout
    where: str

    def read(self, part: int, begin: int, end: int, out: np.ndarray | None = None) -> np.ndarray:
        """Bits of columns ``begin:end`` of a part, widened to the part's dtype; into ``out`` if
        given.
        """
        return read_columns(self, self.layout, part, begin, end, out)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Those of the checkpoint."""
        return self.checkpoint.tensors

    def content(self, part: int, begin: int, end: int) -> np.ndarray:
        """What a recorded step is compared with: the factors of a part that has some, else
        ``read``.
        """
        if self.layout.parts[part].factors is None:
            return self.read(part, begin, end)
        return self.checkpoint.factor_bits(self.layout.segments_in(part)[0].tensor.name)

    def name(self, part: int, column: int) -> str:
        """Where a column is, as messages begin."""
        [segment, *_] = self.layout.segments_in(part, column)
        return f"{self.where}: tensor {segment.tensor.name!r}"

    def refuse_nonfinite(self, part: int, column: int) -> None:
        """Say which weight is not finite.

        Raises:
            CheckpointError: always.
        """
        start = self.layout.segments_in(part, column)[0].start
        raise CheckpointError(
            f"{self.name(part, column)} is NaN or infinite at element {start}; expected finite"
            " weights: the run diverged or the file is damaged; leave the step out with --steps"
        )

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """That of the checkpoint; errors say where."""
        try:
            self.checkpoint.read_into(name, start, out)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        except OSError as error:
            raise CheckpointError(
                f"{self.where}: tensor {name!r} cannot be read ({error.strerror or error})"
            ) from None


def base_reader(base: Checkpoint, layout: Layout) -> Callable[[int, int, int], np.ndarray]:
    """``(part, begin, end) -> bits`` of the base, widened to the dtype of the steps and checked to
    be finite.
    """
    columns = Columns(base, layout, "the base")

    def read(part: int, begin: int, end: int) -> np.ndarray:
        bits = columns.read(part, begin, end)
        if layout.parts[part].moves:
            bad = nonfinite_index(bits, layout.parts[part].dtype)
            if bad is not None:
                columns.refuse_nonfinite(part, begin + bad)
        return bits

    return read


def equals(
    store: TrajectoryStore, place: Place, columns: Columns, state: np.ndarray | None = None
) -> bool:
    """Whether a recorded step holds what a checkpoint does there, to the store's precision.

    Args:
        state: of a log, the recorded bits, if they are known.
    """
    part, _, begin, end = place
    content = columns.content(part, begin, end)
    return store.encoding(part).equals(store, place, content, state)


class Replay:
    """The weights of chosen spans of the log parts of a store, at one step after the other: a step
    of a log is known only after those before it.

    Args:
        spans: part -> ``(begin, end)``, each beginning at a multiple of ``BLOCK``.
    """

    def __init__(self, store: TrajectoryStore, spans: dict[int, list[tuple[int, int]]]):
        self.store, self.row = store, -1
        self._states = {
            (part, begin): store.read_base(part, begin, end)
            for part, pieces in spans.items()
            if store.encoding(part).is_log
            for begin, end in pieces
        }

    def advance(self, row: int) -> None:
        """Go on to a later step."""
        for (part, begin), state in self._states.items():
            for between in range(self.row + 1, row + 1):
                end = begin + len(state)
                columns, differences = self.store.read_update(part, between, begin, end)
                apply_update(state, columns - begin, differences)
        self.row = row

    def equals(self, part: int, span: tuple[int, int], columns: Columns) -> bool:
        """Whether the step holds what a checkpoint does in one of the spans."""
        begin, end = span
        state = self._states.get((part, begin))
        return equals(self.store, Place(part, self.row, begin, end), columns, state)
