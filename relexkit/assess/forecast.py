"""Where the run goes along its own directions, with intervals that are as wide as the run's own
past says.

The trajectory model's standard deviation ``s`` gives an interval for a future coefficient its
shape: how it grows with the distance. A turning drift may also die, as the model's prediction
supposes by its age, or only turn: two centres. And the model may be wrong by an error that grows
like the further way ``w`` of a straight line. So about either centre the error has the variance
``f^2 s^2 + g^2 w^2``, and the run itself tells the centre, ``f`` and ``g``: from each of several
prefixes the coefficients of later recorded steps are predicted and compared. Checks of one prefix
overlap, and prefixes contain each other, so a prefix counts as half a check. The interval is that
of the mixture of normal distributions over the posterior of all three: wide where little could be
checked.

Shape suffixes: T recorded steps, n of a prefix, J targets, P prefixes, R directions, E centres, F
factors, H misfits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relexkit.geometry.shape import decompose
from relexkit.geometry.trajectory_model import SPACED, TrajectoryFit, fit_trajectory
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.results import Result

_FACTORS = 2.0 ** np.arange(-2, 3.25, 0.5)  # f, [F]
_MISFITS = np.r_[0.0, 10.0 ** np.arange(-3, 0.01, 0.25)]  # g, [H]
# the model is a little too cautious (chosen on simulated runs); a further error may be any share
# of a straight line's way, and that there is none is 0.03 times as likely as that there is some
# (chosen on the study's runs: docs/study/coverage.py)
_PRIOR_FH = np.outer(
    np.exp(-(((np.log2(_FACTORS) + 0.2) / 0.3) ** 2) / 2), np.r_[0.03, np.diff(_MISFITS)]
)
_CHECK = 0.5  # independent checks that one prefix is worth
_NUM_PREFIXES = 5
_FEWEST_STEPS = 4
_FARTHEST = (
    2.5  # times a prefix's last step: checks far beyond it are few and all of early prefixes
)


@dataclass(frozen=True, repr=False)
class Forecast(Result):
    """Coefficients along the first R directions of the observed run, as the trajectory model
    continues them.

    Attributes:
        targets: ``float64 [J]``.
        coefficients: ``float64 [J, R]``, L2 norm of weights; signs make the last observed ones
            positive. Those of the model's predicted weights, which suppose that a turning drift
            dies with its age.
        low, high: ``float64 [J, R]``, interval of ``level``; not centred on the coefficients.
        level: nominal coverage.
        factor: width of the interval at the last target over that of the model's own, ``[R]``.
        num_prefixes: how many prefixes could be checked.
    """

    targets: np.ndarray
    coefficients: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    factor: np.ndarray
    num_prefixes: int

    def rows(self) -> list[dict[str, Any]]:
        """A row for each target and direction."""
        return [
            {
                "target": float(target),
                "direction": k + 1,
                "coefficient": float(self.coefficients[j, k]),
                "low": float(self.low[j, k]),
                "high": float(self.high[j, k]),
            }
            for j, target in enumerate(self.targets)
            for k in range(self.coefficients.shape[1])
        ]

    def sentences(self) -> list[str]:
        """What the intervals are."""
        return [
            f"Coefficients by the trajectory model, {100 * self.level:.0f} % intervals by"
            f" {self.num_prefixes} checks in the run's own past."
        ]


def forecast(
    gram: Gram,
    targets: Sequence[float] | np.ndarray,
    *,
    num_directions: int = 1,
    level: float = 0.9,
) -> Forecast:
    """Coefficients of the whole run's first directions at later steps, with intervals calibrated on
    the run's own past.

    Args:
        gram: of tensors or groups, which are summed.
        targets: later steps ``[J]``.
        num_directions: R, at most as many as there are.

    Reads no weights; a fraction of a second for a hundred steps.

    Raises:
        ExtrapolationError: fewer than three steps, or nothing moved.
    """
    from scipy.special import ndtri

    at = np.asarray(targets, np.float64)
    steps, matrix = gram.steps, gram.whole
    size = float(gram.num_parameters.sum())
    with single_threaded_blas():
        support, num_checked = np.tile(np.log(_PRIOR_FH)[..., None], (2, 1, 1, num_directions)), 0
        for count in _prefix_counts(steps):
            later = np.arange(
                count, np.searchsorted(steps, _FARTHEST * steps[count - 1], side="right")
            )
            prefix = matrix[:count, :count]
            if not len(later) or not np.trace(prefix) > 0:
                continue
            fit = _fit(prefix, steps[:count], size, gram.rates)
            axes = _axes(prefix, num_directions)
            centres, spreads, further = _along(fit, steps[later].astype(np.float64), axes)
            errors = matrix[:count, later].T @ axes - centres
            variances = _variances(spreads, further)
            checked = np.log(variances) + errors[:, None, None] ** 2 / variances
            support[..., : axes.shape[1]] -= _CHECK * checked.mean(axis=3) / 2
            num_checked += 1
        fit = _fit(matrix, steps, size, gram.rates)
        centres, spreads, further = _along(fit, at, _axes(matrix, num_directions))
    support = support[..., : centres.shape[2]]
    posterior = np.exp(support - support.max(axis=(0, 1, 2)))
    posterior /= posterior.sum(axis=(0, 1, 2))
    deviations = np.sqrt(_variances(spreads, further))
    low, high = (
        _quantile(centres, deviations, posterior, chance)
        for chance in (0.5 - level / 2, 0.5 + level / 2)
    )
    plain = 2 * ndtri(0.5 + level / 2) * spreads[0, -1]
    return Forecast(at, centres[0], low, high, level, (high - low)[-1] / plain, num_checked)


def _fit(
    matrix: np.ndarray, steps: np.ndarray, size: float, rates: np.ndarray | None
) -> TrajectoryFit:
    return fit_trajectory(matrix, steps, num_parameters=size, rates=rates, spaced=SPACED)


def _variances(spreads_EJR: np.ndarray, further_JR: np.ndarray) -> np.ndarray:
    """``f^2 s^2 + g^2 w^2``, ``[E, F, H, J, R]``."""
    model = (_FACTORS[:, None, None, None] * spreads_EJR[:, None, None]) ** 2
    return model + (_MISFITS[:, None, None] * further_JR) ** 2


def _quantile(
    centres_EJR: np.ndarray, deviations_EFHJR: np.ndarray, posterior_EFHR: np.ndarray, chance: float
) -> np.ndarray:
    """What a mixture of normal distributions stays below with ``chance``, ``[J, R]``."""
    from scipy.special import ndtr

    far = 10 * deviations_EFHJR.max(axis=(0, 1, 2))
    low, high = centres_EJR.min(axis=0) - far, centres_EJR.max(axis=0) + far
    for _ in range(60):
        middle = (low + high) / 2
        below = ndtr((middle - centres_EJR)[:, None, None] / deviations_EFHJR)
        reached = (posterior_EFHR[:, :, :, None] * below).sum(axis=(0, 1, 2))
        low, high = (
            np.where(reached < chance, middle, low),
            np.where(reached < chance, high, middle),
        )
    return (low + high) / 2


def _prefix_counts(steps: np.ndarray) -> np.ndarray:
    if len(steps) <= _FEWEST_STEPS:
        return np.empty(0, np.int64)
    first = max(_FEWEST_STEPS, len(steps) // 5)
    counts = (
        np.geomspace(first, max(first, 0.9 * len(steps)), _NUM_PREFIXES).round().astype(np.int64)
    )
    return np.unique(counts.clip(max=len(steps) - 1))


def _axes(matrix: np.ndarray, count: int) -> np.ndarray:
    """``U / S [n, R]``: what turns inner products with the observed deltas into coefficients."""
    parts = decompose(matrix)
    return parts.left[:, :count] / parts.singular_values[:count]


def _along(
    fit: TrajectoryFit, targets: np.ndarray, axes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted coefficients with and without a fading drift and their standard deviations, ``[E,
    J, R]`` each, and how much further a straight line would go, ``[J, R]``.
    """
    predicted = np.array(
        [
            [fit.coefficients(targets, axis, fading=fading) for axis in axes.T]
            for fading in (True, False)
        ]
    )
    centres_EJR, spreads_EJR = predicted.transpose(2, 0, 3, 1)
    return (
        centres_EJR,
        spreads_EJR,
        np.outer(targets / fit.steps[-1] - 1, np.abs(fit.gram[-1] @ axes)),
    )
