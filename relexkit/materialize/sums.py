"""Predicted weights ``theta_0 + M^T a``, for all predictions in one pass over the deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np

from relexkit.gram_matrix.factors import FactorSums
from relexkit.materialize.moved import Directions, Piece, Updates, Window, pieces
from relexkit.materialize.output import Output
from relexkit.processes import cores
from relexkit.store import ProgressCallback, TrajectoryStore, stretches
from relexkit.store.encodings.bits import BLOCK
from relexkit.weights.dtypes import random_bits, rounded, to_float32
from relexkit.weights.layout import Layout, Segment, TensorSpec

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
    only: TensorSpec | None = None,
) -> None:
    """Pass ``theta_0 + M^T a`` (``M^T a`` alone unless ``onto_base``) in float32 for every row of
    ``weights [P, N, T]`` to ``consume``.

    It receives piece after piece, in any order. Steps beyond the last one with a non-zero weight
    are not read. With ``only`` nothing but that tensor is.

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
    budget: int,
    progress: ProgressCallback | None,
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
        some = same and isinstance(piece.at, np.ndarray)
        places = start + piece.at if some else range(start, start + len(whole))
        random = None
        if output.rounding == "stochastic" and dtype != "float32" and len(places):
            drawn = random_bits(output.seed, tensor.name, start, start + len(whole))
            random = drawn[piece.at] if some else drawn
        for index, (which, scale) in enumerate(spread.targets(row)):
            values = piece.values(which, scale, onto_base=True)
            if same:
                bits = piece.filled(rounded(values, dtype, random, tensor.name, places), whole)
            else:
                bits = rounded(piece.filled(values, whole), dtype, random, tensor.name, places)
            consume(index, piece.segment, bits)

    _each_piece(store, spread.directions, predict, budget, progress, None)


def _each_piece(
    store: TrajectoryStore,
    directions: np.ndarray,
    work: Callable[[Piece, int], None],
    budget: int,
    progress: ProgressCallback | None,
    only: TensorSpec | None,
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
            if only is None or piece.segment.tensor.name == only.name:
                work(piece, row_of[piece.segment.tensor.name])

    with ThreadPoolExecutor(_WORKERS) as pool:
        for part, spec in enumerate(layout.parts):
            span = (0, spec.numel) if only is None else _span(layout, part, only)
            if not spec.moves or span[0] == span[1]:
                continue
            taken: Iterable[tuple[int, int, Updates]] = [(*span, None)]
            if spec.factors is not None:
                weights = directions[:, row_of[layout.segments_in(part)[0].tensor.name]]
                taken = [(*span, FactorSums(store, part, weights, budget // 2))]
            elif store.encoding(part).is_log:
                taken = store.read_log(part, num_rows, budget // 2, pool, span)
            for begin, end, updates in taken:
                spans = stretches((begin, end), width)
                list(pool.map(of_window, repeat(part), spans, repeat(updates)))
                if progress:
                    done, total = part * 100 + 100 * end // spec.numel, len(layout.parts) * 100
                    progress("predicting", done, total)
    store.check_unchanged()


def _span(layout: Layout, part: int, tensor: TensorSpec) -> tuple[int, int]:
    """The columns of a part that hold a tensor, from the beginning of a block to an end of one."""
    pieces = [s for s in layout.segments_of(tensor) if s.part == part]
    if not pieces:
        return 0, 0
    first, last = pieces[0].offset, pieces[-1].offset + pieces[-1].numel
    return first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, layout.parts[part].numel)
