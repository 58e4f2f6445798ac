"""What a walk without any direction would show: the null beside which every ratio, R^2 and
straightness is read.

A first direction with 90 % of the variance is no evidence of a line: independent updates give 81 %,
and an optimizer's momentum raises that. So the null is made from the run itself. A drift-free walk
with the run's momentum, learning-rate schedule and rounding has the covariance ``K = L L^T`` of
``relexkit.geometry.trajectory_model``; ``W = L^-1 G L^-T`` is the Gram matrix of the run's
innovations, what each recorded step added that the optimizer's memory did not. Without a drift
their signs are arbitrary:

    analytic    G_0 = L diag(W) L^T      the expectation over all signs
    sign-flips  G_f = L (s s^T * W) L^T  random signs s

The first has the run's own step sizes and no direction; the second also keeps the chance overlaps
of few parameters. Of many steps, whose matrices would be large, ``L^-1`` is taken where it is not
negligible, and the directions of ``G_0`` are those of its rows at evenly spaced steps.

Shape suffixes: N tensors or groups, B matrices, T recorded steps, F flips, K statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from relexkit.geometry.shape import MANY_STEPS, in_blocks, leading_eigenpairs, update_products
from relexkit.geometry.trajectory_model import TrajectoryFit, fit_whole
from relexkit.gram_matrix import Gram

STATISTICS = ("first", "first_two", "r2", "cosine", "straightness", "agreement")
"""First ratio, first two together, R^2 of the first coefficient on the step, mean cosine of
neighbouring updates, distance from the base over the length of the path, |cos| of the first
direction of half the steps and of all.
"""

_MOST_FLIPS, _FEWEST_FLIPS = 199, 19
_SPACED = 128  # steps that tell the directions of a null of more than ``MANY_STEPS``
_NEGLIGIBLE = 1e-8  # of the diagonal
_FLIP_WORK = 6e6  # entries of all flipped matrices together: tenths of a second


@dataclass(frozen=True)
class WalkNull:
    """One tensor's or group's statistics beside those of its walk without direction; keys are
    ``STATISTICS``.

    Attributes:
        observed: of the run.
        expected: of the analytic null.
        low, high: 5 and 95 % of the sign-flips; NaN without flips.
        p_value: share of sign-flips at least as large as observed, itself counted; NaN without
            flips.
        num_flips: F.
    """

    observed: dict[str, float]
    expected: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    p_value: dict[str, float]
    num_flips: int
    _factor: np.ndarray
    _sizes: np.ndarray

    @property
    def gram(self) -> np.ndarray:
        """The analytic null's matrix ``G_0 [T, T]``."""
        scaled = self._factor * np.sqrt(self._sizes)
        return scaled @ scaled.T


@dataclass(frozen=True)
class Walk:
    """The walk without direction that all groups of a run share.

    Attributes:
        steps: that it is recorded at.
        factor: ``L [T, T]``.
        centered: whether statistics are about the mean checkpoint.
        flip: whether there is a fit, without which flipped signs mean little.
    """

    steps: np.ndarray
    factor: np.ndarray
    centered: bool
    flip: bool

    def num_flips(self, num_groups: int) -> int:
        """Sign-flips of each of so many groups."""
        count = int(min(_MOST_FLIPS, _FLIP_WORK // (num_groups * len(self.steps) ** 2)))
        return count if count >= _FEWEST_FLIPS and self.flip else 0

    def nulls(
        self, matrices: np.ndarray, num_flips: int, rng: np.random.Generator
    ) -> list[WalkNull]:
        """Of each of ``[N, T, T]``."""
        sizes = self._sizes(matrices)
        observed_NK = self._statistics(matrices)
        expected_NK = self._expected(sizes)
        nulls = []
        for row in range(len(matrices)):
            low, high, reached = np.full((3, len(STATISTICS)), np.nan)
            if num_flips and sizes[row].any():
                innovation = self._inverse @ matrices[row] @ self._inverse.T
                flipped = _flips(innovation, self.factor, num_flips, rng)
                flipped_FK = statistics(flipped, self.steps, centered=self.centered)
                low, high = np.quantile(flipped_FK, [0.05, 0.95], axis=0)
                reached = (1 + (flipped_FK >= observed_NK[row]).sum(axis=0)) / (1 + num_flips)
                reached[np.isnan(observed_NK[row]) | np.isnan(flipped_FK).any(axis=0)] = np.nan
            seen, walk, least, most, p_value = (
                dict(zip(STATISTICS, v.tolist(), strict=True))
                for v in (observed_NK[row], expected_NK[row], low, high, reached)
            )
            nulls.append(
                WalkNull(seen, walk, least, most, p_value, num_flips, self.factor, sizes[row])
            )
        return nulls

    @cached_property
    def _inverse(self) -> np.ndarray:
        """``L^-1 [T, T]``."""
        from scipy.linalg.lapack import dtrtri

        inverse, failed = dtrtri(self.factor, lower=1)
        assert not failed, "a Cholesky factor has no zero on its diagonal"
        found: np.ndarray = inverse
        return found

    def _sizes(self, matrices: np.ndarray) -> np.ndarray:
        """``diag(W) [N, T]``, from the part of ``L^-1`` near its diagonal that is not
        negligible.
        """
        inverse, count = self._inverse, len(self.steps)
        reach = count
        if count > MANY_STEPS:
            matters = np.abs(inverse) > _NEGLIGIBLE * np.diagonal(inverse)[:, None]
            reach = int((np.arange(count) - matters.argmax(axis=1)).max())
        sizes = np.empty((len(matrices), count))
        stride = max(64, reach)
        for begin in range(0, count, stride):
            end, first = min(count, begin + stride), max(0, begin - reach)
            rows = inverse[begin:end, first:end]
            half = rows @ matrices[:, first:end, first:end]
            sizes[:, begin:end] = (half * rows).sum(axis=2)
        return np.maximum(sizes, 0.0)

    def _expected(self, sizes: np.ndarray) -> np.ndarray:
        """Statistics ``[N, K]`` of the analytic nulls of innovations ``sizes [N, T]``."""
        factor, steps = self.factor, self.steps
        moved = np.diff(factor, axis=0, prepend=0.0)
        by_update = of_updates(
            sizes @ (moved**2).T, sizes @ (moved[1:] * moved[:-1]).T, sizes @ factor[-1] ** 2
        )
        if len(steps) > MANY_STEPS:
            middles = ((np.arange(_SPACED) + 0.5) * len(steps) / _SPACED).astype(np.int64)
            factor, steps = factor[middles], steps[middles]
        by_direction = [
            of_directions((factor * some[:, None]) @ factor.T, steps, centered=self.centered)
            for some in np.array_split(sizes, -(-len(sizes) // 64))
        ]
        return _together(np.concatenate(by_direction), by_update)

    def _statistics(self, matrices: np.ndarray) -> np.ndarray:
        def of(rows: slice) -> np.ndarray:
            return statistics(matrices[rows], self.steps, centered=self.centered)

        return np.concatenate(in_blocks(of, len(matrices)))


@dataclass(frozen=True)
class Null:
    """The nulls of N groups and the walk that they share.

    Attributes:
        momentum: of the walk, fitted to the whole run unless given.
        rounding: its share of rounding at the last step.
        fitted: the trajectory model of the whole run; None where there were too few steps or
            nothing moved.
        whole: of the sum of all groups.
    """

    momentum: float
    rounding: float
    fitted: TrajectoryFit | None
    whole: WalkNull
    _walk: Walk
    _matrices: np.ndarray
    _rng: np.random.Generator

    @cached_property
    def groups(self) -> list[WalkNull]:
        """One for each matrix."""
        if len(self._matrices) == 1:
            return [self.whole]
        return self._walk.nulls(self._matrices, self._num_flips, self._rng)

    def of(self, rows: np.ndarray) -> list[WalkNull]:
        """Of some groups; without flips, whose signs are drawn group after group, at the cost of
        these alone.
        """
        if self._num_flips or len(rows) == len(self._matrices):
            return [self.groups[row] for row in rows]
        return self._walk.nulls(self._matrices[rows], 0, self._rng)

    @property
    def _num_flips(self) -> int:
        return self._walk.num_flips(len(self._matrices))


def calibrate(
    gram: Gram, *, centered: bool = False, momentum: float | None = None, seed: int = 0
) -> Null:
    """Nulls of the N disjoint groups of ``gram``, whose sum is the whole run; those of the groups
    are computed once they are asked for.

    Args:
        centered: about the mean checkpoint instead of the base.
        momentum: of the optimizer (Adam's first beta); None to fit it.
        seed: of the signs.

    Up to 199 sign-flips a group; none where there are so many groups or steps that fewer than 19
    would fit into a few tenths of a second, the analytic null is then alone.
    """
    matrices, steps = gram.matrices, gram.steps
    whole, fitted, rounding = gram.whole, fit_whole(gram), 0.0
    if fitted is not None:
        rounding = fitted.rounding
        factor = np.linalg.cholesky(fitted.walk_covariance(momentum))
        momentum = fitted.momentum if momentum is None else momentum
    else:
        momentum = 0.0
        factor = np.linalg.cholesky(np.minimum.outer(steps, steps).astype(np.float64))
    rng = np.random.default_rng(seed)
    walk = Walk(steps, factor, centered, fitted is not None)
    [together] = walk.nulls(whole[None], walk.num_flips(1), rng)
    return Null(momentum, rounding, fitted, together, walk, matrices, rng)


def _flips(
    innovation: np.ndarray, factor: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    signs = rng.integers(0, 2, (count, len(innovation))) * 2.0 - 1
    return factor @ (innovation * signs[:, :, None] * signs[:, None, :]) @ factor.T


def statistics(matrices: np.ndarray, steps: np.ndarray, *, centered: bool = False) -> np.ndarray:
    """``STATISTICS`` of Gram matrices ``[B, T, T]``, ``float64 [B, K]``; NaN where one does not
    exist.
    """
    by_update = of_updates(*update_products(matrices), matrices[:, -1, -1])
    return _together(of_directions(matrices, steps, centered=centered), by_update)


def _together(by_direction: np.ndarray, by_update: np.ndarray) -> np.ndarray:
    """In the order of ``STATISTICS``."""
    return np.concatenate([by_direction[:, :3], by_update, by_direction[:, 3:]], axis=1)


def of_updates(squares: np.ndarray, products: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Mean cosine and straightness ``[B, 2]`` from squared norms ``[B, T]`` of updates, products of
    neighbouring ones ``[B, T - 1]``, and the squared distance of the last step ``[B]``.
    """
    norms = np.sqrt(squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products / (norms[:, 1:] * norms[:, :-1])
        defined = np.isfinite(cosines)
        cosine = np.where(defined, cosines, 0.0).sum(axis=1) / defined.sum(axis=1)
        straightness = np.sqrt(np.maximum(last, 0.0)) / norms.sum(axis=1)
    return np.stack([cosine, straightness], axis=1)


def of_directions(matrices: np.ndarray, steps: np.ndarray, *, centered: bool = False) -> np.ndarray:
    """First ratio, first two, R^2 and agreement of Gram matrices ``[B, T, T]``, ``[B, 4]``."""
    about = _center(matrices) if centered else matrices
    total = np.trace(about, axis1=1, axis2=2)
    # what rounding leaves of checkpoints that differ from the base but not from each other
    total = np.where(total > 1e-12 * np.trace(matrices, axis1=1, axis2=2), total, np.nan)
    values, vectors = leading_eigenpairs(about, min(2, len(steps)))
    half = max(1, len(steps) // 2)
    prefix = _center(matrices[:, :half, :half]) if centered else matrices[:, :half, :half]
    half_values, half_vectors = leading_eigenpairs(prefix, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(np.isnan(total[:, None]), np.nan, values)
        ratios = values / total[:, None]
        across = np.einsum(
            "bi,bij,bj->b", half_vectors[:, :, 0], matrices[:, :half], vectors[:, :, 0]
        )
        agreement = np.minimum(1.0, np.abs(across) / np.sqrt(half_values[:, 0] * values[:, 0]))
        time = steps - steps.mean()
        first = vectors[:, :, 0] - vectors[:, :, 0].mean(axis=1, keepdims=True)
        r2 = (first @ time) ** 2 / ((time**2).sum() * (first**2).sum(axis=1))
    r2[np.isnan(total) | (len(steps) < 3)] = np.nan
    return np.stack([ratios[:, 0], ratios.sum(axis=1), r2, agreement], axis=1)


def _center(matrices: np.ndarray) -> np.ndarray:
    row = matrices.mean(axis=1, keepdims=True)
    return matrices - row - row.transpose(0, 2, 1) + matrices.mean(axis=(1, 2), keepdims=True)
