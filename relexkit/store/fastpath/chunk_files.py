"""Whole chunks and shards written to a local disk, past Zarr's pipeline, in files that equal
Zarr's.

Zarr takes milliseconds for every array and every inner chunk that it writes, and holds a shard in
memory until it is complete. A recorder writes about twenty small arrays and thousands of inner
chunks after every optimizer step, so they come here: chunks are encoded one by one, on any thread,
and go straight into the shard's file. `tests/store/test_chunk_files.py` checks that the files equal
Zarr's byte for byte; arrays in other stores or with other codecs go through Zarr.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from relexkit.store import durable
from relexkit.store.fastpath.local import unflushed_of
from relexkit.store.fastpath.shards import MISSING, sharding_of

_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}

Encoded = list[Any]
"""Consecutive chunks of a row, ready to be appended."""


class RowWriter(Protocol):
    """Writes one row of an array, chunk after chunk."""

    def append(self, chunks: Encoded) -> None:
        """Write encoded chunks, in order."""

    def close(self) -> None:
        """Complete the row, if anything was appended; until then it does not exist."""

    def discard(self) -> None:
        """Give the row up."""


class ChunkFiles:
    """The files of one array of one or two dimensions whose chunks (or shards) are cut along the
    last axis.
    """

    def __init__(self, folder: Path, array: zarr.Array, codec: BloscCodec):
        self._folder, self._array = folder, array
        self._unflushed = unflushed_of(array.store_path.store)
        self._sharded = array.shards is not None
        self.chunk = array.chunks[-1]
        self._file_numel = array.shards[-1] if array.shards is not None else self.chunk
        self._name, self._level, self._shuffle = (
            codec.cname.value.encode(),
            codec.clevel,
            _SHUFFLES[codec.shuffle.value],
        )

    def encode(self, values: np.ndarray) -> list[bytes]:
        """Chunks of ``values``, compressed, each with its CRC-32C; the last one is filled up with
        the fill value.
        """
        encoded = []
        for begin in range(0, len(values), self.chunk):
            piece = values[begin : begin + self.chunk]
            if len(piece) < self.chunk:
                whole = np.full(self.chunk, self._array.fill_value, self._array.dtype)
                whole[: len(piece)] = piece
                piece = whole
            content = blosc.compress(
                np.ascontiguousarray(piece), self._name, self._level, self._shuffle
            )
            encoded.append(content + google_crc32c.value(content).to_bytes(4, "little"))
        return encoded

    def write(self, place: tuple[int, ...], values: np.ndarray) -> None:
        """Replace the chunk at ``place`` in the grid of an array without shards, at once."""
        assert not self._sharded
        [content] = self.encode(values)
        durable.write_file(self._path(place), content, self._unflushed)

    def open_row(self, row: int) -> RowWriter:
        """Begin a row that lies in one shard; what is not appended stays unwritten."""
        assert self._array.shape[-1] <= self._file_numel
        return self.open_shard((row, 0))

    def open_shard(self, place: tuple[int, ...]) -> RowWriter:
        """Begin the shard at ``place`` in the grid; what is not appended stays unwritten."""
        assert self._sharded
        return _ShardRow(self._path(place), self._file_numel // self.chunk, self._unflushed)

    def _path(self, place: tuple[int, ...]) -> Path:
        return self._folder.joinpath("c", *map(str, place))


class _ShardRow:
    """A shard that grows in a temporary file; its index comes last, then it takes its name. What
    failed once stays failed.
    """

    def __init__(self, path: Path, count: int, unflushed: durable.Unflushed | None):
        self._path, self._count, self._unflushed = path, count, unflushed
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._lengths: list[int] = []
        self._failure: OSError | None = None

    def append(self, chunks: Encoded) -> None:
        with self._giving_up():
            if self._file is None:
                self._file = self._stack.enter_context(
                    durable.replacing(self._path, self._unflushed)
                )
            self._lengths += map(len, chunks)
            durable.write(self._file, b"".join(chunks))

    def close(self) -> None:
        if self._file is None and self._failure is None:
            return
        lengths, places = np.array(self._lengths, "<u8"), np.full((self._count, 2), MISSING)
        places[: len(lengths)] = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
        index = places.astype("<u8").tobytes()
        with self._giving_up():
            assert self._file is not None
            durable.write(self._file, index + google_crc32c.value(index).to_bytes(4, "little"))
            self._stack.close()

    def discard(self) -> None:
        failure = OSError("the row was given up")
        with contextlib.suppress(OSError):
            self._stack.__exit__(OSError, failure, None)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as failure:
            self._failure = failure
            self.discard()
            raise


class ZarrRow:
    """A row of any array, through Zarr; in memory until it is complete."""

    def __init__(self, array: zarr.Array, row: int):
        self._array, self._row = array, row
        self._pieces: list[np.ndarray] = []

    def append(self, chunks: Encoded) -> None:
        """Keep them."""
        self._pieces += chunks

    def close(self) -> None:
        """Write the row."""
        if self._pieces:
            values = np.concatenate(self._pieces)
            self._array[self._row, : len(values)] = values

    def discard(self) -> None:
        """Nothing was written."""


def chunk_files(array: zarr.Array) -> ChunkFiles | None:
    """Direct writing for ``array``, or None if it is not local or not encoded as relexkit writes
    it.
    """
    store = array.store_path.store
    if not isinstance(store, LocalStore) or array.dtype.byteorder == ">":
        return None
    if array.shards is not None:
        sharding = sharding_of(array)
        codecs: Iterable[Any] = () if sharding is None else sharding.codecs
    else:
        codecs = getattr(array.metadata, "codecs", ())
    chain = list(codecs)
    if list(map(type, chain)) != [BytesCodec, BloscCodec, Crc32cCodec]:
        return None
    return ChunkFiles(Path(store.root) / array.store_path.path, array, chain[1])
