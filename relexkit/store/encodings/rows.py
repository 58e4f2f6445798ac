"""Dense rows: a number for every weight and step, counted from the base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr

from relexkit.store.codecs import DENSE_CODECS, create_array, rows_of
from relexkit.store.encodings.bits import content_checksum, extend_checksum
from relexkit.store.encodings.protocol import (
    ROW_CHUNK,
    STRETCH,
    Encoding,
    PartOfStep,
    Place,
    Recorded,
)
from relexkit.store.fastpath.arrays import WritableArrays
from relexkit.store.fastpath.chunk_files import Encoded, RowWriter
from relexkit.store.passes import blocks, stretches
from relexkit.weights.layout import Part


class Rows(Encoding):
    """What encodings of dense rows share. One of them says which numbers it keeps, how they come
    about and what they mean.
    """

    @abstractmethod
    def stored(self, spec: Part) -> tuple[Any, float]:
        """Dtype of the numbers, and the fill value of what is not written."""

    @abstractmethod
    def encode(
        self, step: PartOfStep, begin: int, current: np.ndarray, base: np.ndarray
    ) -> np.ndarray:
        """Numbers of the columns from ``begin`` on, of bits now and in the base; checked to be
        finite.
        """

    def round(self, step: PartOfStep, begin: int, piece: np.ndarray) -> None:
        """Make a chunk of numbers coarser in place."""

    def create(self, group: zarr.Group, part: int, spec: Part) -> None:
        """One array."""
        dtype, fill = self.stored(spec)
        grid = rows_of(spec.numel, ROW_CHUNK)
        create_array(group, f"deltas/{part}", grid, dtype, DENSE_CODECS, fill)

    def arrays(self, part: int) -> tuple[str, ...]:
        """See ``Encoding``."""
        return (f"deltas/{part}",)

    def open(self, arrays: WritableArrays, part: int, row: int) -> RowWriter:
        """See ``Encoding``; pieces are compressed chunks."""
        return arrays.open_row(f"deltas/{part}", row)

    def append(self, step: PartOfStep) -> None:
        """In stretches that are read, differenced, checked and compressed by the workers and
        written in order.
        """
        name = f"deltas/{step.part}"
        chunk = step.arrays.array(name).chunks[-1]

        def encode(span: tuple[int, int]) -> tuple[Encoded, int, np.ndarray | None]:
            chunks: Encoded = []
            checksum, sketch = 0, None
            for begin, end in stretches(span, STRETCH):
                current, base = step.weights(begin, end), step.reference(begin, end)
                row = self.encode(step, begin, current, base)
                more = self.sketch(step, begin, row)
                sketch = more if sketch is None or more is None else sketch + more
                for low, high in stretches((0, end - begin), chunk):
                    piece = row[low:high]
                    self.round(step, begin + low, piece)
                    checksum = extend_checksum(checksum, piece)
                    chunks += step.arrays.encode(name, piece)
            return chunks, checksum, sketch

        checksums = []
        for chunks, checksum, sketch in step.in_order(encode, blocks(step.spec.numel)):
            step.put(chunks)
            checksums.append(checksum)
            step.add_sketch(sketch)
        step.finish(content_checksum(checksums))

    def sketch(self, step: PartOfStep, begin: int, row: np.ndarray) -> np.ndarray | None:
        """The sketch of numbers that are the deltas themselves; None if they are something else."""
        return None

    def read(self, store: Recorded, place: Place, out: np.ndarray | None = None) -> np.ndarray:
        """The numbers as they are kept."""
        return store.read_array(f"deltas/{place.part}", place, out)

    def contents(self, store: Recorded, part: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """The numbers."""
        for row in range(len(store.steps)):
            yield self.read(store, Place(part, row, begin, end))
