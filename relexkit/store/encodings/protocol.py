"""What an encoding is: all that depends on how the steps of a part are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import zarr

from relexkit.store.encodings.bits import Update
from relexkit.store.fastpath.arrays import WritableArrays
from relexkit.weights.dtypes import to_float32
from relexkit.weights.layout import Layout, Part

_S = TypeVar("_S")
_T = TypeVar("_T")

ROW_CHUNK = 2**15
"""A pass holds all steps of a chunk at once: 128 MiB of float32 for 1000 steps."""


STRETCH = 2**20
"""Elements of a step that are read and differenced at a time, so that they stay in cache: a chunk
of the base.
"""


class Place(NamedTuple):
    """Columns ``begin:end`` of a part at one recorded step, by its row; -1 for the base."""

    part: int
    row: int
    begin: int
    end: int


class Recorded(Protocol):
    """What an encoding reads from: a ``TrajectoryStore``."""

    layout: Layout
    steps: np.ndarray

    @property
    def mantissa_bits(self) -> int | None:
        """Of rounded deltas."""

    def read_base(self, part: int, begin: int, end: int) -> np.ndarray:
        """Bits of the base."""

    def read_array(self, name: str, place: Place, out: np.ndarray | None = None) -> np.ndarray:
        """A stretch of the step's row of an array ``[T, n]``; an error names step and tensor."""

    def read_update(self, part: int, row: int, begin: int, end: int) -> Update:
        """Entries of the sparse log."""

    def entries(self, part: int, num_rows: int) -> np.ndarray:
        """Entries of the sparse log in each block over the first steps."""


class PartOfStep(Protocol):
    """One part of a step that is being recorded: its weights, what they count from, and where they
    go. ``weights`` and ``reference`` may be asked for on any thread.
    """

    part: int
    spec: Part
    arrays: WritableArrays
    mantissa_bits: int | None

    def weights(self, begin: int, end: int) -> np.ndarray:
        """Bits of the step, in a buffer of the thread's own that is good until its next call."""

    def reference(self, begin: int, end: int) -> np.ndarray:
        """Bits of the base; of a log, of the step before."""

    def changes(self) -> Update | None:
        """Of a log: the update, where it is known without comparing; else None."""

    def note(self, begin: int, columns: np.ndarray, after: np.ndarray) -> None:
        """Of a log: what a worker has found to differ, columns counted from ``begin``."""

    def factor_bits(self) -> np.ndarray:
        """The factors of the part's tensor, flat."""

    def refuse_nonfinite(
        self, bits: np.ndarray, columns: Sequence[int] | np.ndarray, dtype: str
    ) -> None:
        """Refuse a value that is not finite; ``columns`` say where ``bits`` lie in the part."""

    def name(self, column: int) -> str:
        """Step and tensor at a column, as messages begin."""

    def sketch(self, begin: int, delta: np.ndarray) -> np.ndarray | None:
        """The sketch of float32 deltas, if one is wanted; goes to ``add_sketch`` in order."""

    def add_sketch(self, sketch: np.ndarray | None) -> None:
        """Add what ``sketch`` gave."""

    def in_order(self, work: Callable[[_S], _T], spans: Iterable[_S]) -> Iterator[_T]:
        """Results of the workers, in the order of ``spans``."""

    def put(self, *piece: Any) -> None:
        """Let the background give a piece to the encoding's ``PartRow``."""

    def finish(self, checksum: int) -> None:
        """The part is complete; ``checksum`` is that of its content."""

    def checksum(self) -> int:
        """Of all weights of the part, read once."""


class PartRow(Protocol):
    """Writes what one step keeps of one part."""

    def append(self, *piece: Any) -> None:
        """Write the next piece, as ``PartOfStep.put`` took it."""

    def close(self) -> None:
        """Complete it."""

    def discard(self) -> None:
        """Give it up."""


class Encoding(ABC):
    """How the steps of a part are kept. Its name stands in the layout of a store.

    Attributes:
        part_numel: largest part, in elements.
        window: columns that a pass takes at a time.
        moves: whether there are steps at all.
        exact: whether they come back bit for bit.
        is_log: whether a step is kept as its update of the step before, as ``read_update`` gives
            it, so that what moves little costs little.
        needs_base: whether ``read_delta`` looks at the base.
        format_version: the first one that has it.
    """

    part_numel: int = 2**25  # an upper bound on what is compressed in one piece in memory
    window: int = 2**22
    moves: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    is_log: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True
    format_version: ClassVar[int] = 1

    @abstractmethod
    def create(self, group: zarr.Group, part: int, spec: Part) -> None:
        """Create the arrays of a part, with no step in them."""

    @abstractmethod
    def arrays(self, part: int) -> tuple[str, ...]:
        """Names of the arrays that have a row for every step."""

    @abstractmethod
    def append(self, step: PartOfStep) -> None:
        """Record a step: read, difference, compress, ``put`` and ``finish``."""

    @abstractmethod
    def open(self, arrays: WritableArrays, part: int, row: int) -> PartRow:
        """Begin to write a step."""

    @abstractmethod
    def read_state(self, store: Recorded, place: Place) -> np.ndarray:
        """Bits of the recorded weights."""

    def read_delta(
        self, store: Recorded, place: Place, base: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Float32 delta from the base, whose bits are ``base``; in ``out`` if given."""
        dtype = store.layout.parts[place.part].dtype
        state = self.read_state(store, place)
        return np.subtract(to_float32(state, dtype), to_float32(base, dtype), out=out)

    def contents(self, store: Recorded, part: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """What the content checksums of a part are taken of, in columns ``begin:end``, step by
        step.
        """
        for row in range(len(store.steps)):
            yield self.read_state(store, Place(part, row, begin, end))

    def equals(
        self, store: Recorded, place: Place, weights: np.ndarray, state: np.ndarray | None = None
    ) -> bool:
        """Whether the recorded step equals ``weights`` (bits), to the precision of the encoding.

        Args:
            state: of a log, the bits there, if the caller has replayed it.
        """
        return np.array_equal(self.read_state(store, place) if state is None else state, weights)

    def touched(self, store: Recorded, part: int) -> bool:
        """False if it can be told from indices that no step moved the part."""
        return True

    def chunk(self, spec: Part) -> int:
        """Columns that are compressed together: reading fewer decodes as many."""
        return min(ROW_CHUNK, max(1, spec.numel))
