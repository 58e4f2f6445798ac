"""Direct reads of Zarr shards on a local disk.

Zarr's own pipeline takes milliseconds for every call and every inner chunk, most of it scheduling, while decoding a
chunk takes a fraction of one. Passes over a store make tens of thousands of small reads, so local ones come here: find
the chunk in the shard's index, read it, compare its CRC-32C, decompress it into place. `tests/test_shards.py` holds the
results equal to Zarr's; everything else (remote stores, other codecs) goes through Zarr.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

_MISSING = np.uint64(2**64 - 1)
_BLOSC_HEADER = 16


class ShardReader:
    """Reads ``[row, begin:end]`` (or ``[begin:end]``) of one array whose shards lie along the last axis.

    Thread-safe, and the interpreter lock is free while chunks are decompressed. Memory: the result and one chunk.
    """

    def __init__(self, folder: Path, array: zarr.Array):
        self._folder = folder
        self._dtype = array.dtype
        assert array.shards is not None
        self._chunk, self._shard = array.chunks[-1], array.shards[-1]

    def read(self, row: int | None, begin: int, end: int, out: np.ndarray | None = None) -> np.ndarray:
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
            self._read_shard(self._folder / key, low - start, high - start, out[low - begin : high - begin])
        return out

    def _read_shard(self, path: Path, begin: int, end: int, out: np.ndarray) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            index = self._read_index(fd)
            for chunk in range(begin // self._chunk, -(-end // self._chunk)):
                start = chunk * self._chunk
                low, high = max(begin, start), min(end, start + self._chunk)
                target = out[low - begin : high - begin]
                offset, length = index[chunk]
                if offset == _MISSING and length == _MISSING:
                    raise ValueError("a chunk is missing")  # the store writes chunks of fill values too
                whole = target if high - low == self._chunk else np.empty(self._chunk, self._dtype)
                self._decode(os.pread(fd, int(length), int(offset)), whole)
                if whole is not target:
                    target[:] = whole[low - start : high - start]
        finally:
            os.close(fd)

    def _read_index(self, fd: int) -> np.ndarray:
        count = self._shard // self._chunk
        size = 16 * count + 4
        position = os.fstat(fd).st_size - size
        raw = os.pread(fd, size, position) if position >= 0 else b""
        if len(raw) != size:
            raise ValueError("the shard is truncated")
        return np.frombuffer(_checked(raw), "<u8").reshape(count, 2)

    def _decode(self, raw: bytes, out: np.ndarray) -> None:
        content = _checked(raw)
        if len(content) < _BLOSC_HEADER or struct.unpack_from("<I", content.data, 4)[0] != out.nbytes:
            raise ValueError("a chunk has the wrong size")
        blosc.decompress(content, out)


def _checked(raw: bytes) -> np.ndarray:
    """The bytes before a trailing CRC-32C, as ``uint8 [n]``, if it fits them."""
    content = np.frombuffer(raw, np.uint8)[:-4] if len(raw) >= 4 else np.empty(0, np.uint8)
    if len(raw) < 4 or google_crc32c.value(content) != struct.unpack_from("<I", raw, len(raw) - 4)[0]:
        raise ValueError("a stored checksum and computed checksum do not match")
    return content


def shard_reader(array: zarr.Array) -> ShardReader | None:
    """A direct reader for ``array``, or None if it is not local or not sharded and encoded as relexkit writes it."""
    store = array.store_path.store
    if not isinstance(store, LocalStore) or array.shards is None or array.dtype.byteorder == ">":
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
    return ShardReader(Path(store.root) / array.store_path.path, array)
