"""How straight every single weight's path is: the distribution of per-weight R^2, in one streaming
pass (arXiv 2601.04537).

For each weight, R^2 of the least-squares line of its delta on the step. Like every straightness it
needs its null: a walk without direction, of the run's own momentum, gives many weights a high R^2
too; its distribution is simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from relexkit.errors import ExtrapolationError
from relexkit.gram_matrix.jumps import last_trained
from relexkit.results import Result
from relexkit.store import ProgressCallback, TrajectoryStore, blocks
from relexkit.store.encodings.bits import Update, apply_update, clip_update
from relexkit.weights.dtypes import to_float32
from relexkit.weights.layout import scope_of

NUM_BINS = 100
"""Equal bins of R^2 from 0 to 1."""

_FEWEST_STEPS = 3
_WINDOW = 2**20
_NULL_WALKS = 20000
_SHARES = (0.1, 0.5, 0.9)  # of the weights, in a table
_HIGH = 0.9
_FLAT = 1e-12  # of a weight's energy: what rounding leaves of a constant


@dataclass(frozen=True, repr=False)
class Linearity(Result):
    """Per-weight R^2 of N tensors or groups.

    Attributes:
        steps: ``int64 [T]``.
        names: N.
        counts: ``int64 [N, NUM_BINS]``, moving weights by R^2.
        still: ``int64 [N]``, weights that never moved or moved once at the first step: they have no
            R^2.
        null: ``float64 [NUM_BINS]``, shares of the weights of a walk without direction.
    """

    steps: np.ndarray
    names: tuple[str, ...]
    counts: np.ndarray
    still: np.ndarray
    null: np.ndarray

    def scoped(self, scope: str) -> Linearity:
        """Counts over the groups of ``scope`` (``tensor``, ``layer``, ``module``, ``global``), in
        order of appearance.
        """
        members: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            members.setdefault(scope_of(name, scope), []).append(row)
        counts = np.stack([self.counts[rows].sum(axis=0) for rows in members.values()])
        still = np.array([self.still[rows].sum() for rows in members.values()])
        return replace(self, names=tuple(members), counts=counts, still=still)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each tensor or group, and the walk last: quantiles of R^2 over moving weights,
        the share of them over 0.9, and the share of still weights.
        """
        groups = [*zip(self.names, self.counts, self.still, strict=True)]
        return [
            {
                "name": name,
                **{
                    f"r2_{100 * share:.0f}": float(value)
                    for share, value in zip(_SHARES, quantiles_of(counts, _SHARES), strict=True)
                },
                "over_0.9": float(
                    counts[round(_HIGH * NUM_BINS) :].sum() / max(counts.sum(), 1e-9)
                ),
                "still": float(still / max(1, still + counts.sum())),
            }
            for name, counts, still in [*groups, ("walk without direction", self.null, 0)]
        ]

    def sentences(self) -> list[str]:
        """What the numbers are."""
        return [
            f"R² of each weight's line on the step over {len(self.steps)} steps; a walk without"
            " direction, of the run's own momentum, stands last."
        ]


def quantiles_of(counts: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """R^2 below which such shares of ``counts [NUM_BINS]`` lie, to the width of a bin; NaN if
    nothing was counted.
    """
    total = np.cumsum(counts)
    if not total[-1] > 0:
        return np.full(len(shares), np.nan)
    return (np.searchsorted(total, np.array(shares) * total[-1]) + 0.5) / NUM_BINS


def weight_linearity(
    store: TrajectoryStore,
    *,
    until: int | None = None,
    covariance: np.ndarray | None = None,
    memory_budget_bytes: int = 2**28,
    progress: ProgressCallback | None = None,
) -> Linearity:
    """R^2 of every weight's line on the step.

    Args:
        until: use only steps up to this one; of a run with jumps (``relexkit.gram_matrix.jumps``)
            those before the first one are used.
        covariance: of the walk to compare with, ``[T, T]``, such as
            ``TrajectoryFit.walk_covariance()``; None for independent updates.

    One pass over the deltas; memory is the budget, whatever the number of steps and parameters.

    Raises:
        ExtrapolationError: fewer than three steps, where every line fits.
    """
    until = last_trained(store, until)
    num_steps = (
        len(store.steps)
        if until is None
        else int(np.searchsorted(store.steps, until, side="right"))
    )
    steps = store.steps[:num_steps]
    if num_steps < _FEWEST_STEPS:
        fit = "step fits" if num_steps == 1 else "steps fit"
        raise ExtrapolationError(
            f"{num_steps} recorded {fit} every line; expected at least {_FEWEST_STEPS}: record more"
        )
    tensors = store.layout.moving_tensors
    row_of = {t.name: row for row, t in enumerate(tensors)}
    counts, still = np.zeros((len(tensors), NUM_BINS), np.int64), np.zeros(len(tensors), np.int64)
    for part, spec in enumerate(store.layout.parts):
        if not spec.moves:
            continue
        for begin, end, r2 in _windows(store, part, steps, memory_budget_bytes):
            for segment in store.layout.segments_in(part, begin, end):
                row, low = row_of[segment.tensor.name], segment.offset - begin
                values = r2[low : low + segment.numel]
                known = values[~np.isnan(values)]
                still[row] += len(values) - len(known)
                counts[row] += np.bincount(
                    np.minimum((known * NUM_BINS).astype(np.int64), NUM_BINS - 1),
                    minlength=NUM_BINS,
                )
            if progress:
                progress(
                    "linearity",
                    part * 100 + 100 * end // max(1, spec.numel),
                    len(store.layout.parts) * 100,
                )
    walk = np.minimum.outer(steps, steps).astype(np.float64) if covariance is None else covariance
    return Linearity(
        steps, tuple(t.name for t in tensors), counts, still, _null_shares(walk, steps)
    )


def _windows(
    store: TrajectoryStore, part: int, steps: np.ndarray, budget: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """``(begin, end, R^2 [end - begin])`` over a part; NaN where a weight has none."""
    spec = store.layout.parts[part]
    if not store.encoding(part).is_log:
        for begin, end in blocks(spec.numel, _WINDOW):
            base = store.read_base(part, begin, end)
            sums = _Sums(end - begin, steps)
            for row in range(len(steps)):
                sums.add(row, store.read_delta(part, row, begin, end, base))
            yield begin, end, sums.r2()
        return
    with ThreadPoolExecutor(2) as pool:
        for begin, end, updates in store.read_log(part, len(steps), budget // 2, pool):
            for low, high in blocks(end - begin, _WINDOW):
                yield (
                    begin + low,
                    begin + high,
                    _sparse_r2(store, part, (begin + low, begin + high), updates, steps),
                )


def _sparse_r2(
    store: TrajectoryStore,
    part: int,
    window: tuple[int, int],
    updates: list[Update],
    steps: np.ndarray,
) -> np.ndarray:
    """Only weights that ever change take part."""
    begin, end = window
    dtype, state = store.layout.parts[part].dtype, store.read_base(part, begin, end)
    clipped = [clip_update(update, begin, end) for update in updates]
    touched = np.zeros(end - begin, bool)
    for local, _ in clipped:
        touched[local] = True
    slot_of = np.cumsum(touched.astype(np.int32)) - 1
    current = np.zeros(int(touched.sum()), np.float32)
    sums = _Sums(len(current), steps)
    for row, (local, differences) in enumerate(clipped):
        before, after = apply_update(state, local, differences)
        current[slot_of[local]] += to_float32(after, dtype) - to_float32(before, dtype)
        sums.add(row, current)
    r2 = np.full(end - begin, np.nan)
    r2[touched] = sums.r2()
    return r2


class _Sums:
    """Running sums of every weight's delta, its square, and its product with the centred step."""

    def __init__(self, width: int, steps: np.ndarray):
        self._time = steps - steps.mean()
        self._sum, self._square, self._product = np.zeros((3, width))

    def add(self, row: int, delta: np.ndarray) -> None:
        wide = delta.astype(np.float64)
        self._sum += wide
        self._square += wide**2
        self._product += self._time[row] * wide

    def r2(self) -> np.ndarray:
        spread = self._square - self._sum**2 / len(self._time)
        spread[spread <= _FLAT * self._square] = np.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.minimum(self._product**2 / ((self._time**2).sum() * spread), 1.0)


def _null_shares(covariance: np.ndarray, steps: np.ndarray) -> np.ndarray:
    size = len(covariance)
    factor = np.linalg.cholesky(covariance + 1e-12 * covariance[-1, -1] * np.eye(size))
    walks = factor @ np.random.default_rng(0).standard_normal((size, _NULL_WALKS))
    sums = _Sums(_NULL_WALKS, steps)
    for row in range(size):
        sums.add(row, walks[row])
    r2 = sums.r2()
    counts = np.bincount(
        np.minimum((r2 * NUM_BINS).astype(np.int64), NUM_BINS - 1), minlength=NUM_BINS
    )
    return counts / counts.sum()
