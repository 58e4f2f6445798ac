"""Exact Gram matrices: one pass over the deltas, after which no question about the run's shape
reads weights again.

For the delta matrix ``M [T, D]`` of a tensor (row ``i`` is ``theta_{s_i} - theta_0``), ``G = M M^T
[T, T]``. Gram matrices of disjoint coordinates add, so every scope is a sum of per-tensor ones.
With ``E`` the step-to-step updates and ``L`` the lower triangle of ones, ``M = L E`` and ``G = L (E
E^T) L^T``: float32 sums of products of updates, added up in float64. Sums of products of deltas
would be as good for G, and useless for what is read off its differences: on a line of 150 steps the
square of an update is 1/22500 of that of the last delta.

Shape suffixes: N tensors or groups, T steps, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from relexkit.gram_matrix.compute.device import PIECE, open_engine
from relexkit.gram_matrix.compute.distributed import ALONE, Team
from relexkit.gram_matrix.factors import factor_gram
from relexkit.gram_matrix.jumps import last_trained
from relexkit.gram_matrix.matrices import Gram, mirror
from relexkit.gram_matrix.onepass import Pass, Span, Sums, Tick, ticker
from relexkit.gram_matrix.parts import Work, added_up, assemble, moving_parts
from relexkit.gram_matrix.rates import learning_rates
from relexkit.store import ProgressCallback, TrajectoryStore
from relexkit.store.kept import common_prefix, identity, keep, kept, kept_attributes

_PARTS_OF_PROCESS = 4
"""Parts that are kept in the store at a time, for each of several processes."""


def gram(
    store: TrajectoryStore,
    *,
    device: str = "cpu",
    team: Team = ALONE,
    memory_budget_bytes: int = 2**28,
    progress: ProgressCallback | None = None,
) -> Gram:
    """Gram matrices of every moving tensor of a store, from its cache or by one pass over the
    deltas.

    Of a run with jumps (``relexkit.gram_matrix.jumps``) the steps before the first one.

    The result is kept in the store, part by part, so that an interrupted pass resumes and appended
    steps cost only their own rows. Where it cannot be kept (a read-only place, another process
    keeping one) it is used all the same.

    Args:
        device: ``cpu``, or where PyTorch computes the products (``cuda``, ``cuda:N``).
        team: every process of it makes this call; each reads its share of the columns, all get the
            whole result.

    Memory: about ``memory_budget_bytes`` whatever the number of steps and parameters, plus the
    matrices themselves.

    Raises:
        StoreError: no recorded steps, a damaged chunk (named by step and tensor), or the store was
            replaced meanwhile.
        RelexkitError: the device is not there, or another of the processes failed.
    """
    work = Work(store, open_engine(device), team, memory_budget_bytes)
    parts = moving_parts(store)
    tick = ticker(progress, "Gram matrices", sum(store.layout.parts[part].numel for part in parts))
    together = 1 if team.size == 1 else _PARTS_OF_PROCESS * team.size
    results: dict[int, _PartGram] = {}
    for first in range(0, len(parts), together):
        results |= _part_grams(work, parts[first : first + together], tick)
    store.check_unchanged()
    matrices, counts = assemble(
        store,
        {p: [r.matrices] for p, r in results.items()},
        {p: r.counts for p, r in results.items()},
    )
    sizes = np.array([t.numel for t in store.layout.moving_tensors], np.int64)
    names = tuple(t.name for t in store.layout.moving_tensors)
    rates = learning_rates(store.steps, store.metrics())
    changed, moved, unit_moves = counts
    whole = Gram(store.steps, names, sizes, matrices[0], changed, moved, unit_moves, rates=rates)
    return whole.until(last_trained(store, None))


def gram_of_columns(
    store: TrajectoryStore, part: int, span: Span, *, memory_budget_bytes: int = 2**28
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrices ``float64 [S, T, T]`` and counts ``int64 [S, 3, T]`` (changed, moved, unit
    moves) of columns ``begin:end`` of a part, for the S tensors in it; no factors.

    Those of disjoint spans add up to those of the part, so any engine may compute them, anywhere
    that the store can be opened. Keeps nothing. One pass over the columns; memory: the budget.

    Args:
        span: begins at a multiple of 65,536 and ends at one or at the end of the part.

    Raises:
        StoreError: a damaged chunk, or the store was replaced meanwhile.
    """
    num_steps = len(store.steps)
    sums = Pass(
        store=store,
        part=part,
        kernel=_OuterProducts(num_steps, 0),
        num_rows=num_steps,
        spans=[span],
        budget=memory_budget_bytes,
    ).run()
    store.check_unchanged()
    result = _of_sums(sums, None, 0, store.encoding(part).is_log)
    mirror(result.matrices)
    return result.matrices, result.counts


def known_steps(store: TrajectoryStore) -> int:
    """How many of the recorded steps the matrices kept in the store cover, in every part."""
    return min((_num_known(store, part) for part in moving_parts(store)), default=0)


@dataclass
class _PartGram:
    """Per segment of a part: ``matrices [S, T, T]`` and ``counts [S, 3, T]`` (changed, moved, unit
    moves).
    """

    matrices: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class _OuterProducts:
    """Kernel of the exact pass: ``rows[old:] rows^T`` of updates."""

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


def _part_grams(work: Work, parts: list[int], tick: Tick) -> dict[int, _PartGram]:
    """Results of some parts, whose columns the processes share."""
    store, team, num_steps = work.store, work.team, len(work.store.steps)
    known = team.share(lambda: {part: _load(store, part) for part in parts})
    missing = {
        part: 0 if found is None else found.matrices.shape[1]
        for part, found in known.items()
        if found is None or found.matrices.shape[1] < num_steps
    }
    read = [part for part in missing if store.layout.parts[part].factors is None]
    shares = team.spans(*(store.layout.parts[part].numel for part in read))
    with team.together():
        sums = {
            part: Pass(
                store=store,
                part=part,
                kernel=_OuterProducts(num_steps, missing[part]),
                num_rows=num_steps,
                old=missing[part],
                spans=spans,
                budget=work.budget,
                engine=work.engine,
                tick=tick,
            ).run()
            for part, spans in zip(read, shares, strict=True)
        }
    results = {}
    for part, found in known.items():
        if part in sums:
            total, is_log = added_up(team, sums[part]), store.encoding(part).is_log
            results[part] = _joined(_of_sums(total, found, missing[part], is_log), found)
        else:
            tick(store.layout.parts[part].numel)
            if part in missing:
                results[part] = _joined(_from_factors(work, part, missing[part]), found)
            elif found is not None:
                results[part] = found
        if part in missing and team.rank == 0:
            _save(store, part, results[part])
    return results


def _joined(result: _PartGram, known: _PartGram | None) -> _PartGram:
    """Both halves of the matrices, with what was known before."""
    mirror(result.matrices)
    if known is not None:
        old = known.matrices.shape[1]
        result.matrices[:, :old, :old] = known.matrices
        result.counts[:, :, :old] = known.counts
    return result


def _from_factors(work: Work, part: int, old: int) -> _PartGram:
    """In closed form, by the first process; the factors are small."""
    store = work.store
    matrix, counts = work.team.share(lambda: factor_gram(store, part, old, work.budget))
    result = _PartGram(
        np.zeros((1, len(store.steps), len(store.steps))),
        np.zeros((1, 3, len(store.steps)), np.int64),
    )
    result.matrices[0, old:], result.counts[0, :2, old:] = matrix, counts
    return result


def _of_sums(sums: Sums, known: _PartGram | None, old: int, is_log: bool) -> _PartGram:
    """``L (E E^T) L^T`` from rows ``old:`` of ``E E^T`` and the cached matrices of the steps
    before. A log counts how many more weights differ from the base, dense rows how many do.
    """
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
    if is_log:
        if known is not None:
            counts[:, 1, old] += known.counts[:, 1, -1]
        counts[:, 1, old:] = counts[:, 1, old:].cumsum(axis=1)
    return _PartGram(products.cumsum(axis=1).cumsum(axis=2), counts)


# -- cache in the store ----------------------------------------------------------------------------


_OF_UPDATES = {"products": "of updates"}
"""Earlier releases kept float32 products of deltas of dense rows, which are computed again."""


def _num_known(store: TrajectoryStore, part: int) -> int:
    """Steps of the run, from the first one on, whose content is that of the cached matrices."""
    return _num_common(store, part, kept_attributes(store, f"gram/{part}"))


def _num_common(store: TrajectoryStore, part: int, attributes: dict[str, Any]) -> int:
    exact = store.encoding(part).is_log or _OF_UPDATES.items() <= attributes.items()
    return common_prefix(store, part, attributes) if exact else 0


def _load(store: TrajectoryStore, part: int) -> _PartGram | None:
    """The cached result for the steps whose content it was computed from, or None if there is none
    that can be trusted.
    """
    attributes, arrays = kept(store, f"gram/{part}", ("matrices", "counts"))
    num_known = _num_common(store, part, attributes)
    if not num_known:
        return None
    num_steps = len(attributes["steps"])
    shape = (len(store.layout.segments_in(part)), num_steps, num_steps)
    if arrays["matrices"].shape != shape or arrays["counts"].shape != (shape[0], 3, shape[1]):
        return None
    return _PartGram(
        arrays["matrices"][:, :num_known, :num_known], arrays["counts"][:, :, :num_known]
    )


def _save(store: TrajectoryStore, part: int, result: _PartGram) -> None:
    """Keep a result in the store, unless another process is keeping one or it cannot be written.

    It has a lock of its own: what it writes is apart from the steps, so it may run while they are
    recorded.
    """
    arrays = {"matrices": result.matrices, "counts": result.counts}
    keep(store, f"gram/{part}", arrays, identity(store, part, len(store.steps)) | _OF_UPDATES)
