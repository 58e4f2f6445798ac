"""What predictions add to the base: ``M^T a`` in a window of columns.

From dense rows it is a weighted sum of rows; from the sparse log, with ``E`` the values of the
updates, ``M^T a = E^T (L^T a)``: a sum over the log with the suffix sums of ``a``, at the columns
that it touches.

Shape suffixes: P predictions, D directions, N moving tensors, S segments of a window, T steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from relexkit.gram_matrix.factors import FactorSums
from relexkit.store import TrajectoryStore, column_windows, stretches
from relexkit.store.encodings.bits import BLOCK, Update, clip_update, num_blocks
from relexkit.weights.dtypes import to_float32
from relexkit.weights.layout import Segment

_PIECE = 2**16  # columns whose arithmetic stays in a core's own cache
_ENTRIES = 2**18  # of the log that a thread sums at a time: some 30 MB

Updates = list[Update] | FactorSums | None
"""The log of a stretch of columns, the products of factors, or None for dense rows."""

Columns = slice | np.ndarray
"""All columns of a piece, or some, ascending."""

ALL = slice(None)


class Directions:
    """``weights [P, N, T]`` as directions times scales: predictions that differ by a factor in
    every tensor, as the targets on one line do, share a direction.

    A direction is divided by its largest weight and rounded to float32, so that it does not depend
    on what else is predicted.

    Attributes:
        directions: float32 ``[D, N, T]``.
        which, scales: ``[P]`` and float64 ``[P, N]``.
    """

    def __init__(self, weights: np.ndarray):
        largest = np.abs(weights).argmax(axis=2)[:, :, None]
        scales = np.take_along_axis(weights, largest, axis=2)
        directions = np.zeros(weights.shape)
        np.divide(weights, scales, out=directions, where=scales != 0)
        known: dict[bytes, int] = {}
        self.scales = scales[:, :, 0]
        directions = directions.astype(np.float32)
        self.which = [known.setdefault(one.tobytes(), len(known)) for one in directions]
        self.directions = np.stack([directions[self.which.index(d)] for d in range(len(known))])

    def targets(self, row: int) -> Iterator[tuple[int, float]]:
        """For each prediction its direction, and its scale in a tensor."""
        return zip(self.which, self.scales[:, row].tolist(), strict=True)


class Window:
    """Columns ``begin:end`` of a part, with the bits of their base."""

    def __init__(self, store: TrajectoryStore, part: int, begin: int, end: int):
        self.part, self.begin, self.end = part, begin, end
        self.segments = store.layout.segments_in(part, begin, end)
        self.dtype = store.layout.parts[part].dtype
        self.base = store.read_base(part, begin, end)


@dataclass(frozen=True)
class Piece:
    """A stretch of one tensor in a window, and what moves in it.

    Attributes:
        bits: of its base.
        at: the columns that move.
        sums: float32 ``[D, n]``, what each direction adds there.
    """

    segment: Segment
    bits: np.ndarray
    at: Columns
    sums: np.ndarray

    def values(self, direction: int, scale: float, *, onto_base: bool) -> np.ndarray:
        """``M^T a`` at ``at`` in float32, added to the base or alone; a -0.0 that does not move
        stays one.
        """
        total = self.sums[direction]
        with np.errstate(over="ignore"):  # what is rounded is checked, and named
            values = total * np.float32(scale)
            if onto_base:
                values += self._base
        if onto_base and len(self._minus_zeros):
            values[self._minus_zeros[total[self._minus_zeros] == 0]] = -0.0
        return values

    def filled(self, moved: np.ndarray, whole: np.ndarray | None) -> np.ndarray:
        """``moved`` at ``at``, the rest from ``whole``, which is written to; zeros if None."""
        if isinstance(self.at, slice):
            return moved
        if whole is None:
            whole = np.zeros(len(self.bits), moved.dtype)
        whole[self.at] = moved
        return whole

    @cached_property
    def _base(self) -> np.ndarray:
        return to_float32(self.bits[self.at], self.segment.tensor.dtype)

    @cached_property
    def _minus_zeros(self) -> np.ndarray:
        return np.flatnonzero(self._base.view(np.uint32) == np.uint32(1 << 31))


def windows(
    store: TrajectoryStore, part: int, span: tuple[int, int], updates: Updates, most: int
) -> Iterator[tuple[int, int]]:
    """Consecutive windows over ``span``, of at most so many columns, and of few entries of a
    log.
    """
    begin, end = span
    if not isinstance(updates, list):
        yield from stretches(span, most)
        return
    entries = store.entries(part, len(updates))[begin // BLOCK : num_blocks(end)]
    for low, high in column_windows(entries, end - begin, _ENTRIES, most):
        yield begin + low, begin + high


def pieces(
    store: TrajectoryStore, window: Window, updates: Updates, directions_DST: np.ndarray
) -> Iterator[Piece]:
    """All pieces of a window: whole segments of a log, else stretches that fit a core's cache."""
    if isinstance(updates, list):
        columns, sums = _log_sums(window, updates, directions_DST)
        for segment in window.segments:
            low = segment.offset - window.begin
            high = low + segment.numel
            first, last = np.searchsorted(columns, [low, high])
            at = columns[first:last].astype(np.intp) - low  # NumPy takes half the time with these
            yield Piece(segment, window.base[low:high], at, sums[:, first:last])
        return
    if updates is None:
        sums = _row_sums(store, window, directions_DST)
    else:
        sums = updates.columns(window.begin, window.end)
    for segment in window.segments:
        for begin, end in stretches((0, segment.numel), _PIECE):
            part = replace(
                segment,
                offset=segment.offset + begin,
                start=segment.start + begin,
                numel=end - begin,
            )
            here = slice(part.offset - window.begin, part.offset - window.begin + part.numel)
            yield Piece(part, window.base[here], ALL, sums[:, here])


def _row_sums(store: TrajectoryStore, window: Window, directions_DST: np.ndarray) -> np.ndarray:
    """``M^T a`` from dense rows, float32 ``[D, n]``."""
    sums = np.zeros((len(directions_DST), window.end - window.begin), np.float32)
    product = np.empty(_PIECE, np.float32)
    for row in np.flatnonzero(directions_DST.any(axis=(0, 1))):
        delta = store.read_delta(window.part, int(row), window.begin, window.end, window.base)
        for index, segment in enumerate(window.segments):
            low = segment.offset - window.begin
            for begin, end in stretches((low, low + segment.numel), _PIECE):
                for total, weights in zip(sums, directions_DST[:, index, row], strict=True):
                    term = np.multiply(delta[begin:end], weights, out=product[: end - begin])
                    total[begin:end] += term
    return sums


def _log_sums(
    window: Window, updates: list[Update], directions_DST: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Columns that the log touches, ascending ``[n]``, and ``M^T a`` there, float32 ``[D, n]``.

    Entries are added in the order of the steps, however many steps are taken at a time.
    """
    suffix = directions_DST[:, :, ::-1].cumsum(axis=2, dtype=np.float64)[:, :, ::-1]
    num_steps = suffix.shape[2]
    flat = suffix.reshape(len(suffix), -1)
    edges = np.array([s.offset - window.begin for s in window.segments])
    clipped = [clip_update(update, window.begin, window.end) for update in updates]
    state = window.base.copy()
    columns, sums = np.empty(0, np.int32), np.zeros((len(flat), 0))
    for first, last in _groups([len(c) for c, _ in clipped]):
        # what earlier steps have added comes first in each column, as an entry of no difference
        taken = [(columns, np.zeros(len(columns), state.dtype)), *clipped[first:last]]
        counts = [len(c) for c, _ in taken]
        order = np.argsort(np.concatenate([c for c, _ in taken]), kind="stable")
        entries = np.concatenate([c for c, _ in taken])[order]
        if not len(entries):
            continue
        differences = np.concatenate([d.view(state.dtype) for _, d in taken])[order]
        fresh = np.ones(len(entries), bool)
        np.not_equal(entries[1:], entries[:-1], out=fresh[1:])
        starts = np.flatnonzero(fresh)
        columns, place = entries[starts], np.cumsum(fresh) - 1
        after = _running(differences, starts, state[columns])
        values = to_float32(after, window.dtype) - to_float32(after - differences, window.dtype)
        weight = np.repeat(np.arange(first - 1, last), counts)[order]
        if len(edges) > 1:
            weight += (num_steps * (np.searchsorted(edges, columns, side="right") - 1))[place]
        carried, added = np.flatnonzero(order < counts[0]), []
        for weights, total in zip(flat, sums, strict=True):
            terms = weights[weight] * values
            terms[carried] = total
            added.append(np.bincount(place, terms, len(columns)))
        sums = np.stack(added)
        state[columns] = after[np.append(starts[1:], len(entries)) - 1]
    return columns, sums.astype(np.float32)


def _groups(counts: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ``(first, last)`` updates with at most ``_ENTRIES`` entries, or one update."""
    first, filled = 0, 0
    for row, count in enumerate(counts):
        if row > first and filled + count > _ENTRIES:
            yield first, row
            first, filled = row, 0
        filled += count
    if counts:
        yield first, len(counts)


def _running(differences: np.ndarray, starts: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Bits after each entry, of columns whose entries begin at ``starts`` and their bits with
    ``before``; modulo the width.
    """
    summed = np.cumsum(differences, dtype=differences.dtype)
    shift = before - (summed[starts] - differences[starts])
    steps = differences.copy()
    steps[starts] += np.diff(shift, prepend=shift.dtype.type(0))
    return np.cumsum(steps, dtype=steps.dtype)
