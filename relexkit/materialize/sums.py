"""Predicted weights ``theta_0 + M^T a``, for all predictions in one pass over the deltas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import numpy as np

from relexkit.gram_matrix.compute.settings import Compute
from relexkit.gram_matrix.factors import FactorSums
from relexkit.materialize.moved import Directions, Piece, Updates, Window, pieces, windows
from relexkit.materialize.output import Output
from relexkit.processes import cores
from relexkit.store import ProgressCallback, TrajectoryStore
from relexkit.store.encodings.bits import BLOCK
from relexkit.weights.dtypes import random_bits, rounded, to_float32
from relexkit.weights.layout import Layout, Segment

_WORKERS = min(16, cores())
_WINDOW = 2**20  # columns at most: a chunk of the base

Consume = Callable[[int, Segment, np.ndarray], None]
"""Receives ``(index of the prediction, piece of a tensor, its float32 values or its bits)``, called
from several threads; the array is written again once it has returned.
"""


def stream_sums(
    store: TrajectoryStore,
    weights: np.ndarray,
    consume: Consume,
    budget: int,
    progress: ProgressCallback | None,
    *,
    onto_base: bool = True,
    only: Collection[str] | None = None,
) -> None:
    """Pass ``theta_0 + M^T a`` (``M^T a`` alone unless ``onto_base``) in float32 for every row of
    ``weights [P, N, T]`` to ``consume``.

    It receives piece after piece, in any order. Steps beyond the last one with a non-zero weight
    are not read. With ``only`` nothing but the tensors of these names is.

    Raises:
        StoreError: a damaged chunk, or the store was replaced meanwhile: what ``consume`` received
            is of no use.
    """
    spread = Directions(weights)

    def predict(piece: Piece, row: int) -> None:
        whole = to_float32(piece.bits, piece.segment.tensor.dtype) if onto_base else None
        for index, (which, scale) in enumerate(spread.targets(row)):
            values = piece.values(which, scale, onto_base=onto_base)
            consume(index, piece.segment, piece.filled(values, whole))

    _each_piece(store, spread.directions, predict, budget, progress, only)


def stream_bits(
    store: TrajectoryStore,
    weights: np.ndarray,
    output: Output,
    consume: Consume,
    compute: Compute,
    only: Collection[str] | None = None,
) -> None:
    """``stream_sums`` rounded to ``output.dtype`` (the tensor's if None): passes on bits. All
    predictions draw the same random bits.

    Raises:
        StoreError: as for ``stream_sums``.
        RelexkitError: a value that the dtype cannot hold.
    """
    spread = Directions(weights)

    def predict(piece: Piece, row: int) -> None:
        tensor, start = piece.segment.tensor, piece.segment.start
        dtype = output.dtype or tensor.dtype
        same = dtype == tensor.dtype  # what does not move needs no rounding
        whole = piece.bits if same else to_float32(piece.bits, tensor.dtype)
        places: Sequence[int] | np.ndarray = range(start, start + len(whole))
        if same and isinstance(piece.at, np.ndarray):
            places = piece.at + start
        random = None
        if output.rounding == "stochastic" and dtype != "float32" and len(places):
            drawn = random_bits(output.seed, tensor.name, start, start + len(whole))
            random = drawn[piece.at] if same else drawn
        for index, (which, scale) in enumerate(spread.targets(row)):
            values = piece.values(which, scale, onto_base=True)
            if same:
                bits = piece.filled(rounded(values, dtype, random, tensor.name, places), whole)
            else:
                bits = rounded(piece.filled(values, whole), dtype, random, tensor.name, places)
            consume(index, piece.segment, bits)

    budget, progress = compute.memory_budget_bytes, compute.progress
    _each_piece(store, spread.directions, predict, budget, progress, only)


def _each_piece(
    store: TrajectoryStore,
    directions: np.ndarray,
    work: Callable[[Piece, int], None],
    budget: int,
    progress: ProgressCallback | None,
    only: Collection[str] | None,
) -> None:
    """Call ``work(piece, row of its tensor in directions)`` for every piece, by every core."""
    layout = store.layout
    row_of = {t.name: row for row, t in enumerate(layout.moving_tensors)}
    used = np.flatnonzero(directions.any(axis=(0, 1)))
    num_rows = int(used[-1]) + 1 if len(used) else 0
    fits = budget // (2 * _WORKERS * 4 * (len(directions) + 4)) // 2**16 * 2**16
    width = max(2**18, min(_WINDOW, fits))

    def of_window(part: int, span: tuple[int, int], updates: Updates) -> None:
        window = Window(store, part, *span)
        rows = [row_of[s.tensor.name] for s in window.segments]
        for piece in pieces(store, window, updates, directions[:, rows, :num_rows]):
            if only is None or piece.segment.tensor.name in only:
                work(piece, row_of[piece.segment.tensor.name])

    with ThreadPoolExecutor(_WORKERS) as pool:
        for part, spec in enumerate(layout.parts):
            spans = _spans(layout, part, only) if spec.moves else []
            taken: Iterable[tuple[int, int, Updates]] = [(*span, None) for span in spans]
            if spec.factors is not None and spans:
                weights = directions[:, row_of[layout.segments_in(part)[0].tensor.name]]
                taken = [(*spans[0], FactorSums(store, part, weights, budget // 2))]
            elif store.encoding(part).is_log:
                logs = (store.read_log(part, num_rows, budget // 2, pool, span) for span in spans)
                taken = chain.from_iterable(logs)
            for begin, end, updates in taken:
                cut = list(windows(store, part, (begin, end), updates, width))
                list(pool.map(of_window, repeat(part), cut, repeat(updates)))
                if progress:
                    done, total = part * 100 + 100 * end // spec.numel, len(layout.parts) * 100
                    progress("predicting", done, total)
    store.check_unchanged()


def _spans(layout: Layout, part: int, only: Collection[str] | None) -> list[tuple[int, int]]:
    """The columns of a part that hold the tensors of these names (None: all), from the beginning of
    a block to an end of one.
    """
    numel, spans = layout.parts[part].numel, list[tuple[int, int]]()
    for segment in layout.segments_in(part):
        if only is None or segment.tensor.name in only:
            begin = segment.offset // BLOCK * BLOCK
            end = min(-(-(segment.offset + segment.numel) // BLOCK) * BLOCK, numel)
            joins = spans and begin <= spans[-1][1]
            spans.append((spans.pop()[0] if joins else begin, end))
    return spans
