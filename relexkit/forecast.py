"""Where the run goes along its own directions, with intervals that are as wide as the run's own past says.

The trajectory model's standard deviation ``s`` gives an interval for a future coefficient its shape: how it grows with the
distance. The model may also be wrong (a drift that saturates, noise with a memory), by an error that grows like the further
way ``w`` of a straight line. So the error has the variance ``f^2 s^2 + g^2 w^2``, and the run itself tells ``f`` and ``g``:
from each of several prefixes the coefficients of later recorded steps are predicted and compared. Checks of one prefix
overlap, and prefixes contain each other, so a prefix counts as half a check. The interval is that of the mixture of normal
distributions over the posterior of ``f`` and ``g``: wide where little could be checked.

Shape suffixes: T recorded steps, n of a prefix, J targets, P prefixes, R directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relexkit.linalg import single_threaded_blas
from relexkit.spectrum import decompose
from relexkit.trajectory_model import TrajectoryFit, fit_trajectory

_FACTORS = 2.0 ** np.arange(-1, 4.5, 0.5)  # f, [F]
_MISFITS = np.r_[0.0, 10.0 ** np.arange(-3, 0.26, 0.25)]  # g, [H]
# the model is right to a factor of two, most likely; its further error has no known size
_PRIOR_FH = np.outer(np.exp(-((np.log2(_FACTORS) / 1.5) ** 2) / 2), np.r_[3.0, np.ones(len(_MISFITS) - 1)])
_CHECK = 0.5  # independent checks that one prefix is worth; with 1 the intervals covered 77 % of saturating runs
_NUM_PREFIXES = 5
_FEWEST_STEPS = 4
_FARTHEST = 2.5  # times a prefix's last step: checks far beyond it are few and all of early prefixes


@dataclass(frozen=True)
class Forecast:
    """Coefficients along the first R directions of the observed run, as the trajectory model continues them.

    Attributes:
        targets: ``float64 [J]``.
        coefficients: ``float64 [J, R]``, L2 norm of weights; signs make the last observed ones positive.
        low, high: ``float64 [J, R]``, interval of ``level``.
        level: nominal coverage.
        factor: what the model's standard deviations had to be multiplied by at the last target, ``[R]``.
        num_prefixes: how many prefixes could be checked.
    """

    targets: np.ndarray
    coefficients: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    factor: np.ndarray
    num_prefixes: int


def forecast(
    matrix: np.ndarray,
    steps: np.ndarray,
    targets: Sequence[float] | np.ndarray,
    *,
    num_parameters: float,
    num_directions: int = 1,
    rates: np.ndarray | None = None,
    level: float = 0.9,
) -> Forecast:
    """Coefficients of the whole run's first directions at later steps, with intervals calibrated on the run's own past.

    Args:
        matrix: ``float64 [T, T]``, usually the sum over all tensors.
        steps: recorded steps ``[T]``.
        targets: later steps ``[J]``.
        num_parameters, rates: see ``fit_trajectory``.
        num_directions: R, at most as many as there are.

    Reads no weights; a fraction of a second for a hundred steps.

    Raises:
        ExtrapolationError: fewer than three steps, or nothing moved.
    """
    at = np.asarray(targets, np.float64)
    with single_threaded_blas():
        support, num_checked = np.log(np.repeat(_PRIOR_FH[..., None], num_directions, axis=2)), 0
        for count in _prefix_counts(steps):
            later = np.arange(count, np.searchsorted(steps, _FARTHEST * steps[count - 1], side="right"))
            prefix = matrix[:count, :count]
            if not len(later) or not np.trace(prefix) > 0:
                continue
            fit = fit_trajectory(prefix, steps[:count], num_parameters=num_parameters, rates=rates)
            axes = _axes(prefix, num_directions)
            predicted, spread, further = _along(fit, steps[later].astype(np.float64), axes)
            error = matrix[:count, later].T @ axes - predicted
            variances = _variances(spread, further)
            support[..., : axes.shape[1]] -= _CHECK * (np.log(variances) + error**2 / variances).mean(axis=2) / 2
            num_checked += 1
        fit = fit_trajectory(matrix, steps, num_parameters=num_parameters, rates=rates)
        predicted, spread, further = _along(fit, at, _axes(matrix, num_directions))
    support = support[..., : predicted.shape[1]]
    posterior = np.exp(support - support.max(axis=(0, 1)))
    posterior /= posterior.sum(axis=(0, 1))
    half = _half_widths(np.sqrt(_variances(spread, further)), posterior, level)
    plain = _half_widths(spread[None, None], np.ones((1, 1, spread.shape[1])), level)
    return Forecast(at, predicted, predicted - half, predicted + half, level, half[-1] / plain[-1], num_checked)


def _variances(spread_JR: np.ndarray, further_JR: np.ndarray) -> np.ndarray:
    """``f^2 s^2 + g^2 w^2``, ``[F, H, J, R]``."""
    return (_FACTORS[:, None, None, None] * spread_JR) ** 2 + (_MISFITS[:, None, None] * further_JR) ** 2


def _half_widths(deviations: np.ndarray, posterior: np.ndarray, level: float) -> np.ndarray:
    """Half width of the central interval of a mixture of normals about one mean, ``[J, R]``."""
    from scipy.special import erf

    low = np.zeros(deviations.shape[2:])
    high = 10 * deviations.max(axis=(0, 1))
    for _ in range(60):
        middle = (low + high) / 2
        inside = (posterior[:, :, None] * erf(middle / deviations / np.sqrt(2))).sum(axis=(0, 1))
        low, high = np.where(inside < level, middle, low), np.where(inside < level, high, middle)
    return (low + high) / 2


def _prefix_counts(steps: np.ndarray) -> np.ndarray:
    if len(steps) <= _FEWEST_STEPS:
        return np.empty(0, np.int64)
    first = max(_FEWEST_STEPS, len(steps) // 5)
    counts = np.geomspace(first, max(first, 0.9 * len(steps)), _NUM_PREFIXES).round().astype(np.int64)
    return np.unique(counts.clip(max=len(steps) - 1))


def _axes(matrix: np.ndarray, count: int) -> np.ndarray:
    """``U / S [n, R]``: what turns inner products with the observed deltas into coefficients."""
    parts = decompose(matrix)
    return parts.left[:, :count] / parts.singular_values[:count]


def _along(fit: TrajectoryFit, targets: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted coefficients, their standard deviations, and how much further a straight line would go, ``[J, R]`` each."""
    found = [fit.coefficients(targets, axis) for axis in axes.T]
    mean_JR, spread_JR = (np.stack(values, axis=1) for values in zip(*found, strict=True))
    return mean_JR, spread_JR, np.outer(targets / fit.steps[-1] - 1, np.abs(fit.gram[-1] @ axes))
