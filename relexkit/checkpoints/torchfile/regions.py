"""Tensors that lie in pieces in files, read by element ranges in bounded memory.

A ``Block`` is an array in one file. A ``PiecewiseTensor`` is a tensor put together from boxes, each
of them one block: the shards of all ranks, the chunks of a distributed checkpoint, or a single
file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from relexkit.checkpoints.protocol import WholeTensors
from relexkit.errors import CheckpointError
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.safetensors_io import ITEM_BYTES, TensorInfo

MAX_DIMENSIONS = 16
_GATHER_ELEMENTS = 2**16
_MAX_UNORDERED_CHUNKS = 4096


class ReadOnlyFile:
    """A regular file, opened anew for every read, so that any number of them costs no descriptors.

    Raises:
        CheckpointError: it is not there, not a regular file, or another file by the time it is
            read.
    """

    def __init__(self, path: Path):
        self.path = path
        descriptor = self._open()
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is not a file; expected part of a checkpoint")
        finally:
            os.close(descriptor)
        self.size = status.st_size
        self._identity = _identity(status)

    def _open(self) -> int:
        try:
            return os.open(
                self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
            )
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened ({error.strerror})") from None
        except ValueError:  # a name with a zero byte or half a surrogate pair
            raise CheckpointError(
                f"{str(self.path)!r}: is not a file name; the description is damaged"
            ) from None

    def read_into(self, position: int, view: memoryview) -> None:
        """Fill ``view`` (bytes) from ``position``. Thread-safe."""
        descriptor = self._open()
        try:
            if _identity(os.fstat(descriptor)) != self._identity:
                raise CheckpointError(
                    f"{self.path}: changed while it was read; wait until the trainer has finished"
                    " writing"
                )
            while view:
                count = os.preadv(descriptor, [view], position)
                if count == 0:
                    raise CheckpointError(f"{self.path}: ends early; write or copy it again")
                view, position = view[count:], position + count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
        finally:
            os.close(descriptor)

    def read(self, position: int, count: int) -> bytes:
        """``count`` bytes from ``position``, or fewer at the end of the file."""
        buffer = bytearray(max(0, min(count, self.size - position)))
        self.read_into(position, memoryview(buffer))
        return bytes(buffer)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Readable(Protocol):
    """An array that can be read in row-major order by element ranges."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each dimension."""

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Elements ``start:start+len(out)``."""

    def as_bytes(self) -> Readable:
        """The same with one more dimension, of the bytes of each element."""


@dataclass(frozen=True, slots=True)
class Block:
    """An array in a file: element ``i`` lies at byte ``position + item_bytes * dot(index,
    stride)``.

    Whoever makes one has checked that every element lies inside the file.
    """

    file: ReadOnlyFile
    position: int
    item_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """True if elements follow one another in row-major order."""
        return self.stride == contiguous_stride(self.shape) or prod(self.shape) < 2

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Elements ``start:start+len(out)`` in row-major order."""
        if self.is_contiguous:
            self.file.read_into(self.position + start * self.item_bytes, out.data.cast("B"))
            return
        for begin in range(0, len(out), _GATHER_ELEMENTS):
            piece = out[begin : begin + _GATHER_ELEMENTS]
            self._gather(start + begin, piece)

    def as_bytes(self) -> Block:
        """The same with one more dimension, of the bytes of each element."""
        stride = (*(s * self.item_bytes for s in self.stride), 1)
        return Block(self.file, self.position, 1, (*self.shape, self.item_bytes), stride)

    def _gather(self, start: int, out: np.ndarray) -> None:
        index = np.unravel_index(np.arange(start, start + len(out)), self.shape)
        places = sum(
            (i * s for i, s in zip(index, self.stride, strict=True)), np.zeros(len(out), np.int64)
        )
        low, high = int(places.min()), int(places.max())
        if high - low < 4 * _GATHER_ELEMENTS:
            window = np.empty(high - low + 1, out.dtype)
            self.file.read_into(self.position + low * self.item_bytes, window.data.cast("B"))
            out[:] = window[places - low]
            return
        mapped = np.memmap(self.file.path, out.dtype, "r", self.position, (high + 1,))
        out[:] = mapped[places]


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major stride of ``shape``, in elements."""
    stride = [1] * len(shape)
    for dimension in range(len(shape) - 2, -1, -1):
        stride[dimension] = stride[dimension + 1] * max(1, shape[dimension + 1])
    return tuple(stride)


@dataclass(frozen=True, slots=True)
class Chunk:
    """``block`` holds the box of a tensor that begins at ``offsets`` and has the block's shape."""

    offsets: tuple[int, ...]
    block: Readable


class PiecewiseTensor:
    """A tensor made of chunks that tile it exactly.

    Args:
        info: shape and dtype of the tensor.
        chunks: boxes of ``grid``.
        grid: the shape that the chunks tile, if not the tensor's own (its flat length for flat
            partitions).

    Raises:
        CheckpointError: the chunks leave a gap, overlap, or lie outside; the message does not name
            the tensor.
    """

    def __init__(
        self, info: TensorInfo, chunks: Sequence[Chunk], grid: tuple[int, ...] | None = None
    ):
        if info.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"has dtype {info.dtype}, which is not supported; leave it out of the checkpoint"
            )
        grid = info.shape if grid is None else grid
        self.info = info
        kept = [chunk for chunk in chunks if prod(chunk.block.shape)]
        _check_tiling(grid, kept)
        if info.dtype not in FLOAT_DTYPES:  # such tensors are read by bytes
            item = ITEM_BYTES[info.dtype]
            grid = (*grid, item)
            kept = [Chunk((*c.offsets, 0), c.block.as_bytes()) for c in kept]
        self._pieces = [_Piece(grid, chunk) for chunk in kept]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with elements (bytes, if not float) ``start:start+len(out)`` of the
        tensor.
        """
        for piece in self._pieces:
            piece.copy(start, out)


class _Piece:
    """One chunk as rows: runs of ``run`` elements that are contiguous both in the tensor and in the
    block.
    """

    def __init__(self, grid: tuple[int, ...], chunk: Chunk):
        shape, offsets = chunk.block.shape, chunk.offsets
        cut = next((d for d in range(len(grid) - 1, -1, -1) if shape[d] != grid[d]), -1)
        inner = prod(grid[cut + 1 :])
        stride = contiguous_stride(grid)
        self._block = chunk.block
        self._run = (shape[cut] if cut >= 0 else 1) * inner
        self._first = sum(o * s for o, s in zip(offsets, stride, strict=True))
        self._last = (
            self._first
            + sum((n - 1) * s for n, s in zip(shape[: max(cut, 0)], stride, strict=False))
            + self._run
        )
        # rows of one more dimension are evenly spaced; the dimensions before are walked one index
        # at a time
        self._rows = shape[cut - 1] if cut >= 1 else 1
        self._spacing = stride[cut - 1] if cut >= 1 else self._run
        self._outer = shape[: cut - 1] if cut >= 2 else ()
        self._outer_stride = stride[: cut - 1] if cut >= 2 else ()

    def copy(self, start: int, out: np.ndarray) -> None:
        stop = start + len(out)
        if stop <= self._first or start >= self._last:
            return
        base = 0
        for index in np.ndindex(self._outer):
            origin = self._first + sum(
                i * s for i, s in zip(index, self._outer_stride, strict=True)
            )
            self._copy_rows(start - origin, out, base)
            base += self._rows * self._run

    def _copy_rows(self, low: int, out: np.ndarray, base: int) -> None:
        """Rows begin at multiples of the spacing; the wanted range begins at ``low``, the block's
        rows at ``base``.
        """
        run, spacing = self._run, self._spacing
        first = max(0, (low - run) // spacing + 1)
        last = min(self._rows, -(-(low + len(out)) // spacing))
        if spacing == run:  # the rows lie next to one another
            begin, end = max(low, 0), min(low + len(out), self._rows * run)
            if begin < end:
                self._block.read_into(base + begin, out[begin - low : end - low])
            return
        if first < last and low > first * spacing:
            self._copy_part(first, low, out, base)
            first += 1
        if first < last and low + len(out) < (last - 1) * spacing + run:
            last -= 1
            self._copy_part(last, low, out, base)
        if first < last:
            packed = np.empty((last - first, run), out.dtype)
            self._block.read_into(base + first * run, packed.reshape(-1))
            begin = first * spacing - low
            bytes_between = (spacing * out.itemsize, out.itemsize)
            np.lib.stride_tricks.as_strided(out[begin:], packed.shape, bytes_between)[:] = packed

    def _copy_part(self, row: int, low: int, out: np.ndarray, base: int) -> None:
        """The wanted part of one row."""
        begin = max(low - row * self._spacing, 0)
        end = min(low + len(out) - row * self._spacing, self._run)
        at = row * self._spacing - low
        self._block.read_into(base + row * self._run + begin, out[at + begin : at + end])


def _check_tiling(grid: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        shape = chunk.block.shape
        if len(shape) != len(grid) or len(chunk.offsets) != len(grid):
            raise CheckpointError(f"a piece has {len(shape)} dimensions; expected {len(grid)}")
        if any(
            o < 0 or o + n > extent for o, n, extent in zip(chunk.offsets, shape, grid, strict=True)
        ):
            raise CheckpointError(
                f"a piece of shape {list(shape)} at {list(chunk.offsets)} lies outside of shape"
                f" {list(grid)}"
            )
    covered = sum(prod(chunk.block.shape) for chunk in chunks)
    if covered != prod(grid):
        raise CheckpointError(
            f"its pieces hold {covered:,} of {prod(grid):,} elements; a piece is missing or saved"
            " twice"
        )
    if len(chunks) < 2:
        return
    begins = np.array([chunk.offsets for chunk in chunks], np.int64)
    ends = begins + np.array([chunk.block.shape for chunk in chunks], np.int64)
    cut = np.flatnonzero(((begins != 0) | (ends != np.array(grid))).any(axis=0))
    if len(cut) == 1:
        order = np.argsort(begins[:, cut[0]])
        overlap = bool((begins[order[1:], cut[0]] < ends[order[:-1], cut[0]]).any())
    elif len(chunks) > _MAX_UNORDERED_CHUNKS:
        raise CheckpointError(
            f"it is cut into {len(chunks):,} pieces along several dimensions; that many are not"
            " supported"
        )
    else:
        overlap = any(
            bool(((begins[:i] < ends[i]) & (begins[i] < ends[:i])).all(axis=1).any())
            for i in range(1, len(chunks))
        )
    if overlap:
        raise CheckpointError("its pieces overlap")


class PiecewiseTensors(WholeTensors):
    """The tensors of a checkpoint by name, as ``relexkit.checkpoints.Checkpoint`` asks for them."""

    def __init__(self, tensors: Mapping[str, PiecewiseTensor]):
        self._tensors = tensors
        self.tensors = {name: tensor.info for name, tensor in tensors.items()}

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with raw bits of elements ``start:start+len(out)`` (bytes, for a tensor that
        is not float).
        """
        try:
            self._tensors[name].read_into(start, out)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {name!r}: {error}") from None
