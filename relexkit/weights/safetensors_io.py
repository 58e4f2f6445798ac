"""Safetensors files read and written a block at a time.

The ``safetensors`` package hands out whole tensors and writes whole files from memory. Importing
and materialising need raw bits of any element range, into buffers that are reused, and a writer
whose memory does not grow with the model. The format is https://huggingface.co/docs/safetensors: a
64-bit little-endian header length, a JSON header, the data.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from relexkit.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

_DTYPES = {
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
_CODES = {name: code for code, (name, _) in _DTYPES.items()}
ITEM_BYTES = dict(_DTYPES.values())


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (``float32``, ``bfloat16``, ``int64``, ...) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return self.numel * ITEM_BYTES[self.dtype]


class SafetensorsFile:
    """One open file. The header is checked against the file's size before anything is read.

    Attributes:
        metadata: what the header holds beside the tensors.

    Raises:
        CheckpointError: the file is truncated, its header is not valid, or a tensor's bytes lie
            outside the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._begin: dict[str, int] = {}
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise CheckpointError(f"{path}: is not a file; expected safetensors weights")
            self._parse_header()
        except BaseException:
            self.close()
            raise

    def _parse_header(self) -> None:
        size = os.fstat(self._fd).st_size
        prefix = os.pread(self._fd, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path}: is truncated or not a safetensors file ({size} bytes); write or"
                " download it again"
            )
        try:
            header = json.loads(os.pread(self._fd, length, 8))
            self.metadata = header.pop("__metadata__", {})
            if not isinstance(self.metadata, dict):
                raise ValueError("__metadata__ is not a dictionary")
            for name, entry in header.items():
                self._add(name, entry, size - 8 - length, 8 + length)
            ranges = sorted(
                (self._begin[name], info.num_bytes, name) for name, info in self.tensors.items()
            )
            for (begin, count, first), (following, _, second) in pairwise(ranges):
                if count and begin + count > following:
                    raise ValueError(f"tensors {first!r} and {second!r} overlap")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path}: the header is not valid ({error}); write or download it again"
            ) from None

    def _add(self, name: str, entry: dict, data_bytes: int, data_start: int) -> None:
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {entry['dtype']!r}; expected one of"
                f" {', '.join(_DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        if {type(number) for number in (begin, end, *entry["shape"])} != {int}:
            raise ValueError(f"tensor {name!r} has a shape or an offset that is not a whole number")
        info = TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]][0])
        if min((begin, *info.shape)) < 0 or end - begin != info.num_bytes:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(info.shape)} and dtype {info.dtype}"
                f" claims bytes {begin}:{end}; the header is damaged: write or download the file"
                " again"
            )
        if end > data_bytes:
            raise CheckpointError(
                f"{self.path}: is truncated: tensor {name!r} ends at byte {end} of the data but the"
                f" file holds {data_bytes}; write or download it again"
            )
        self.tensors[name] = info
        self._begin[name] = data_start + begin

    def offset(self, name: str) -> int:
        """Position of a tensor's first byte in the file; sorting by it gives the order of
        reading.
        """
        return self._begin[name]

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with the raw bits of elements ``start:start+len(out)``. Thread-safe;
        allocates nothing.

        ``out`` is contiguous, of the unsigned type that carries the tensor's dtype (for other
        dtypes ``uint8``, and then ``start`` and the length count bytes).
        """
        view = out.data.cast("B")
        position = self._begin[name] + start * out.itemsize
        while view:
            count = os.preadv(self._fd, [view], position)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends inside tensor {name!r}; write or download it again"
                )
            view, position = view[count:], position + count

    def close(self) -> None:
        """Close the file; it is not used afterwards."""
        os.close(self._fd)


class SafetensorsFolderWriter:
    """Writes ``model.safetensors`` (or shards and their index) with known tensors, elements in any
    order.

    Sizes are known beforehand, so every tensor has its place from the start and memory is one
    block. Files are complete after ``close()``; the caller writes into a temporary folder and
    renames it.

    Args:
        tensors: name -> shape and dtype, in the order of the files.
        max_shard_bytes: a file is closed before it would grow past this (one larger tensor makes a
            larger file).
        stem: of the files' names.
        metadata: further entries of the files' headers.
        share: ``(rank, size)`` of one of several processes that write the folder, each its own
            files, of which there are then as many at least; the first one also writes the index.

    Attributes:
        names: of the tensors in the files that this process writes.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        max_shard_bytes: int = 5_000_000_000,
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        rank, size = share
        shards: list[dict[str, TensorInfo]] = [{}]
        filled, num_bytes = 0, sum(info.num_bytes for info in tensors.values())
        max_shard_bytes = min(max_shard_bytes, -(-num_bytes // size))
        for name, info in tensors.items():
            if filled and filled + info.num_bytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = info
            filled += info.num_bytes
        total = len(shards)
        names = [f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        if total == 1:
            names = [f"{stem}.safetensors"]
        self._place: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        self._data_start: list[int] = []
        self._metadata = {"format": "pt", **(metadata or {})}
        try:
            for file_name, shard in zip(names[rank::size], shards[rank::size], strict=True):
                self._create(folder / file_name, shard)
        except BaseException:
            self.close()
            raise
        self.names = self._place.keys()
        if total > 1 and rank == 0:
            weight_map = {
                name: file_name
                for file_name, shard in zip(names, shards, strict=True)
                for name in shard
            }
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )

    def _create(self, path: Path, shard: Mapping[str, TensorInfo]) -> None:
        header: dict[str, dict] = {"__metadata__": self._metadata}
        position = 0
        for name, info in shard.items():
            end = position + info.num_bytes
            header[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, end],
            }
            self._place[name] = (len(self._data_start), position)
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + len(encoded)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(fd)
        self._data_start.append(start)
        os.pwrite(fd, struct.pack("<Q", len(encoded)) + encoded, 0)
        if position and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, start + position)  # a full disk shows here, before any work

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        """Write elements ``start:start+len(bits)`` of a tensor (bytes for a tensor that is not
        float). Thread-safe.
        """
        file, begin = self._place[name]
        view = np.ascontiguousarray(bits).data.cast("B")
        position = self._data_start[file] + begin + start * bits.itemsize
        while view:
            count = os.pwrite(self._files[file], view, position)
            view, position = view[count:], position + count

    def flush(self) -> None:
        """Put what was written on the disk."""
        for fd in self._files:
            os.fsync(fd)

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.pop())
