"""Weighted sums of the deltas for all predictions at once, in one pass over them.

A prediction is ``theta_0 + M^T a``. From dense rows that is a weighted sum of rows; from the sparse
log, with ``E`` the values of the updates, ``M^T a = E^T (L^T a)``: a scatter-add of the log with
the suffix sums of ``a``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np

from relexkit.gram_matrix.factors import FactorSums
from relexkit.processes import cores
from relexkit.store import ProgressCallback, TrajectoryStore, blocks
from relexkit.store.encodings.bits import BLOCK, Update, apply_update, clip_update
from relexkit.weights.dtypes import to_float32
from relexkit.weights.layout import Layout, Segment, TensorSpec

_WORKERS = min(16, cores())
_WINDOW = 2**20  # columns at most: a chunk of the base, and sums that stay in cache

Consume = Callable[[int, Segment, np.ndarray], None]
"""Receives ``(index of the prediction, piece of a tensor, its float32 values)``; called from
several threads.
"""


def stream_sums(
    store: TrajectoryStore,
    weights: np.ndarray,
    consume: Consume,
    budget: int,
    progress: ProgressCallback | None,
    *,
    onto_base: bool = True,
    only: TensorSpec | None = None,
) -> None:
    """Pass ``theta_0 + M^T a`` (``M^T a`` alone unless ``onto_base``) for every row of ``weights
    [P, N, T]`` to ``consume``.

    It receives piece after piece, in any order. Steps beyond the last one with a non-zero weight
    are not read. With ``only`` nothing but that tensor is.

    Raises:
        StoreError: a damaged chunk, or the store was replaced meanwhile: what ``consume`` received
            is of no use.
    """
    layout = store.layout
    row_of = {t.name: row for row, t in enumerate(layout.moving_tensors)}
    used = np.flatnonzero(weights.any(axis=(0, 1)))
    num_rows = int(used[-1]) + 1 if len(used) else 0
    fits = budget // (2 * _WORKERS * 4 * (len(weights) + 4)) // 2**16 * 2**16
    width = max(2**18, min(_WINDOW, fits))

    def predict(window: _Window, updates: list[Update] | FactorSums | None) -> None:
        segments = window.segments
        weight = weights[:, [row_of[s.tensor.name] for s in segments], :num_rows]
        base = store.read_base(window.part, window.begin, window.end)
        if isinstance(updates, FactorSums):
            sums = updates.columns(window.begin, window.end)
        elif updates is None:
            sums = _dense_sums(store, window, base, weight)
        else:
            sums = _sparse_sums(window, base, updates, weight)
        if onto_base:
            _add_base(sums, base, window.dtype)
        for index, values in enumerate(sums):
            for segment in segments:
                low = segment.offset - window.begin
                if only is None or segment.tensor.name == only.name:
                    consume(index, segment, values[low : low + segment.numel])

    with ThreadPoolExecutor(_WORKERS) as pool:
        for part, spec in enumerate(layout.parts):
            first, last = (0, spec.numel) if only is None else _span(layout, part, only)
            if not spec.moves or first == last:
                continue
            stretches: Iterable[tuple[int, int, list[Update] | FactorSums | None]] = [
                (first, last, None)
            ]
            if spec.factors is not None:
                weight = weights[:, row_of[layout.segments_in(part)[0].tensor.name]]
                stretches = [(0, spec.numel, FactorSums(store, part, weight, budget // 2))]
            elif store.encoding(part).is_log:
                stretches = store.read_log(part, num_rows, budget // 2, pool, (first, last))
            for begin, end, updates in stretches:
                windows = [
                    _Window(layout, part, begin + low, begin + high)
                    for low, high in blocks(end - begin, width)
                ]
                list(pool.map(predict, windows, repeat(updates)))
                if progress:
                    progress(
                        "predicting", part * 100 + 100 * end // spec.numel, len(layout.parts) * 100
                    )
    store.check_unchanged()


def _span(layout: Layout, part: int, tensor: TensorSpec) -> tuple[int, int]:
    """The columns of a part that hold a tensor, from the beginning of a block to an end of one."""
    pieces = [s for s in layout.segments_of(tensor) if s.part == part]
    if not pieces:
        return 0, 0
    first, last = pieces[0].offset, pieces[-1].offset + pieces[-1].numel
    return first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, layout.parts[part].numel)


class _Window:
    """Columns ``begin:end`` of a part."""

    def __init__(self, layout: Layout, part: int, begin: int, end: int):
        self.part, self.begin, self.end = part, begin, end
        self.segments = layout.segments_in(part, begin, end)
        self.dtype = layout.parts[part].dtype


def _add_base(sums: np.ndarray, base: np.ndarray, dtype: str) -> None:
    """Add the base, in bits ``[n]``, to ``sums [P, n]`` in place; a -0.0 that does not move stays
    one.
    """
    minus = np.flatnonzero(base == base.dtype.type(1 << (8 * base.itemsize - 1)))
    still = [minus[values[minus] == 0] for values in sums]
    sums += to_float32(base, dtype)
    for values, columns in zip(sums, still, strict=True):
        values[columns] = -0.0


def _sparse_sums(
    window: _Window, base: np.ndarray, updates: list[Update], weights: np.ndarray
) -> np.ndarray:
    """``M^T a``, ``float32 [P, n]``, in a sparse part; ``weights [P, S, T]``."""
    begin, end = window.begin, window.end
    suffix = weights[:, :, ::-1].cumsum(axis=2)[:, :, ::-1].astype(np.float32)
    state = base.copy()
    sums = np.zeros((len(weights), end - begin), np.float32)
    edges = np.array([*(s.offset - begin for s in window.segments), end - begin], np.int32)
    for row, update in enumerate(updates):
        local, differences = clip_update(update, begin, end)
        counts = np.diff(np.searchsorted(local, edges))
        local = local.astype(np.intp)  # NumPy gathers by other integers at half the speed
        before, after = apply_update(state, local, differences)
        values = to_float32(after, window.dtype) - to_float32(before, window.dtype)
        for target, total in enumerate(sums):
            total[local] += np.repeat(suffix[target, :, row], counts) * values
    return sums


def _dense_sums(
    store: TrajectoryStore, window: _Window, base: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """``M^T a``, ``float32 [P, n]``, in a part of dense rows; ``weights [P, S, T]``."""
    sums = np.zeros((len(weights), window.end - window.begin), np.float32)
    for row in np.flatnonzero(weights.any(axis=(0, 1))):
        delta = store.read_delta(window.part, int(row), window.begin, window.end, base)
        for index, segment in enumerate(window.segments):
            low = segment.offset - window.begin
            for target, total in enumerate(sums):
                total[low : low + segment.numel] += (
                    np.float32(weights[target, index, row]) * delta[low : low + segment.numel]
                )
    return sums
