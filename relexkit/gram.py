"""Temporal Gram matrices: one pass over the deltas, after which no question about the run's shape reads weights again.

For the delta matrix ``M [T, D]`` of a tensor (row ``i`` is ``theta_{s_i} - theta_0``), ``G = M M^T [T, T]``. Gram matrices
of disjoint coordinates add, so every scope is a sum of per-tensor ones. From the sparse log, with ``E`` the float values
of the step-to-step updates and ``L`` the lower triangle of ones, ``M = L E`` and ``G = L (E E^T) L^T``.

Shape suffixes: N tensors or groups, T steps, D columns.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import zarr

from relexkit.dtypes import bits_dtype, to_float32
from relexkit.encoding import BLOCK, Update, apply_update, clip_update, num_blocks
from relexkit.errors import RelexkitError, StoreError
from relexkit.layout import Segment, scope_of
from relexkit.linalg import single_threaded_blas
from relexkit.store import (
    FORMAT_VERSION,
    READ_WINDOW,
    ProgressCallback,
    TrajectoryStore,
    WriterLock,
    blocks,
    column_windows,
    create_array,
    describe_steps,
)

_PIECE = 2**13  # columns whose products are accumulated in float32, and in cache, before the sum goes to float64
_WORK_BYTES = 24  # of an entry in a window: column, slot, value, and temporaries
_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Gram:
    """Gram matrices of a set of tensors, or of groups of tensors.

    Attributes:
        steps: ``int64 [T]``, real optimizer steps.
        names: N names of tensors or groups.
        num_parameters: ``int64 [N]``.
        matrices: ``float64 [N, T, T]``.
        changed: ``int64 [N, T]``, weights that differ from the previous recorded step.
        moved: ``int64 [N, T]``, weights that differ from the base.
        unit_moves: ``int64 [N, T]``, weights that moved by exactly one unit in the last place since the previous step,
            or -1 where the encoding does not keep bit patterns.
    """

    steps: np.ndarray
    names: tuple[str, ...]
    num_parameters: np.ndarray
    matrices: np.ndarray
    changed: np.ndarray
    moved: np.ndarray
    unit_moves: np.ndarray

    def until(self, step: int | None) -> Gram:
        """The prefix of the run up to and including ``step``: leading blocks, no copy.

        Raises:
            RelexkitError: no recorded step is that early.
        """
        if step is None:
            return self
        count = int(np.searchsorted(self.steps, step, side="right"))
        if count == 0:
            raise RelexkitError(f"--until {step} keeps no step; the store holds {describe_steps(self.steps)}")
        return Gram(
            self.steps[:count], self.names, self.num_parameters, self.matrices[:, :count, :count],
            self.changed[:, :count], self.moved[:, :count], self.unit_moves[:, :count],
        )  # fmt: skip

    def scoped(self, scope: str) -> Gram:
        """Sums over the groups of ``scope`` (``tensor``, ``layer``, ``module`` or ``global``), in order of appearance."""
        if scope == "tensor":
            return self
        group_of = self.groups(scope)
        names = tuple(dict.fromkeys(group_of))
        index = np.array([names.index(g) for g in group_of], dtype=np.int64)

        def add(values: np.ndarray) -> np.ndarray:
            total = np.zeros((len(names), *values.shape[1:]), values.dtype)
            np.add.at(total, index, values)
            return total

        unit = add(self.unit_moves)
        unit[np.isin(np.arange(len(names)), index[(self.unit_moves < 0).any(axis=1)])] = -1
        return Gram(self.steps, names, add(self.num_parameters), add(self.matrices), add(self.changed), add(self.moved), unit)

    def groups(self, scope: str) -> list[str]:
        """For each of the N names, the group of ``scope`` that it falls into."""
        return [scope_of(name, scope) for name in self.names]


def gram(store: TrajectoryStore, *, memory_budget_bytes: int = 2**28, progress: ProgressCallback | None = None) -> Gram:
    """Gram matrices of every moving tensor of a store, from its cache or by one pass over the deltas.

    The result is kept in the store, part by part, so that an interrupted pass resumes and appended steps cost only their
    own rows. Where it cannot be kept (a read-only place, another process keeping one) it is used all the same.

    Memory: about ``memory_budget_bytes`` whatever the number of steps and parameters, plus the matrices themselves.

    Raises:
        StoreError: no recorded steps, or a damaged chunk (named by step and tensor).
    """
    if not len(store.steps):
        raise StoreError(f"{store.path}: holds no steps; import or record some first")
    parts = [p for p, part in enumerate(store.layout.parts) if part.encoding != "fixed" and part.numel]
    tensors = store.layout.moving_tensors
    row_of = {tensor.name: row for row, tensor in enumerate(tensors)}
    num_steps = len(store.steps)
    matrices = np.zeros((len(tensors), num_steps, num_steps))
    counts = np.zeros((3, len(tensors), num_steps), np.int64)
    for done, part in enumerate(parts):
        result = _part_gram(store, part, memory_budget_bytes, progress, (done, len(parts)))
        for segment, matrix, count in zip(store.layout.segments_in(part), result.matrices, result.counts, strict=True):
            row = row_of[segment.tensor.name]
            matrices[row] += matrix
            counts[:, row] += count
    dense = [row for row, t in enumerate(tensors) if store.layout.parts[t.part].encoding != "sparse"]
    counts[2, dense] = -1
    sizes = np.array([t.numel for t in tensors], np.int64)
    return Gram(store.steps, tuple(t.name for t in tensors), sizes, matrices, *counts)


@dataclass
class _PartGram:
    """Per segment of a part: ``matrices [S, T, T]`` and ``counts [S, 3, T]`` (changed, moved, unit moves)."""

    matrices: np.ndarray
    counts: np.ndarray


def _part_gram(
    store: TrajectoryStore, part: int, budget: int, progress: ProgressCallback | None, place: tuple[int, int]
) -> _PartGram:
    known = _load(store, part)
    num_steps = len(store.steps)
    old = _num_known(known)
    if known is not None and old == num_steps:
        return known
    num_segments = len(store.layout.segments_in(part))
    result = _PartGram(np.zeros((num_segments, num_steps, num_steps)), np.zeros((num_segments, 3, num_steps), np.int64))
    if store.layout.parts[part].encoding == "sparse":
        _sparse_pass(store, part, known, budget, result, progress, place)
    else:
        _dense_pass(store, part, old, budget, result, progress, place)
    result.matrices[:, :, old:] = result.matrices[:, old:, :].transpose(0, 2, 1)
    if known is not None:
        result.matrices[:, :old, :old] = known.matrices
        result.counts[:, :, :old] = known.counts
    _save(store, part, result)
    return result


def _num_known(known: _PartGram | None) -> int:
    return 0 if known is None else known.matrices.shape[1]


# -- sparse log -------------------------------------------------------------------------------------------------------


def _sparse_pass(
    store: TrajectoryStore, part: int, known: _PartGram | None, budget: int, result: _PartGram,
    progress: ProgressCallback | None, place: tuple[int, int],
) -> None:  # fmt: skip
    """Rows ``old:`` of ``L (E E^T) L^T``; the products are summed over windows, the two triangles applied at the end."""
    old = _num_known(known)
    products = np.zeros_like(result.matrices)
    numel = store.layout.parts[part].numel
    entries = store.entries(part, len(store.steps))
    share = budget // (2 * _WORKERS)
    per_column = 2 * bits_dtype(store.layout.parts[part].dtype).itemsize + 5  # state, base, whether touched, slot
    with single_threaded_blas(), ThreadPoolExecutor(_WORKERS) as pool:
        # Half of the budget holds a stretch of the log, read once; the other half the windows in work.
        for begin, end, updates in store.read_log(part, len(store.steps), budget // 2, pool):
            inner = entries[begin // BLOCK : num_blocks(end)]
            windows = column_windows(inner, end - begin, share // _WORK_BYTES, min(share // per_column, READ_WINDOW["sparse"]))
            spans = [(begin + low, begin + high) for low, high in windows]
            results = pool.map(lambda span, u=updates: _sparse_window(store, part, span, u, old), spans)
            for span, (first, product, counts) in zip(spans, results, strict=True):
                products[first : first + len(product), old:] += product
                result.counts[first : first + len(counts), :, old:] += counts
                if progress:
                    progress("Gram matrices", place[0] * 100 + 100 * span[1] // numel, place[1] * 100)
    if known is not None:
        products[:, :old, old:] = products[:, old:, :old].transpose(0, 2, 1)
        # E E^T of the cached steps: the inverse of the two cumulative sums
        padded = np.pad(known.matrices, ((0, 0), (1, 0), (1, 0)))
        products[:, :old, :old] = np.diff(np.diff(padded, axis=1), axis=2)
        result.counts[:, 1, old] += known.counts[:, 1, -1]
    result.counts[:, 1, old:] = result.counts[:, 1, old:].cumsum(axis=1)
    result.matrices[:] = products.cumsum(axis=1).cumsum(axis=2)


def _sparse_window(
    store: TrajectoryStore, part: int, window: tuple[int, int], updates: list[Update], old: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Index of the first segment in a window of columns, ``E[old:] E^T`` and counts of each segment there.

    Only columns that ever change take part in the product; the others hold zeros. ``counts[:, 1]`` are increments.
    """
    begin, end = window
    layout, dtype, num_steps = store.layout, store.layout.parts[part].dtype, len(store.steps)
    inside = layout.segments_in(part, begin, end)
    edges = np.array([*(s.offset - begin for s in inside), end - begin], np.int32)
    counts = np.zeros((len(inside), 3, num_steps - old), np.int64)
    state = store.read_base(part, begin, end)
    base = state.copy()
    touched = np.zeros(end - begin, bool)
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for row, update in enumerate(updates):
        local, differences = clip_update(update, begin, end)
        before, after = apply_update(state, local, differences)
        touched[local] = True
        columns.append(local)
        values.append(to_float32(after, dtype) - to_float32(before, dtype))
        if row >= old:
            original = base[local]
            positions = np.searchsorted(local, edges)
            left_base, met_base, unit = (
                np.diff(np.searchsorted(np.flatnonzero(mask), positions))
                for mask in (before == original, after == original, np.abs(differences) == 1)
            )
            counts[:, :, row - old] = np.stack([np.diff(positions), left_base - met_base, unit], axis=1)
    slot_of = touched.astype(np.int32)  # cast first: cumsum with another dtype is many times slower
    np.cumsum(slot_of, out=slot_of)
    slot_of -= 1
    slots = [slot_of[local] for local in columns]
    tensor_edges = [0, *(slot_of[edges[1:] - 1] + 1)]
    pieces = [
        (tensor, left, min(left + _PIECE, high))
        for tensor, (low, high) in enumerate(pairwise(tensor_edges))
        for left in range(low, high, _PIECE)
    ]
    bounds = np.array([left for _, left, _ in pieces] + [tensor_edges[-1]], np.int32)
    spans = [np.searchsorted(slot, bounds) for slot in slots]
    products = np.zeros((len(inside), num_steps - old, num_steps))
    for number, (tensor, left, right) in enumerate(pieces):
        dense = np.zeros((num_steps, right - left), np.float32)
        for row_of_dense, slot, value, span in zip(dense, slots, values, spans, strict=True):
            first, last = span[number], span[number + 1]
            row_of_dense[slot[first:last] - left] = value[first:last]
        products[tensor] += _product(dense, old)
    return _index_of(layout.segments_in(part), inside[0]), products, counts


# -- dense rows -------------------------------------------------------------------------------------------------------


def _dense_pass(
    store: TrajectoryStore,
    part: int,
    old: int,
    budget: int,
    result: _PartGram,
    progress: ProgressCallback | None,
    place: tuple[int, int],
) -> None:
    """Rows ``old:`` of ``M M^T``: float32 products over short stretches of columns, summed in float64."""
    numel = store.layout.parts[part].numel
    width = max(_PIECE, budget // (_WORKERS * 4 * (len(store.steps) + 2)) // _PIECE * _PIECE)
    windows = list(blocks(numel, min(width, READ_WINDOW[store.layout.parts[part].encoding])))
    with single_threaded_blas(), ThreadPoolExecutor(_WORKERS) as pool:
        results = pool.map(lambda window: _dense_window(store, part, window, old), windows)
        for (_, end), (first, product, counts) in zip(windows, results, strict=True):
            result.matrices[first : first + len(product), old:] += product
            result.counts[first : first + len(counts), :2, old:] += counts
            if progress:
                progress("Gram matrices", place[0] * 100 + 100 * end // numel, place[1] * 100)


def _dense_window(store: TrajectoryStore, part: int, window: tuple[int, int], old: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Index of the first segment in a window, ``M[old:] M^T`` and counts (changed, moved) of each segment there."""
    begin, end = window
    layout, num_steps = store.layout, len(store.steps)
    base = store.read_base(part, begin, end) if layout.parts[part].encoding == "exact" else np.empty(0, np.uint16)
    deltas = np.empty((num_steps, end - begin), np.float32)
    for row in range(num_steps):
        deltas[row] = store.read_delta(part, row, begin, end, base)
    inside = layout.segments_in(part, begin, end)
    products = np.zeros((len(inside), num_steps - old, num_steps))
    counts = np.zeros((len(inside), 2, num_steps - old), np.int64)
    for product, count, segment in zip(products, counts, inside, strict=True):
        low, high = segment.offset - begin, segment.offset - begin + segment.numel
        for left in range(low, high, _PIECE):
            piece = deltas[:, left : min(left + _PIECE, high)]
            product += _product(piece, old)
            for row in range(old, num_steps):
                moved = np.count_nonzero(piece[row] != 0)
                changed = np.count_nonzero(piece[row] != piece[row - 1]) if row else moved
                count[:, row - old] += (changed, moved)
    return _index_of(layout.segments_in(part), inside[0]), products, counts


def _product(rows: np.ndarray, old: int) -> np.ndarray:
    """``rows[old:] rows^T`` of float32 rows, in float32 unless its range is too short for the squares."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = rows[old:] @ rows.T
        largest = np.abs(product).max()
    if 1e-25 < largest < np.inf or not rows.any():
        return product
    wide = rows.astype(np.float64)
    return wide[old:] @ wide.T


def _index_of(segments: list[Segment], piece: Segment) -> int:
    return next(i for i, s in enumerate(segments) if s.tensor is piece.tensor)


# -- cache in the store -----------------------------------------------------------------------------------------------


def _load(store: TrajectoryStore, part: int) -> _PartGram | None:
    """The cached result for a prefix of the recorded steps, or None if there is none that can be trusted."""
    try:
        group = zarr.open_group(store.path, path=f"gram/{part}", mode="r")
        steps = np.asarray(group.attrs["steps"])
        if group.attrs["format_version"] != FORMAT_VERSION or not np.array_equal(steps, store.steps[: len(steps)]):
            return None
        known = _PartGram(*(np.asarray(zarr.open_array(store.path, path=f"gram/{part}/{name}", mode="r")[:])
                            for name in ("matrices", "counts")))  # fmt: skip
    except Exception:  # absent, half-written or damaged: it is derived data and computed again
        return None
    shape = (len(store.layout.segments_in(part)), len(steps), len(steps))
    if known.matrices.shape != shape or known.counts.shape != (shape[0], 3, shape[1]) or not len(steps):
        return None  # another process is replacing it
    if np.isnan(known.matrices).any() or (known.counts == _UNWRITTEN_COUNT).any():
        return None
    return known


_UNWRITTEN_COUNT = np.iinfo(np.int64).min


def _save(store: TrajectoryStore, part: int, result: _PartGram) -> None:
    """Keep a result in the store, unless somebody else is keeping one or it cannot be written.

    It has a lock of its own: what it writes is apart from the steps, so it may run while they are recorded.
    """
    with contextlib.suppress(StoreError, OSError), WriterLock(f"{store.path.rstrip('/')}.gram"):
        root = zarr.open_group(store.path, mode="r+")
        group = root.create_group(f"gram/{part}", overwrite=True)
        for name, values, fill in (
            ("matrices", result.matrices, float("nan")),
            ("counts", result.counts, _UNWRITTEN_COUNT),
        ):
            chunks, shape = (1, *values.shape[1:]), values.shape
            create_array(group, name, shape, values.dtype, chunks, shards=shape, fill_value=fill)[:] = values
        group.attrs.update({"steps": store.steps.tolist(), "format_version": FORMAT_VERSION})
