"""One pass over the deltas of a part: dense pieces of rows, in any order of work, go into a product
that is summed.

The product of a piece is a function of ``rows [T, n]``, float32: ``rows rows^T`` for the exact Gram
matrices, ``rows (rows^T Q)`` for the randomized ones. A dense part is read in windows of columns,
all steps of a window at once: while one window is multiplied, the next one is decoded. From the
sparse log only columns that ever change are gathered.

Shape suffixes: S segments of a part, T steps, D columns.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.gram_matrix.compute.device import PIECE, WORKERS, CpuEngine, Engine, Kernel, Pending
from relexkit.store import ProgressCallback, TrajectoryStore, column_windows
from relexkit.store.encodings.bits import BLOCK, Update, apply_update, clip_update, num_blocks
from relexkit.weights.dtypes import bits_dtype, to_float32

Span = tuple[int, int]
"""Columns ``begin:end`` of a part."""

_WORK_BYTES = (
    32  # of an entry in a window of the log: column and place as indices, value, and temporaries
)
_LOG_WINDOW = 2**22  # columns; what is looked up of each stays near the cache
_WINDOW_BYTES = (
    2**25
)  # of decoded rows: enough work to share out, little enough to stay near the cache


@dataclass
class Sums:
    """What a pass over some columns of a part gives for each of its S segments.

    Attributes:
        products: one array ``float64 [S, ...]`` for each that the kernel makes.
        counts: ``int64 [S, 3, T - old]``: weights that changed since the previous step, the change
            in the number of those that differ from the base (sparse) or their number (dense), and
            moves by one unit (0 where unknown).
    """

    products: list[np.ndarray]
    counts: np.ndarray


class Tick(Protocol):
    """Receives the number of columns that are done."""

    def __call__(self, columns: int, /) -> None:
        """Count ``columns`` more as done."""


@dataclass(kw_only=True)
class Pass:
    """One pass over the columns ``spans`` of a part for the first ``num_rows`` steps.

    Args:
        old: steps whose counts (and, if the kernel says so, products) are known already.
        spans: ascending; each begins at a multiple of ``BLOCK`` and ends at one or at the end of
            the part.
        budget: bytes of decoded rows in work, whatever T and D.
    """

    store: TrajectoryStore
    part: int
    kernel: Kernel
    num_rows: int
    old: int = 0
    spans: list[Span]
    budget: int
    engine: Engine = field(default_factory=CpuEngine)
    tick: Tick = lambda columns: None

    def run(self) -> Sums:
        """Read, multiply and sum. Deterministic: sums are made in the order of the columns."""
        self._segments = self.store.layout.segments_in(self.part)
        self._index = {id(s.tensor): i for i, s in enumerate(self._segments)}
        shape = (len(self._segments), 3, self.num_rows - self.old)
        sums = Sums(
            [np.zeros((len(self._segments), *s)) for s in self.kernel.shapes],
            np.zeros(shape, np.int64),
        )
        with single_threaded_blas(), ThreadPoolExecutor(WORKERS) as pool:
            for span in self.spans:
                if self.store.encoding(self.part).is_log:
                    self._sparse(span, sums, pool)
                else:
                    self._dense(span, sums, pool)
        return sums

    # -- dense rows --------------------------------------------------------------------------------

    def _dense(self, span: Span, sums: Sums, pool: ThreadPoolExecutor) -> None:
        begin, end = span
        width = dense_width(self.num_rows, self.store.row_chunk(self.part), self.budget)
        windows = [(low, min(low + width, end)) for low in range(begin, end, width)]
        buffers = [
            self.engine.buffer((self.num_rows, min(width, end - begin))) for _ in windows[:2]
        ]
        filling = self._fill(windows[0], buffers[0], pool)
        for number, window in enumerate(windows):
            rows = buffers[number % 2][:, : window[1] - window[0]]
            for future in filling:
                future.result()
            if number + 1 < len(windows):
                filling = self._fill(windows[number + 1], buffers[(number + 1) % 2], pool)
            self._multiply(window, rows, sums, pool)
            self.tick(window[1] - window[0])

    def _fill(self, window: Span, buffer: np.ndarray, pool: ThreadPoolExecutor) -> list[Future]:
        """Decode all steps of a window into ``buffer``, in groups of rows."""
        begin, end = window
        needed = self.store.encoding(self.part).needs_base
        base = self.store.read_base(self.part, begin, end) if needed else np.empty(0, np.uint16)

        def read(rows: range) -> None:
            for row in rows:
                self.store.read_delta(
                    self.part, row, begin, end, base, out=buffer[row, : end - begin]
                )

        stride = max(1, -(-self.num_rows // (4 * WORKERS)))
        groups = (
            range(first, min(first + stride, self.num_rows))
            for first in range(0, self.num_rows, stride)
        )
        return [pool.submit(read, group) for group in groups]

    def _multiply(
        self, window: Span, rows: np.ndarray, sums: Sums, pool: ThreadPoolExecutor
    ) -> None:
        loaded = self.engine.load(rows)
        kernel = _Counting(self.kernel, self.num_rows, self.old)
        jobs: deque[tuple[int, Pending]] = deque()

        def finish() -> None:
            index, job = jobs.popleft()
            *products, counts = job.result()
            for total, product in zip(sums.products, products, strict=True):
                total[index] += product
            sums.counts[index, :2] += counts.astype(np.int64)

        for segment in self.store.layout.segments_in(self.part, *window):
            first, last = segment.offset - window[0], segment.offset - window[0] + segment.numel
            for low in range(first, last, 8 * PIECE):
                high, index = min(low + 8 * PIECE, last), self._index[id(segment.tensor)]
                jobs.append(
                    (index, self.engine.submit(kernel, index, rows, loaded, (low, high), pool))
                )
                if len(jobs) > 2 * WORKERS:
                    finish()
        while jobs:
            finish()

    # -- sparse log --------------------------------------------------------------------------------

    def _sparse(self, span: Span, sums: Sums, pool: ThreadPoolExecutor) -> None:
        store, part = self.store, self.part
        share = self.budget // (2 * WORKERS)
        per_column = (
            2 * bits_dtype(store.layout.parts[part].dtype).itemsize + 5
        )  # state, base, whether touched, slot
        entries = store.entries(part, self.num_rows)
        # Half of the budget holds a stretch of the log, read once; the other half the windows in
        # work.
        for begin, end, updates in store.read_log(
            part, self.num_rows, self.budget // 2, pool, span
        ):
            inner = entries[begin // BLOCK : num_blocks(end)]
            windows = column_windows(
                inner,
                end - begin,
                share // _WORK_BYTES,
                min(share // per_column, _LOG_WINDOW),
            )
            spans = [(begin + low, begin + high) for low, high in windows]
            results = pool.map(
                lambda window, u=updates: self._sparse_window(window, u, pool), spans
            )
            for window, (first, products, counts) in zip(spans, results, strict=True):
                for total, product in zip(sums.products, products, strict=True):
                    total[first : first + len(product)] += product
                sums.counts[first : first + len(counts)] += counts
                self.tick(window[1] - window[0])

    def _sparse_window(
        self, window: Span, updates: list[Update], pool: ThreadPoolExecutor
    ) -> tuple[int, list[np.ndarray], np.ndarray]:
        """Index of the first segment in a window, products and counts of the segments there.

        Only columns that ever change take part in the product; the others hold zeros. ``counts[:,
        1]`` are increments.
        """
        begin, end = window
        inside = self.store.layout.segments_in(self.part, begin, end)
        first = self._index[id(inside[0].tensor)]
        edges = np.array([*(s.offset - begin for s in inside), end - begin], np.int32)
        entries = [clip_update(update, begin, end) for update in updates]
        moving, slots = _slots([columns for columns, _ in entries], end - begin)
        base = self.store.read_base(self.part, begin, end)[moving]
        values, counts = self._replay(
            base, slots, [d for _, d in entries], np.searchsorted(moving, edges)
        )
        pieces = _pieces(np.searchsorted(moving, edges), self.engine.width)
        bounds = np.array([left for _, left, _ in pieces] + [pieces[-1][2] if pieces else 0])
        cuts = [np.searchsorted(slot, bounds).tolist() for slot in slots]
        products = [np.zeros((len(inside), *shape)) for shape in self.kernel.shapes]
        for number, (tensor, left, right) in enumerate(pieces):
            dense = np.zeros((self.num_rows, right - left), np.float32)
            for row_of_dense, slot, value, cut in zip(dense, slots, values, cuts, strict=True):
                low, high = cut[number], cut[number + 1]
                row_of_dense[slot[low:high] - left] = value[low:high]
            if not self.kernel.of_updates:
                np.cumsum(dense, axis=0, out=dense)
            for total, product in zip(
                products, self.engine.product(self.kernel, first + tensor, dense), strict=True
            ):
                total[tensor] += product
        return first, products, counts

    def _replay(
        self,
        base: np.ndarray,
        slots: list[np.ndarray],
        differences: list[np.ndarray],
        edges: np.ndarray,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Float values of every update, and counts ``[segments, 3, T - old]``; ``edges`` of the
        segments in slots.
        """
        dtype = self.store.layout.parts[self.part].dtype
        counts = np.zeros((len(edges) - 1, 3, self.num_rows - self.old), np.int64)
        state, values = base.copy(), []
        for row, (slot, difference) in enumerate(zip(slots, differences, strict=True)):
            before, after = apply_update(state, slot, difference)
            values.append(to_float32(after, dtype) - to_float32(before, dtype))
            if row >= self.old:
                original = base[slot]
                positions = np.searchsorted(slot, edges)
                left_base, met_base, unit = (
                    np.diff(np.searchsorted(np.flatnonzero(mask), positions))
                    for mask in (before == original, after == original, np.abs(difference) == 1)
                )
                counts[:, :, row - self.old] = np.stack(
                    [np.diff(positions), left_base - met_base, unit], axis=1
                )
        return values, counts


def _slots(columns: list[np.ndarray], width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ascending columns of a window of ``width`` that ever change, and for every update the places
    of its columns there.

    All that follows happens in these places: few, so that they stay in cache. Indices are ``intp``,
    which NumPy takes as they are; it gathers by any other integers at half the speed.
    """
    touched = np.zeros(width, bool)
    wide = [c.astype(np.intp) for c in columns]
    for c in wide:
        touched[c] = True
    moving = np.flatnonzero(touched)
    slot_of = np.empty(width, np.int32)  # only where a column moves
    slot_of[moving] = np.arange(len(moving), dtype=np.int32)
    return moving, [slot_of[c].astype(np.intp) for c in wide]


def _pieces(edges: np.ndarray, width: int) -> list[tuple[int, int, int]]:
    """``(segment, left, right)`` in slots, cut at the ``edges`` of segments and at ``width``."""
    return [
        (tensor, left, min(left + width, high))
        for tensor, (low, high) in enumerate(pairwise(edges.tolist()))
        for left in range(low, high, width)
    ]


def dense_width(num_rows: int, chunk: int, budget: int) -> int:
    """Columns of a window of dense rows: whole chunks where two windows of them fit the budget,
    else pieces.
    """
    column_bytes = 4 * (num_rows + 2)
    most = budget // (2 * column_bytes)
    if most < chunk:
        return max(PIECE, most // PIECE * PIECE)
    return max(chunk, min(most, _WINDOW_BYTES // column_bytes) // chunk * chunk)


@dataclass(frozen=True)
class _Counting:
    """A kernel for dense rows that also counts, while a piece of rows is in cache: one more array
    ``[2, T - old]``.

    Weights that changed since the previous row (in the first row: since the base), and those that
    are not zero.
    """

    kernel: Kernel
    num_rows: int
    old: int
    of_updates: bool = False

    @property
    def width(self) -> int:
        return self.kernel.width

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (*self.kernel.shapes, (2, self.num_rows - self.old))

    def constants(self, segment: int) -> tuple[np.ndarray, ...]:
        return self.kernel.constants(segment)

    def product(self, rows: Any, *constants: Any) -> list[Any]:
        old = self.old
        moved, before = _true(rows[old:] != 0), max(1, old)
        changed = _true(rows[before:] != rows[before - 1 : -1])
        counts = np.empty if isinstance(rows, np.ndarray) else rows.new_empty
        new_counts = counts((2, self.num_rows - old))
        new_counts[0, before - old :], new_counts[0, : before - old], new_counts[1] = (
            changed,
            moved[: before - old],
            moved,
        )
        taken = updates_of(rows) if self.kernel.of_updates else rows
        return [*self.kernel.product(taken, *constants), new_counts]


def updates_of(rows: Any) -> Any:
    """Differences of deltas ``rows [T, n]``, the first delta first."""
    updates = rows.copy() if isinstance(rows, np.ndarray) else rows.clone()
    updates[1:] -= rows[:-1]
    return updates


def _true(mask: Any) -> Any:
    return true_per_row(mask) if isinstance(mask, np.ndarray) else mask.sum(1)


def true_per_row(mask: np.ndarray) -> np.ndarray:
    """Number of true values in each row of ``mask [T, n]``, ``int64 [T]``.

    Eight at a time: the bytes of 128 words are added without overflow. NumPy's own sum over
    booleans is five times slower.
    """
    if (
        np.count_nonzero(mask) == mask.size
    ):  # where every weight moves, as in dense rows: once over bytes, no sums
        return np.full(len(mask), mask.shape[1])
    whole = mask.shape[1] // 1024 * 1024
    words = (
        np.ascontiguousarray(mask[:, :whole]).view(np.uint64).reshape(len(mask), whole // 1024, 128)
    )
    sums = words.sum(axis=2).view(np.uint8).reshape(len(mask), whole // 128)
    return sums.sum(axis=1, dtype=np.int64) + mask[:, whole:].sum(axis=1)


def ticker(progress: ProgressCallback | None, what: str, total: int) -> Tick:
    """A ``Tick`` that tells ``progress`` how many of ``total`` columns are done."""
    reached = [0]

    def tick(columns: int) -> None:
        reached[0] += columns
        if progress:
            progress(what, reached[0], total)

    return tick
