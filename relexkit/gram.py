"""Temporal Gram matrices: one pass over the deltas, after which no question about the run's shape reads weights again.

For the delta matrix ``M [T, D]`` of a tensor (row ``i`` is ``theta_{s_i} - theta_0``), ``G = M M^T [T, T]``. Gram matrices
of disjoint coordinates add, so every scope is a sum of per-tensor ones. From the sparse log, with ``E`` the float values
of the step-to-step updates and ``L`` the lower triangle of ones, ``M = L E`` and ``G = L (E E^T) L^T``.

Shape suffixes: N tensors or groups, T steps, D columns.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr

from relexkit.device import PIECE, Engine, open_engine
from relexkit.distributed import ALONE, Team
from relexkit.errors import RelexkitError, StoreError
from relexkit.factors import factor_gram
from relexkit.jumps import last_trained
from relexkit.layout import scope_of
from relexkit.onepass import Pass, Sums, Tick, ticker
from relexkit.store import (
    FORMAT_VERSION,
    ProgressCallback,
    TrajectoryStore,
    WriterLock,
    create_array,
    describe_steps,
)

ROUNDING_ERROR = 1e-6
"""Error of an exact Gram matrix as a share of its trace: products of at most 8192 columns are summed in float32."""


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
        uncertainty: ``float64 [N, T]``: for the leading ``n x n`` block, how far it may be off along its first two
            directions, in the spectral norm: rounding, and for a randomized result the estimated error of the approximation.
            Taken as rounding alone if not given.
    """

    steps: np.ndarray
    names: tuple[str, ...]
    num_parameters: np.ndarray
    matrices: np.ndarray
    changed: np.ndarray
    moved: np.ndarray
    unit_moves: np.ndarray
    uncertainty: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if not self.uncertainty.size:
            object.__setattr__(self, "uncertainty", rounding_error(self.matrices))

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
            self.changed[:, :count], self.moved[:, :count], self.unit_moves[:, :count], self.uncertainty[:, :count],
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
        return Gram(
            self.steps, names, add(self.num_parameters), add(self.matrices), add(self.changed), add(self.moved), unit,
            add(self.uncertainty),
        )  # fmt: skip

    def groups(self, scope: str) -> list[str]:
        """For each of the N names, the group of ``scope`` that it falls into."""
        return [scope_of(name, scope) for name in self.names]


def rounding_error(matrices: np.ndarray) -> np.ndarray:
    """``Gram.uncertainty`` of exact ``matrices [N, T, T]``."""
    return ROUNDING_ERROR * np.einsum("nii->ni", matrices).cumsum(axis=1)


def gram(
    store: TrajectoryStore,
    *,
    device: str = "cpu",
    team: Team = ALONE,
    memory_budget_bytes: int = 2**28,
    progress: ProgressCallback | None = None,
) -> Gram:
    """Gram matrices of every moving tensor of a store, from its cache or by one pass over the deltas.

    Of a run with jumps (``relexkit.jumps``) the steps before the first one.

    The result is kept in the store, part by part, so that an interrupted pass resumes and appended steps cost only their
    own rows. Where it cannot be kept (a read-only place, another process keeping one) it is used all the same.

    Args:
        device: ``cpu``, or where PyTorch computes the products (``cuda``, ``cuda:N``).
        team: every process of it makes this call; each reads its share of the columns, all get the whole result.

    Memory: about ``memory_budget_bytes`` whatever the number of steps and parameters, plus the matrices themselves.

    Raises:
        StoreError: no recorded steps, a damaged chunk (named by step and tensor), or the store was replaced meanwhile.
        RelexkitError: the device is not there, or another of the processes failed.
    """
    engine = open_engine(device)
    parts = moving_parts(store)
    tick = ticker(progress, "Gram matrices", sum(store.layout.parts[part].numel for part in parts))
    results = {part: _part_gram(store, part, memory_budget_bytes, engine, team, tick) for part in parts}
    check_unchanged(store)
    matrices, counts = assemble(store, {p: [r.matrices] for p, r in results.items()}, {p: r.counts for p, r in results.items()})
    sizes = np.array([t.numel for t in store.layout.moving_tensors], np.int64)
    names = tuple(t.name for t in store.layout.moving_tensors)
    return Gram(store.steps, names, sizes, matrices[0], *counts).until(last_trained(store, None))


def moving_parts(store: TrajectoryStore) -> list[int]:
    """Parts that have deltas.

    Raises:
        StoreError: no step is recorded.
    """
    if not len(store.steps):
        raise StoreError(f"{store.path}: holds no steps; import or record some first")
    return [p for p, part in enumerate(store.layout.parts) if part.encoding != "fixed" and part.numel]


def known_steps(store: TrajectoryStore) -> int:
    """How many of the recorded steps the matrices that are kept in the store cover, in every part."""
    covered = []
    for part in moving_parts(store):
        try:
            steps = np.asarray(zarr.open_group(store.path, path=f"gram/{part}", mode="r").attrs["steps"])
        except Exception:  # absent or damaged
            return 0
        covered.append(len(steps) if np.array_equal(steps, store.steps[: len(steps)]) else 0)
    return min(covered, default=0)


def check_unchanged(store: TrajectoryStore) -> None:
    """Refuse results of a pass during which the store was replaced; steps that were added do not matter.

    Raises:
        StoreError: it is gone or another one.
    """
    try:
        now = TrajectoryStore(store.path)
        same = now.attributes == store.attributes and np.array_equal(now.steps[: len(store.steps)], store.steps)
    except StoreError:
        same = False
    if not same:
        raise StoreError(f"{store.path}: was replaced while it was read; run the command again when nothing writes it")


def assemble(
    store: TrajectoryStore, arrays: dict[int, list[np.ndarray]], counts: dict[int, np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Arrays ``[S, ...]`` and counts ``[S, 3, T]`` of parts -> summed over parts, ``[N, ...]`` and ``[3, N, T]``."""
    tensors = store.layout.moving_tensors
    row_of = {tensor.name: row for row, tensor in enumerate(tensors)}
    some, num_steps = next(iter(arrays.values())), next(iter(counts.values())).shape[2]
    totals = [np.zeros((len(tensors), *array.shape[1:])) for array in some]
    total_counts = np.zeros((3, len(tensors), num_steps), np.int64)
    for part, found in arrays.items():
        rows = [row_of[s.tensor.name] for s in store.layout.segments_in(part)]
        for total, array in zip(totals, found, strict=True):
            total[rows] += array  # a tensor has at most one segment in a part
        total_counts[:, rows] += counts[part].transpose(1, 0, 2)
    dense = [row for row, t in enumerate(tensors) if store.layout.parts[t.part].encoding != "sparse"]
    total_counts[2, dense] = -1
    return totals, total_counts


@dataclass
class _PartGram:
    """Per segment of a part: ``matrices [S, T, T]`` and ``counts [S, 3, T]`` (changed, moved, unit moves)."""

    matrices: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class _OuterProducts:
    """Kernel of the exact pass: ``rows[old:] rows^T``."""

    num_rows: int
    old: int
    of_updates: bool = True
    width: int = PIECE

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.num_rows - self.old, self.num_rows),)

    def constants(self, segment: int) -> tuple[np.ndarray, ...]:
        return ()

    def product(self, rows: Any, *constants: Any) -> list[Any]:
        return [rows[self.old :] @ rows.T]


def _part_gram(store: TrajectoryStore, part: int, budget: int, engine: Engine, team: Team, tick: Tick) -> _PartGram:
    known = team.share(lambda: _load(store, part))
    num_steps, old = len(store.steps), 0 if known is None else known.matrices.shape[1]
    if known is not None and old == num_steps:
        tick(store.layout.parts[part].numel)
        return known
    encoding = store.layout.parts[part].encoding
    if encoding == "factors":
        result = _from_factors(store, part, old, budget, team)
        tick(store.layout.parts[part].numel)
    else:
        kernel = _OuterProducts(num_steps, old)
        sums = run_shared(store, part, kernel, num_steps, old, budget, engine, team, tick)
        result = (_from_sparse if encoding == "sparse" else _from_dense)(sums, known, old)
    result.matrices[:, :, old:] = result.matrices[:, old:, :].transpose(0, 2, 1)
    if known is not None:
        result.matrices[:, :old, :old] = known.matrices
        result.counts[:, :, :old] = known.counts
    if team.rank == 0:
        _save(store, part, result)
    return result


def run_shared(
    store: TrajectoryStore, part: int, kernel: Any, num_rows: int, old: int, budget: int, engine: Engine,
    team: Team, tick: Tick,
) -> Sums:  # fmt: skip
    """One pass over a part, its columns divided among the processes; every process gets the sums."""
    spans = team.spans(store.layout.parts[part].numel, part)
    work = Pass(
        store=store, part=part, kernel=kernel, num_rows=num_rows, old=old, spans=spans, budget=budget, engine=engine, tick=tick
    )
    with team.together():
        sums = work.run()
    return Sums([team.sum(product) for product in sums.products], team.sum(sums.counts))


def _from_factors(store: TrajectoryStore, part: int, old: int, budget: int, team: Team) -> _PartGram:
    """In closed form, by the first process; the factors are small."""
    matrix, counts = team.share(lambda: factor_gram(store, part, old, budget))
    result = _PartGram(np.zeros((1, len(store.steps), len(store.steps))), np.zeros((1, 3, len(store.steps)), np.int64))
    result.matrices[0, old:], result.counts[0, :2, old:] = matrix, counts
    return result


def _from_dense(sums: Sums, known: _PartGram | None, old: int) -> _PartGram:
    num_segments, _, num_steps = sums.products[0].shape
    result = _PartGram(np.zeros((num_segments, num_steps, num_steps)), np.zeros((num_segments, 3, num_steps), np.int64))
    result.matrices[:, old:] = sums.products[0]
    result.counts[:, :, old:] = sums.counts
    return result


def _from_sparse(sums: Sums, known: _PartGram | None, old: int) -> _PartGram:
    """``L (E E^T) L^T`` from rows ``old:`` of ``E E^T`` and the cached matrices of the steps before."""
    num_segments, _, num_steps = sums.products[0].shape
    products = np.zeros((num_segments, num_steps, num_steps))
    products[:, old:] = sums.products[0]
    counts = np.zeros((num_segments, 3, num_steps), np.int64)
    counts[:, :, old:] = sums.counts
    if known is not None:
        products[:, :old, old:] = products[:, old:, :old].transpose(0, 2, 1)
        # E E^T of the cached steps: the inverse of the two cumulative sums
        padded = np.pad(known.matrices, ((0, 0), (1, 0), (1, 0)))
        products[:, :old, :old] = np.diff(np.diff(padded, axis=1), axis=2)
        counts[:, 1, old] += known.counts[:, 1, -1]
    counts[:, 1, old:] = counts[:, 1, old:].cumsum(axis=1)
    return _PartGram(products.cumsum(axis=1).cumsum(axis=2), counts)


# -- cache in the store -----------------------------------------------------------------------------------------------


def _load(store: TrajectoryStore, part: int) -> _PartGram | None:
    """The cached result for a prefix of the recorded steps, or None if there is none that can be trusted."""
    attributes, arrays = kept(store, f"gram/{part}", ("matrices", "counts"))
    steps = np.asarray(attributes.get("steps", []))
    if not len(steps) or not np.array_equal(steps, store.steps[: len(steps)]):
        return None
    shape = (len(store.layout.segments_in(part)), len(steps), len(steps))
    if arrays["matrices"].shape != shape or arrays["counts"].shape != (shape[0], 3, shape[1]):
        return None  # another process is replacing it
    return _PartGram(arrays["matrices"], arrays["counts"])


def kept(store: TrajectoryStore, name: str, keys: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attributes and whole arrays that ``keep`` left in group ``name``; empty if they are absent, damaged or half-written."""
    try:
        group = zarr.open_group(store.path, path=name, mode="r")
        arrays = {key: np.asarray(zarr.open_array(store.path, path=f"{name}/{key}", mode="r")[:]) for key in keys}
        attributes = dict(group.attrs)
    except Exception:  # it is derived data and computed again
        return {}, {}
    unwritten = any((a == _UNWRITTEN_COUNT).any() if a.dtype == np.int64 else np.isnan(a).any() for a in arrays.values())
    return ({}, {}) if unwritten or attributes.get("format_version") != FORMAT_VERSION else (attributes, arrays)


_UNWRITTEN_COUNT = np.iinfo(np.int64).min


def _save(store: TrajectoryStore, part: int, result: _PartGram) -> None:
    """Keep a result in the store, unless somebody else is keeping one or it cannot be written.

    It has a lock of its own: what it writes is apart from the steps, so it may run while they are recorded.
    """
    arrays = {"matrices": result.matrices, "counts": result.counts}
    keep(store, f"gram/{part}", arrays, {"steps": store.steps.tolist()})


def keep(store: TrajectoryStore, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    """Keep derived ``arrays [S, ...]`` in group ``name`` of a store, if nobody else does and it can be written."""
    with contextlib.suppress(StoreError, OSError), WriterLock(f"{store.path.rstrip('/')}.gram"):
        group = zarr.open_group(store.path, mode="r+").create_group(name, overwrite=True)
        for key, values in arrays.items():
            fill = _UNWRITTEN_COUNT if values.dtype == np.int64 else float("nan")
            chunks, shape = (1, *values.shape[1:]), values.shape
            create_array(group, key, shape, values.dtype, chunks, shards=shape, fill_value=fill)[:] = values
        group.update_attributes({**attributes, "format_version": FORMAT_VERSION})
