"""Weighted sums of the deltas for all predictions at once, in one pass over them.

A prediction is ``theta_0 + M^T a``. From dense rows that is a weighted sum of rows; from the sparse
log, with ``E`` the values of the updates, ``M^T a = E^T (L^T a)``: a scatter-add of the log with
the suffix sums of ``a``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from relexkit.gram_matrix.factors import FactorSums
from relexkit.store import READ_WINDOW, ProgressCallback, TrajectoryStore, blocks
from relexkit.store.encodings.bits import BLOCK, Update, apply_update, clip_update
from relexkit.weights.dtypes import to_float32
from relexkit.weights.layout import Layout, Segment, TensorSpec

_WORKERS = min(2, os.cpu_count() or 1)

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
    width = max(
        2**18,
        min(
            READ_WINDOW["float"], budget // (2 * _WORKERS * 4 * (len(weights) + 4)) // 2**16 * 2**16
        ),
    )

    def predict(part: int, begin: int, end: int, updates: list[Update] | FactorSums | None) -> None:
        segments = layout.segments_in(part, begin, end)
        weight = weights[:, [row_of[s.tensor.name] for s in segments], :num_rows]
        base = store.read_base(part, begin, end)
        if isinstance(updates, FactorSums):
            sums = updates.columns(begin, end)
        elif updates is None:
            sums = _dense_sums(store, part, begin, end, base, segments, weight)
        else:
            sums = _sparse_sums(
                layout.parts[part].dtype, begin, end, base, updates, segments, weight
            )
        original = to_float32(base, layout.parts[part].dtype)
        for index, values in enumerate(sums):
            if onto_base:
                values = np.where(
                    values == 0, original, values + original
                )  # a -0.0 that does not move stays one
            for segment in segments:
                low = segment.offset - begin
                if only is None or segment.tensor.name == only.name:
                    consume(index, segment, values[low : low + segment.numel])

    with ThreadPoolExecutor(_WORKERS) as pool:
        for part, spec in enumerate(layout.parts):
            first, last = (0, spec.numel) if only is None else _span(layout, part, only)
            if spec.encoding == "fixed" or first == last:
                continue
            stretches: Iterable[tuple[int, int, list[Update] | FactorSums | None]] = [
                (first, last, None)
            ]
            if spec.encoding == "sparse":
                stretches = store.read_log(part, num_rows, budget // 2, pool, (first, last))
            elif spec.encoding == "factors":
                weight = weights[:, row_of[layout.segments_in(part)[0].tensor.name]]
                stretches = [(0, spec.numel, FactorSums(store, part, weight, budget // 2))]
            for begin, end, updates in stretches:
                spans = [
                    (part, begin + low, begin + high, updates)
                    for low, high in blocks(end - begin, width)
                ]
                list(pool.map(lambda span: predict(*span), spans))
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


def _sparse_sums(
    dtype: str,
    begin: int,
    end: int,
    base: np.ndarray,
    updates: list[Update],
    segments: list[Segment],
    weights: np.ndarray,
) -> np.ndarray:
    """``M^T a``, ``float32 [P, n]``, of columns ``begin:end`` of a sparse part; ``weights [P, S,
    T]``.
    """
    suffix = weights[:, :, ::-1].cumsum(axis=2)[:, :, ::-1].astype(np.float32)
    state = base.copy()
    sums = np.zeros((len(weights), end - begin), np.float32)
    edges = np.array([*(s.offset - begin for s in segments), end - begin], np.int32)
    for row, update in enumerate(updates):
        local, differences = clip_update(update, begin, end)
        before, after = apply_update(state, local, differences)
        values = to_float32(after, dtype) - to_float32(before, dtype)
        counts = np.diff(np.searchsorted(local, edges))
        for target, total in enumerate(sums):
            total[local] += np.repeat(suffix[target, :, row], counts) * values
    return sums


def _dense_sums(
    store: TrajectoryStore,
    part: int,
    begin: int,
    end: int,
    base: np.ndarray,
    segments: list[Segment],
    weights: np.ndarray,
) -> np.ndarray:
    """``M^T a``, ``float32 [P, n]``, of columns ``begin:end`` of a dense part; ``weights [P, S,
    T]``.
    """
    sums = np.zeros((len(weights), end - begin), np.float32)
    for row in np.flatnonzero(weights.any(axis=(0, 1))):
        delta = store.read_delta(part, int(row), begin, end, base)
        for index, segment in enumerate(segments):
            low = segment.offset - begin
            for target, total in enumerate(sums):
                total[low : low + segment.numel] += (
                    np.float32(weights[target, index, row]) * delta[low : low + segment.numel]
                )
    return sums
