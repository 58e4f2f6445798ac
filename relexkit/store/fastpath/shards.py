"""Direct reads of Zarr shards, on a local disk or in an object store.

Zarr's own pipeline takes milliseconds for every call and every inner chunk, most of it scheduling,
while decoding a chunk takes a fraction of one. Passes over a store make tens of thousands of small
reads, so they come here: find the chunks in the shard's index, read them in one range, compare
their CRC-32C, decompress them into place. `tests/store/test_shards.py` checks that the results
equal Zarr's; arrays with other codecs go through Zarr.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

MISSING = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not in its shard."""

_BLOSC_HEADER = 16
_CACHED_BYTES = 2**25  # of indices that a reader keeps; committed shards never change


class _Source(Protocol):
    """Byte ranges of the objects of an array."""

    def tail(self, key: str, size: int) -> bytes:
        """The last ``size`` bytes, or fewer if there are no more; FileNotFoundError if there is no
        such object.
        """

    def read(self, key: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""


class _LocalFiles:
    def __init__(self, folder: Path):
        self._folder = str(folder)

    def tail(self, key: str, size: int) -> bytes:
        fd = os.open(f"{self._folder}/{key}", os.O_RDONLY)
        try:
            return os.pread(fd, size, max(0, os.fstat(fd).st_size - size))
        finally:
            os.close(fd)

    def read(self, key: str, offset: int, length: int) -> bytes:
        fd = os.open(f"{self._folder}/{key}", os.O_RDONLY)
        try:
            if offset + length > os.fstat(fd).st_size:  # before memory is taken for it
                raise ValueError("the shard is truncated")
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)


class _StoreObjects:
    """Of any Zarr store: one request a range."""

    def __init__(self, array: zarr.Array):
        self._place, self._prototype = array.store_path, default_buffer_prototype()

    def _get(self, key: str, what: Any) -> bytes:
        buffer = sync((self._place / key).get(self._prototype, what))
        if buffer is None:
            raise FileNotFoundError("a chunk is missing")
        return buffer.to_bytes()

    def tail(self, key: str, size: int) -> bytes:
        return self._get(key, SuffixByteRequest(size))

    def read(self, key: str, offset: int, length: int) -> bytes:
        return self._get(key, RangeByteRequest(offset, offset + length))


class ShardReader:
    """Reads ``[row, begin:end]`` (or ``[begin:end]``) of one array whose shards lie along the last
    axis.

    Thread-safe, and the interpreter lock is free while chunks are decompressed. Memory: the result,
    the compressed chunks of a call in a shard, and 32 MiB of indices.
    """

    def __init__(self, source: _Source, array: zarr.Array):
        self._source = source
        self._dtype = array.dtype
        assert array.shards is not None
        self._chunk, self._shard = array.chunks[-1], array.shards[-1]
        self._indices: dict[str, np.ndarray] = {}

    def read(
        self, row: int | None, begin: int, end: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements ``begin:end`` of a row, of the array's dtype, in ``out`` if that is given.

        Raises:
            FileNotFoundError: the shard does not exist.
            ValueError: the index or a chunk does not match its checksum, or is malformed.
        """
        out = np.empty(end - begin, self._dtype) if out is None else out
        for shard in range(begin // self._shard, -(-end // self._shard)):
            start = shard * self._shard
            low, high = max(begin, start), min(end, start + self._shard)
            key = f"c/{shard}" if row is None else f"c/{row}/{shard}"
            self._read_shard(key, low - start, high - start, out[low - begin : high - begin])
        return out

    def _read_shard(self, key: str, begin: int, end: int, out: np.ndarray) -> None:
        if begin == end:
            return
        first, last = begin // self._chunk, -(-end // self._chunk)
        places = self._index(key)[first:last]
        if (places == MISSING).any():
            raise ValueError("a chunk is missing")  # the store writes chunks of fill values too
        offset = int(places[:, 0].min())
        num_bytes = (
            max(position + length for position, length in places.tolist()) - offset
        )  # a range's chunks lie together
        raw = memoryview(self._source.read(key, offset, num_bytes))
        for chunk, (position, length) in enumerate(places.tolist(), first):
            start = chunk * self._chunk
            low, high = max(begin, start), min(end, start + self._chunk)
            target = out[low - begin : high - begin]
            whole = target if high - low == self._chunk else np.empty(self._chunk, self._dtype)
            _decode(raw[position - offset : position - offset + length], whole)
            if whole is not target:
                target[:] = whole[low - start : high - start]

    def _index(self, key: str) -> np.ndarray:
        """Offset and length of every chunk of a shard, ``uint64 [chunks, 2]``."""
        index = self._indices.get(key)
        if index is None:
            count = self._shard // self._chunk
            raw = self._source.tail(key, 16 * count + 4)
            if len(raw) != 16 * count + 4:
                raise ValueError("the shard is truncated")
            index = np.frombuffer(_checked(raw), "<u8").reshape(count, 2)
            if len(self._indices) * index.nbytes > _CACHED_BYTES:
                self._indices.clear()
            self._indices[key] = index
        return index


def _decode(raw: bytes | memoryview, out: np.ndarray) -> None:
    content = _checked(raw)
    if len(content) < _BLOSC_HEADER or struct.unpack_from("<I", content.data, 4)[0] != out.nbytes:
        raise ValueError("a chunk has the wrong size")
    blosc.decompress(content, out)


def _checked(raw: bytes | memoryview) -> np.ndarray:
    """The bytes before a trailing CRC-32C, as ``uint8 [n]``, if it fits them."""
    content = np.frombuffer(raw, np.uint8)[:-4] if len(raw) >= 4 else np.empty(0, np.uint8)
    if (
        len(raw) < 4
        or google_crc32c.value(content) != struct.unpack_from("<I", raw, len(raw) - 4)[0]
    ):
        raise ValueError("a stored checksum and computed checksum do not match")
    return content


def sharding_of(array: zarr.Array) -> ShardingCodec | None:
    """How ``array`` is sharded, or None if it is not sharded and encoded as relexkit writes it."""
    if array.shards is None or array.dtype.byteorder == ">":
        return None
    codecs: list[Any] = list(getattr(array.metadata, "codecs", ()))
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return None
    codec = codecs[0]
    kinds, index_kinds = [list(map(type, chain)) for chain in (codec.codecs, codec.index_codecs)]
    if kinds != [BytesCodec, BloscCodec, Crc32cCodec] or index_kinds != [BytesCodec, Crc32cCodec]:
        return None
    if codec.index_location.value != "end" or any(size != 1 for size in array.shards[:-1]):
        return None
    return codec


def shard_reader(array: zarr.Array) -> ShardReader | None:
    """A direct reader for ``array``, or None if it is not sharded and encoded as relexkit writes
    it.
    """
    if sharding_of(array) is None:
        return None
    store = array.store_path.store
    if isinstance(store, LocalStore):
        return ShardReader(_LocalFiles(Path(store.root) / array.store_path.path), array)
    return ShardReader(_StoreObjects(array), array)


def read_rows(array: zarr.Array, count: int) -> np.ndarray | None:
    """The first rows of a local array ``[T, n]`` whose rows are a chunk each; None if it is another
    array, or a chunk is damaged or missing: Zarr knows what to say then.
    """
    store = array.store_path.store
    codecs: list[Any] = list(getattr(array.metadata, "codecs", ()))
    if not isinstance(store, LocalStore) or array.dtype.byteorder == ">":
        return None
    if array.ndim != 2 or array.chunks != (1, array.shape[1]) or count > array.shape[0]:
        return None
    if list(map(type, codecs)) != [BytesCodec, BloscCodec, Crc32cCodec]:
        return None
    folder = f"{store.root}/{array.store_path.path}/c"
    out = np.empty((count, array.shape[1]), array.dtype)
    try:
        for row in range(count):
            with open(f"{folder}/{row}/0", "rb", buffering=0) as file:
                _decode(file.read(), out[row])
    except (OSError, ValueError, RuntimeError):
        return None
    return out
