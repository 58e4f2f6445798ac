"""A stretch of a run as a trajectory of its own: the steps after one of the recorded steps,
relative to the weights there.
"""

from __future__ import annotations

import numpy as np

from relexkit.gram_matrix.matrices import Gram, mirror
from relexkit.gram_matrix.parts import moving_parts
from relexkit.store import TrajectoryStore, blocks

_COLUMNS = 2**18  # of the deltas that are in memory


def segment_gram(store: TrajectoryStore, start: int, until: int | None = None) -> Gram:
    """Gram matrices of the steps after ``start``, to ``until`` if given, which count from
    ``start``, of their deltas against the weights there.

    One pass over these steps; keeps nothing, and gives the same bits whatever was computed before.
    Moves of one unit in the last place are not counted. Memory: 20 bytes for each of 262,144
    columns and of the steps.

    Args:
        start: a recorded step, or 0 for the base.
    """
    rows = np.flatnonzero(store.steps > start)
    if until is not None:
        rows = rows[store.steps[rows] <= until]
    origin = None if start == 0 else store.row_of(start)
    tensors = store.layout.moving_tensors
    places = {tensor.name: place for place, tensor in enumerate(tensors)}
    matrices = np.zeros((len(tensors), len(rows), len(rows)))
    changed, moved = np.zeros((2, len(tensors), len(rows)), np.int64)
    for part in moving_parts(store):
        for begin, end in blocks(store.layout.parts[part].numel, _COLUMNS):
            base = store.read_base(part, begin, end)
            still = 0.0 if origin is None else store.read_delta(part, origin, begin, end, base)
            delta_TD = np.stack(
                [store.read_delta(part, int(row), begin, end, base) - still for row in rows]
            )
            for segment in store.layout.segments_in(part, begin, end):
                low = segment.offset - begin
                piece_TD = delta_TD[:, low : low + segment.numel].astype(np.float64)
                place = places[segment.tensor.name]
                matrices[place] += piece_TD @ piece_TD.T
                moved[place] += np.count_nonzero(piece_TD, axis=1)
                changed[place] += np.count_nonzero(np.diff(piece_TD, axis=0, prepend=0), axis=1)
    mirror(matrices)
    sizes = np.array([tensor.numel for tensor in tensors], np.int64)
    unknown = np.full_like(changed, -1)
    return Gram(store.steps[rows] - start, tuple(places), sizes, matrices, changed, moved, unknown)


def from_segment(store: TrajectoryStore, start: int, weights: np.ndarray) -> np.ndarray:
    """Weights ``[N, T]`` over all recorded deltas with the effect of ``weights [N, T']`` over those
    of ``segment_gram``.
    """
    whole = np.zeros((len(weights), len(store.steps)))
    whole[:, store.steps > start] = weights
    if start:
        whole[:, store.row_of(start)] = 1 - weights.sum(axis=1)
    return whole
