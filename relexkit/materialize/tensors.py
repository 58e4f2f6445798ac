"""Single tensors of a store in memory: deltas, weights and weighted sums of deltas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.materialize.sums import stream_sums
from relexkit.store import TrajectoryStore, stretches
from relexkit.store.encodings.bits import BLOCK
from relexkit.weights.dtypes import to_float32
from relexkit.weights.layout import Segment, TensorSpec

_BUDGET = 2**28


def moving_tensor(store: TrajectoryStore, name: str) -> TensorSpec:
    """The tensor of that name; of a tied one the tensor that it shares.

    Raises:
        RelexkitError: there is none, or it is no float tensor.
    """
    known = {t.name: t for t in store.layout.tensors}
    tensor = known.get(name)
    if tensor is not None and tensor.tied_to is not None:
        tensor = known[tensor.tied_to]
    moving = [t.name for t in store.layout.moving_tensors]
    if tensor is None or tensor.name not in moving:
        near = [n for n in moving if name in n] or moving
        raise RelexkitError(
            f"{name!r} is not a float tensor of {store.path}; expected one such as"
            f" {', '.join(near[:3])}"
        )
    return tensor


def tensor_delta(store: TrajectoryStore, name: str, step: int) -> np.ndarray:
    """``theta_step - theta_0`` of one tensor, float32 in its shape; zeros for step 0.

    Exact where the store is, else to its mantissa bits. Reads the tensor's part of the step, of a
    sparse log also that of the steps before.

    Raises:
        RelexkitError: no such float tensor.
        StoreError: the step is not recorded, or a chunk is damaged.
    """
    tensor = moving_tensor(store, name)
    row = _row(store, step)
    values = np.zeros(tensor.numel, np.float32)
    for piece, begin, end in _windows(store, tensor) if row >= 0 else ():
        base = store.read_base(piece.part, begin, end)
        _put(values, piece, begin, store.read_delta(piece.part, row, begin, end, base))
    store.check_unchanged()
    return values.reshape(tensor.shape)


def tensor_weights(store: TrajectoryStore, name: str, step: int) -> np.ndarray:
    """One tensor at a recorded step, 0 for the base, as float32 in its shape: the values that
    ``checkout`` writes.

    Raises:
        RelexkitError: no such float tensor.
        StoreError: the step is not recorded, or a chunk is damaged.
    """
    tensor = moving_tensor(store, name)
    row = _row(store, step)
    values = np.empty(tensor.numel, np.float32)
    for piece, begin, end in _windows(store, tensor):
        state = store.read_state(piece.part, row, begin, end)
        _put(values, piece, begin, to_float32(state, tensor.dtype))
    store.check_unchanged()
    return values.reshape(tensor.shape)


def tensor_sums(store: TrajectoryStore, name: str, weights: np.ndarray) -> np.ndarray:
    """``M^T a`` of one tensor for every row of ``weights [P, T]``, ``float32 [P, *shape]``. One
    pass over the tensor's part of the deltas.

    Raises:
        RelexkitError: no such float tensor.
        StoreError: a damaged chunk.
    """
    tensor = moving_tensor(store, name)
    names = [t.name for t in store.layout.moving_tensors]
    full = np.zeros((len(weights), len(names), weights.shape[1]))
    full[:, names.index(tensor.name)] = weights
    sums = np.zeros((len(weights), tensor.numel), np.float32)

    def consume(index: int, segment: Segment, values: np.ndarray) -> None:
        sums[index, segment.start : segment.start + segment.numel] = values

    stream_sums(store, full, consume, _BUDGET, None, onto_base=False, only={tensor.name})
    return sums.reshape(len(weights), *tensor.shape)


def _row(store: TrajectoryStore, step: int) -> int:
    return -1 if step == 0 else store.row_of(step)


def _windows(store: TrajectoryStore, tensor: TensorSpec) -> Iterator[tuple[Segment, int, int]]:
    """Pieces of a tensor with windows of columns around them that begin at a block."""
    for segment in store.layout.segments_of(tensor):
        spec = store.layout.parts[segment.part]
        end = segment.offset + segment.numel
        span = segment.offset // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, spec.numel)
        for begin, last in stretches(span, store.encoding(segment.part).window):
            yield segment, begin, last


def _put(out: np.ndarray, piece: Segment, begin: int, values: np.ndarray) -> None:
    """Put ``values`` of the columns from ``begin`` on where they belong in the tensor ``out``."""
    low = max(piece.offset, begin)
    high = min(piece.offset + piece.numel, begin + len(values))
    start = piece.start + low - piece.offset
    out[start : start + high - low] = values[low - begin : high - begin]
