"""The encodings of a step: sparse update log, dense integer differences, dense float deltas.

*Sparse update log* (16-bit checkpoints): the columns of a part whose bits differ from the previous
recorded step, and the integer difference of the bit patterns, modulo the width; exact. Columns are
kept as gaps inside blocks of ``BLOCK`` columns, so that a gap fits 16 bits and a block can be
decoded alone; ``indptr`` counts entries before each block.

*Dense*: a row of float deltas against the base, rounded to a number of mantissa bits, or of integer
  differences of the
bit patterns against the base, which is exact.

*Factors* (low-rank adapters): the two factors of the delta, bit for bit; the delta is ``scale *
left @ right``.
"""

from __future__ import annotations

import google_crc32c
import numpy as np

from relexkit.weights.dtypes import round_to_mantissa_bits, to_float32

BLOCK = 2**16
"""Columns of a block of the sparse log."""

Update = tuple[np.ndarray, np.ndarray]
"""One step of the sparse log: ascending columns ``int32 [n]`` and non-zero bit differences ``[n]``.
"""

CHECKSUM_BLOCK = 2**22
"""Elements of a block of the content checksum, and of a unit of work while encoding."""


def num_blocks(numel: int) -> int:
    """Blocks of the sparse log in a part of ``numel`` columns."""
    return -(-numel // BLOCK)


def changes(previous: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending columns ``int32 [n]`` at which two bit arrays ``[D]`` differ, and the bits there
    before and after.

    Eight bytes are compared at a time; temporaries take a byte for each of these and what differs.
    """
    lanes = 8 // current.itemsize
    whole = len(current) // lanes * lanes
    old, new = previous[:whole].view(np.uint64), current[:whole].view(np.uint64)
    words = np.flatnonzero(old != new)
    before, after = old[words].view(previous.dtype), new[words].view(current.dtype)
    inside = np.flatnonzero(before != after)
    columns = words[inside // lanes] * lanes + inside % lanes
    rest = whole + np.flatnonzero(previous[whole:] != current[whole:])
    return (
        np.concatenate([columns, rest]).astype(np.int32),
        np.concatenate([before[inside], previous[rest]]),
        np.concatenate([after[inside], current[rest]]),
    )


def encode_columns(columns: np.ndarray, numel: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaps ``uint16 [n]`` and ``indptr uint32 [num_blocks + 1]`` of ascending ``columns`` in a part
    of ``numel``.
    """
    block = columns >> 16
    indptr = np.searchsorted(block, np.arange(num_blocks(numel) + 1, dtype=block.dtype)).astype(
        np.uint32
    )
    local = columns & (BLOCK - 1)
    gaps = np.diff(local, prepend=0)
    starts = indptr[:-1][np.diff(indptr) > 0]
    gaps[starts] = local[starts]
    return gaps.astype(np.uint16), indptr


def encode_update(
    columns: np.ndarray, differences: np.ndarray, numel: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaps ``uint16 [n]``, differences ``[n]`` and entries of each block of a stretch of ``numel``
    columns, a multiple of ``BLOCK`` or the last ones; ``columns`` count from its start.
    """
    gaps, indptr = encode_columns(columns, numel)
    return gaps, differences, np.diff(indptr.astype(np.int64))


def decode_columns(gaps: np.ndarray, indptr: np.ndarray, first_block: int = 0) -> np.ndarray:
    """Columns ``int32 [n]`` of the part from gaps of whole blocks (a part has fewer than 2**31
    columns).

    ``indptr`` ``[k + 1]`` belongs to blocks ``first_block`` to ``first_block + k`` and may start at
    any entry number.
    """
    running = np.cumsum(gaps.astype(np.int32), dtype=np.int32)
    entries = indptr.astype(np.int64) - int(indptr[0])
    reached = np.concatenate([[0], running]).astype(np.int32)[entries[:-1]]
    shift = (first_block + np.arange(len(entries) - 1, dtype=np.int32)) * np.int32(BLOCK) - reached
    running += np.repeat(shift, np.diff(entries))
    return running


def apply_update(
    state: np.ndarray, columns: np.ndarray, differences: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move ``state`` (bits) by one update in place; returns the bits before and after at
    ``columns``.
    """
    before = state[columns]
    after = before + differences.view(state.dtype)
    state[columns] = after
    return before, after


def clip_update(update: Update, begin: int, end: int) -> Update:
    """The entries of an update in columns ``begin:end``, columns counted from ``begin``."""
    first, last = np.searchsorted(update[0], np.array([begin, end], np.int32))
    return update[0][first:last] - np.int32(begin), update[1][first:last]


def float_row(base: np.ndarray, current: np.ndarray, dtype: str, mantissa_bits: int) -> np.ndarray:
    """Float32 delta ``[n]`` of two bit arrays, subtracted in float32 and rounded to
    ``mantissa_bits``.
    """
    delta = to_float32(current, dtype) - to_float32(base, dtype)
    return round_to_mantissa_bits(delta, mantissa_bits)


def factor_product(left: np.ndarray, right: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Elements ``begin:end`` of the flattened float32 product ``left [rows, rank] @ right [rank,
    columns]``.
    """
    columns = right.shape[1]
    first, last = begin // columns, -(-end // columns)
    product = left[first:last] @ right
    return product.reshape(-1)[begin - first * columns : end - first * columns]


def content_checksum(blocks: list[int]) -> int:
    """One checksum of several: of a part's content from the CRC-32C of its blocks of
    ``CHECKSUM_BLOCK`` elements.
    """
    return google_crc32c.value(np.asarray(blocks, "<u4").tobytes())


def extend_checksum(checksum: int, bits: np.ndarray) -> int:
    """The CRC-32C ``checksum`` of what comes before, continued over ``bits``; 0 to begin with."""
    frozen = bits.view()
    frozen.flags.writeable = False
    return google_crc32c.extend(checksum, frozen)


def block_checksums(bits: np.ndarray, size: int = CHECKSUM_BLOCK) -> list[int]:
    """CRC-32C of each consecutive block of ``size`` elements of ``bits`` ``[n]``."""
    frozen = bits.view()
    frozen.flags.writeable = False  # the extension takes read-only buffers, and then copies nothing
    starts = range(0, len(frozen), size)
    return [google_crc32c.value(frozen[begin : begin + size]) for begin in starts]
