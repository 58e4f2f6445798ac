"""The arrays of a store's group, opened once: past Zarr's pipeline where they allow it, through
Zarr where they do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import zarr
from zarr.storage import LocalStore

from relexkit.errors import StoreError
from relexkit.store.codecs import WRITE_ALL
from relexkit.store.fastpath.chunk_files import (
    ChunkFiles,
    Encoded,
    RowWriter,
    ZarrRow,
    chunk_files,
)
from relexkit.store.fastpath.keys import has_key
from relexkit.store.fastpath.shards import ShardReader, read_rows, shard_reader

_T = TypeVar("_T")


class ReadableArrays:
    """Arrays to read. What is missing or damaged is an error that says where, never a fill
    value.
    """

    def __init__(self, group: zarr.Group, path: str):
        self._group, self._path = group, path
        self._arrays: dict[str, zarr.Array] = {}
        self._readers: dict[str, tuple[ShardReader | None]] = {}

    def forget(self) -> None:
        """Open every array anew: a writer may have replaced what describes them."""
        self._arrays.clear()
        self._readers.clear()

    def version(self, name: str) -> tuple[int, ...] | None:
        """What changes whenever the first chunk of an array ``[T]`` is replaced, from a look at its
        file; None of a store that is not on a local disk.
        """
        store = self._group.store
        if not isinstance(store, LocalStore):
            return None
        try:
            status = os.stat(f"{store.root}/{name}/c/0")
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size

    def array(self, name: str) -> zarr.Array:
        """The array itself.

        Raises:
            StoreError: it is a group. (What Zarr raises of an absent or damaged one goes through.)
        """
        known = self._arrays.get(name)  # once: another thread may forget it meanwhile
        if known is None:
            node = self._group[name]
            if not isinstance(node, zarr.Array):
                raise StoreError(f"{self._path}: {name} is not an array")
            self._arrays[name] = known = node
        return known

    def read(
        self, name: str, row: int | None, begin: int, end: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """``[row, begin:end]``, or ``[begin:end]`` without a row, in ``out`` if given. Errors are
        passed on unchanged.
        """
        known = self._readers.get(name)
        if known is None:
            self._readers[name] = known = (shard_reader(self.array(name)),)
        [reader] = known
        if reader is not None:
            return reader.read(row, begin, end, out)
        array = self.array(
            name
        )  # other codecs: Zarr fills in for missing chunks, so look for the shard first
        shard = array.shards[-1] if array.shards else array.chunks[-1]
        for number in range(begin // shard, -(-end // shard)):
            key = f"{number}" if row is None else f"{row}/{number}"
            if not has_key(self._group, f"{name}/c/{key}"):
                raise FileNotFoundError("a chunk is missing")
        values = np.asarray(array[begin:end] if row is None else array[row, begin:end])
        if out is None:
            return values
        out[:] = values
        return out

    def read_rows(self, where: str, name: str, rows: int | None) -> np.ndarray:
        """The first ``rows`` (None: all) of a small array, which ``where`` names in an error.

        Raises:
            StoreError: it cannot be read.
        """

        def read() -> np.ndarray:
            array = self.array(name)
            if array.ndim == 1:  # rows of the others are known to be missing by their content
                for chunk in range(
                    -(-(array.shape[0] if rows is None else rows) // array.chunks[0])
                ):
                    if not has_key(self._group, f"{name}/c/{chunk}"):
                        raise ValueError("a chunk is missing")
            return self.first_rows(name, rows)

        return self.guard(where, read)

    def first_rows(self, name: str, rows: int | None) -> np.ndarray:
        """The first ``rows`` (None: all) of an array. Errors are passed on unchanged."""
        array = self.array(name)
        direct = None if rows is None else read_rows(array, rows)
        return np.asarray(array[:rows]) if direct is None else direct

    def guard(self, where: str | Callable[[], str], read: Callable[[], _T]) -> _T:
        """What ``read`` returns; an error names the place, which is only then put into words.

        Raises:
            StoreError: ``read`` failed, for whatever reason.
        """
        try:
            return read()
        except StoreError:
            raise
        except Exception as error:  # checksum, decompression, JSON and file errors all arrive here
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            place = where if isinstance(where, str) else where()
            raise StoreError(
                f"{self._path}: {place}: cannot be read ({reason}); restore the store from a copy"
            ) from error


class WritableArrays:
    """Arrays that a step is written to. Errors are those of the file system and of Zarr."""

    def __init__(self, group: zarr.Group):
        self._group = group
        self.forget()

    def forget(self) -> None:
        """Open every array anew: another process may have changed their shape, or this one their
        content.
        """
        self._arrays: dict[str, zarr.Array] = {}
        self._columns: dict[str, np.ndarray] = {}
        self._chunk_files: dict[str, ChunkFiles | None] = {}

    def array(self, name: str) -> zarr.Array:
        """The array itself, through Zarr."""
        arrays = self._arrays
        if name not in arrays:
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            arrays[name] = array.with_config(WRITE_ALL)
        return arrays[name]

    def direct(self, name: str) -> ChunkFiles | None:
        """The files of an array that can be written past Zarr, or None."""
        files = self._chunk_files
        if name not in files:  # workers come here while another thread may begin a step and forget
            files = self._chunk_files | {name: chunk_files(self.array(name))}
            self._chunk_files = files
        return files[name]

    def encode(self, name: str, values: np.ndarray) -> Encoded:
        """Values for ``RowWriter.append``: whole chunks, or the last ones. On any thread."""
        direct = self.direct(name)
        return [values.copy()] if direct is None else direct.encode(values)

    def open_row(self, name: str, row: int) -> RowWriter:
        """Begin a row of a sharded array ``[T, n]`` that comes in pieces."""
        direct = self.direct(name)
        return ZarrRow(self.array(name), row) if direct is None else direct.open_row(row)

    def set_row(self, name: str, row: int, values: np.ndarray) -> None:
        """A row of an array ``[T, n]`` whose rows are one chunk each."""
        direct = self.direct(name)
        if direct is None or direct.chunk != len(values):
            self.array(name)[row, :] = values
        else:
            direct.write((row, 0), values)

    def set_entry(self, name: str, row: int, value: float) -> None:
        """An entry of an array ``[T]``."""
        self.set_entries(name, np.array([row]), np.array([value]))

    def set_entries(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Entries of an array ``[T]``."""
        direct = self.direct(name)
        if direct is None:
            self.array(name).set_coordinate_selection((rows,), values)
            return
        if name not in self._columns:
            self._columns[name] = np.asarray(self.array(name)[:])
        column = self._columns[name]
        column[rows] = values
        for number in np.unique(rows // direct.chunk):
            part = column[number * direct.chunk : (number + 1) * direct.chunk]
            direct.write((int(number),), part)

    def set_chunk(self, name: str, values: np.ndarray) -> None:
        """All of an array ``[n]`` that is one chunk."""
        direct = self.direct(name)
        if direct is None:
            self.array(name)[:] = values
        else:
            direct.write((0,), values)
