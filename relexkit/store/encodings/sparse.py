"""The sparse update log: what a step changed in bits, exact; for 16-bit checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import zarr

from relexkit.store.codecs import LOG_CODECS, ROWS, Grid, create_array, rows_of
from relexkit.store.encodings.bits import (
    Update,
    apply_update,
    changes,
    content_checksum,
    encode_update,
    extend_checksum,
    num_blocks,
)
from relexkit.store.encodings.protocol import STRETCH, Encoding, PartOfStep, Place, Recorded
from relexkit.store.fastpath.arrays import WritableArrays
from relexkit.store.fastpath.chunk_files import RowWriter
from relexkit.store.passes import blocks, stretches
from relexkit.weights.dtypes import bits_dtype
from relexkit.weights.layout import Part

_ENTRY_CHUNK = 2**17
_UNWRITTEN_INDPTR, _UNWRITTEN_GAP = 0xFFFFFFFF, 0xFFFF


class Sparse(Encoding):
    """See ``relexkit.store.encodings.bits`` for what an update is."""

    part_numel = 2**28
    window = 2**24  # the log is thin
    is_log = True

    def create(self, group: zarr.Group, part: int, spec: Part) -> None:
        """Gaps, differences, and the entries before each block."""
        signed = np.dtype(f"int{bits_dtype(spec.dtype).itemsize * 8}")
        entries = rows_of(spec.numel, _ENTRY_CHUNK)
        for leaf, dtype, fill in (("indices", np.uint16, _UNWRITTEN_GAP), ("data", signed, 0)):
            create_array(group, f"updates/{part}/{leaf}", entries, dtype, LOG_CODECS, fill)
        width = num_blocks(spec.numel) + 1
        index = Grid((ROWS, width), (1, width))
        name = f"updates/{part}/indptr"
        create_array(group, name, index, "uint32", fill_value=_UNWRITTEN_INDPTR)

    def arrays(self, part: int) -> tuple[str, ...]:
        """See ``Encoding``."""
        return tuple(f"updates/{part}/{leaf}" for leaf in ("indices", "data", "indptr"))

    def open(self, arrays: WritableArrays, part: int, row: int) -> _UpdateRow:
        """See ``Encoding``; pieces are what ``encode_update`` gives."""
        return _UpdateRow(arrays, part, row)

    def append(self, step: PartOfStep) -> None:
        """See ``Encoding``."""
        known = step.changes()
        if known is not None:
            step.put(*encode_update(*known, step.spec.numel))
            step.finish(step.checksum())
            return
        dtype = step.spec.dtype
        signed = np.dtype(f"int{bits_dtype(dtype).itemsize * 8}")

        def encode(span: tuple[int, int]) -> tuple[list[tuple[np.ndarray, ...]], int]:
            updates: list[tuple[np.ndarray, ...]] = []
            checksum = 0
            for begin, end in stretches(span, STRETCH):
                current, reference = step.weights(begin, end), step.reference(begin, end)
                columns, before, after = changes(reference, current)
                step.refuse_nonfinite(after, begin + columns, dtype)
                step.note(begin, columns, after)
                checksum = extend_checksum(checksum, current)
                differences = (after - before).view(signed)
                updates.append(encode_update(columns, differences, end - begin))
            return updates, checksum

        checksums = []
        for updates, checksum in step.in_order(encode, blocks(step.spec.numel)):
            for update in updates:
                step.put(*update)
            checksums.append(checksum)
        step.finish(content_checksum(checksums))

    def read_state(self, store: Recorded, place: Place) -> np.ndarray:
        """The log replayed up to the row."""
        part, row, begin, end = place
        state = store.read_base(part, begin, end)
        for earlier in range(row + 1):
            _advance(state, store.read_update(part, earlier, begin, end), begin)
        return state

    def contents(self, store: Recorded, part: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """The weights after every step; the same array each time."""
        state = store.read_base(part, begin, end)
        for row in range(len(store.steps)):
            _advance(state, store.read_update(part, row, begin, end), begin)
            yield state

    def touched(self, store: Recorded, part: int) -> bool:
        """Whether there is an entry."""
        return bool(store.entries(part, len(store.steps)).any())


def _advance(state: np.ndarray, update: Update, begin: int) -> None:
    columns, differences = update
    apply_update(state, columns - begin, differences)


class _UpdateRow:
    """One step of the sparse log of a part, in pieces that are compressed as soon as a chunk is
    full.
    """

    def __init__(self, arrays: WritableArrays, part: int, row: int):
        self._arrays, self._row, self._name = arrays, row, f"updates/{part}"
        self._leaves: dict[str, RowWriter] = {}
        self._pieces: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0
        self._counts = [np.zeros(1, np.int64)]

    def append(self, *piece: np.ndarray) -> None:
        """Gaps and differences of the next blocks of columns, and their number in each block."""
        gaps, differences, counts = piece
        self._counts.append(counts)
        if len(gaps):
            self._pieces.append((gaps, differences))
            self._waiting += len(gaps)
        chunk = self._arrays.array(f"{self._name}/data").chunks[-1]
        if self._waiting >= chunk:
            self._write(self._waiting // chunk * chunk)

    def close(self) -> None:
        """Write what is left, and the index of all blocks, which makes the update complete."""
        if self._waiting:
            self._write(self._waiting)
        for leaf in self._leaves.values():
            leaf.close()
        name = f"{self._name}/indptr"
        indptr = np.zeros(self._arrays.array(name).shape[1], np.int64)
        counts = np.concatenate(self._counts)
        indptr[: len(counts)] = counts.cumsum()
        self._arrays.set_row(name, self._row, indptr.astype(np.uint32))

    def discard(self) -> None:
        """Nothing was written."""
        for leaf in self._leaves.values():
            leaf.discard()

    def _write(self, count: int) -> None:
        joined = [np.concatenate(column) for column in zip(*self._pieces, strict=True)]
        for leaf, values in zip(("indices", "data"), joined, strict=True):
            name = f"{self._name}/{leaf}"
            if leaf not in self._leaves:
                self._leaves[leaf] = self._arrays.open_row(name, self._row)
            self._leaves[leaf].append(self._arrays.encode(name, values[:count]))
        self._waiting -= count
        self._pieces = [(joined[0][count:], joined[1][count:])] if self._waiting else []
