"""Kinds and strengths of drift, and how well the data agree with each: what predictions average
over.

For the model see ``relexkit.geometry.trajectory_model``. Shape suffixes: T recorded steps, L kinds
of drift, C drift strengths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from relexkit.geometry.trajectory_model.likelihood import expit, with_rounding
from relexkit.geometry.trajectory_model.response import Clock

_PRIOR_PAIRS, _PRIOR_DIMENSION = (
    6,
    100,
)  # of the effective dimension, which a handful of steps cannot show
_NEGLIGIBLE = 1e-5  # posterior weights below this are left out of predictions
RATIOS = np.exp(
    np.linspace(np.log(1e-3), np.log(1e4), 60)
)  # drift-to-noise ratios averaged over, [C]
# Kinds of drift averaged over [L], in units of the last step; on coarser grids the intervals of
# forecasts are too narrow
_LIFETIMES = np.r_[2.0 ** np.arange(-5, 3.25, 0.5), np.inf]
_DECAYS = 2.0 ** np.arange(-2, 3.25, 0.25)
_PRIOR = np.r_[
    0.5 * _LIFETIMES[:-1] / (1 + _LIFETIMES[:-1]) ** 2,
    1 / (1 + _LIFETIMES[-2]),
    np.full(len(_DECAYS), 0.3 / len(_DECAYS)),
]


@dataclass(frozen=True)
class _Noise:
    """Walk and rounding: ``B`` with ``B (H R_phi H^T + nu^2 I) B^T = I``, log determinant; the
    walk's last variance.
    """

    whitener: np.ndarray
    log_determinant: float
    walk: float

    @classmethod
    def of(cls, walk: np.ndarray, rounding: float, coasted: np.ndarray) -> _Noise:
        """From the walk's covariance ``[T, T]``, the rounding as a share of its last variance, and
        how far what the momentum holds at the base carries ``[T]``.
        """
        left = np.linalg.cholesky(with_rounding(walk, rounding) + np.outer(coasted, coasted))
        return cls(np.linalg.inv(left), 2 * float(np.log(np.diag(left)).sum()), float(walk[-1, -1]))


@dataclass(frozen=True)
class Drift:
    """One kind of drift with every strength, in the basis where walk and rounding together are the
    identity.

    Attributes:
        lifetime, decay: its correlation time ``ell``, and the time ``kappa`` in which it dies out;
            at least one is infinite.
        basis: ``V [T, T]`` with ``V^T (H R_phi H^T + nu^2 I) V = I`` and ``V^T H R_d H^T V =
            diag(spread)``.
        spread: ``[T]``.
        strengths: ``tau^2 [C]``.
        scales: ``sigma^2`` summed over parameters, ``[C]``.
        losses: ``-log p`` per parameter, ``[C]``.
    """

    lifetime: float
    decay: float
    basis: np.ndarray
    spread: np.ndarray
    strengths: np.ndarray
    scales: np.ndarray
    losses: np.ndarray


def integrate(
    gram: np.ndarray, steps: np.ndarray, clock: Clock, parameters: np.ndarray, num_parameters: float
) -> tuple[list[Drift], np.ndarray, float]:
    """Kinds of drift, posterior over them and their strengths ``[L, C]``, effective dimension; what
    the walk is stays fixed.
    """
    response = clock.at(steps.astype(np.float64)).response(expit(parameters[0]))
    noise = _Noise.of(
        response.covariance(float(parameters[2])),
        float(np.exp(parameters[1])),
        parameters[3] * response.coasted(),
    )
    parts = []
    for lifetime in _LIFETIMES * steps[-1]:
        drift = response.covariance(np.exp(-1 / lifetime))
        parts.append(_drift(gram, noise, drift, lifetime, np.inf))
    for decay in _DECAYS * steps[-1]:
        reached = response.reached(decay)
        drift = np.outer(reached, reached)
        parts.append(_drift(gram, noise, drift, np.inf, decay))
    losses = np.array([part.losses for part in parts])
    effective = _effective_dimension(gram, parts[losses.min(axis=1).argmin()], num_parameters)
    posterior = _PRIOR[:, None] * np.exp(-effective * (losses - losses.min()))
    return parts, posterior / posterior.sum(), effective


def _drift(
    gram: np.ndarray, noise: _Noise, drift: np.ndarray, lifetime: float, decay: float
) -> Drift:
    spread, turned = np.linalg.eigh(noise.whitener @ drift @ noise.whitener.T)
    spread, basis = np.maximum(spread, 0.0), noise.whitener.T @ turned
    strengths = RATIOS * noise.walk / drift[-1, -1]
    inflated = 1 + strengths[:, None] * spread
    scales = (((gram @ basis) * basis).sum(axis=0) / inflated).mean(axis=1)
    losses = (
        len(gram) / 2 * np.log(scales) + (np.log(inflated).sum(axis=1) + noise.log_determinant) / 2
    )
    return Drift(lifetime, decay, basis, spread, strengths, scales, losses)


def _effective_dimension(gram: np.ndarray, part: Drift, num_parameters: float) -> float:
    """Whitened deltas of different steps have products that scatter about zero with variance 1 /
    dimension.
    """
    best = int(part.losses.argmin())
    white = part.basis / np.sqrt((1 + part.strengths[best] * part.spread) * part.scales[best])
    products = (white.T @ gram @ white)[np.triu_indices(len(gram), 1)]
    return min(
        num_parameters,
        (len(products) + _PRIOR_PAIRS) / ((products**2).sum() + _PRIOR_PAIRS / _PRIOR_DIMENSION),
    )


def kept(parts: list[Drift], posterior: np.ndarray) -> tuple[tuple[Drift, np.ndarray], ...]:
    """What predictions average over: the kinds and strengths that are not negligible, and their
    shares.
    """
    keeps = posterior > _NEGLIGIBLE
    whole = posterior[keeps].sum()
    return tuple(
        (
            replace(p, strengths=p.strengths[k], scales=p.scales[k], losses=p.losses[k]),
            share[k] / whole,
        )
        for p, share, k in zip(parts, posterior, keeps, strict=True)
        if k.any()
    )


def quantiles(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """5, 50 and 95 % of a distribution over a grid of positive values, of which the last may be
    infinite.

    Each value stands for its cell of the grid, whose ends are geometric means of neighbours: an
    interval is never narrower than the grid can tell, and what is infinite is at least known to be
    more than the last finite cell.
    """
    grid, cell_of = np.unique(values, return_inverse=True)
    mass = np.bincount(cell_of, weights) / weights.sum()
    logs = np.log(grid[np.isfinite(grid)])
    middles = (logs[1:] + logs[:-1]) / 2
    edges = np.r_[2 * logs[0] - middles[0], middles, 2 * logs[-1] - middles[-1]]
    below = np.r_[0.0, np.cumsum(mass[: len(logs)])]
    ends = np.exp(np.interp((0.05, 0.5, 0.95), below, edges))
    low, middle, high = np.where(below[-1] >= (0.05, 0.5, 0.95), ends, np.inf)
    return float(min(low, np.exp(edges[-1]))), float(middle), float(high)
