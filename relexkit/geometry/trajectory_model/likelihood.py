"""The likelihood of the trajectory model and its greatest value: momentum, rounding, memory, and a
drift that turns.

See ``relexkit.geometry.trajectory_model`` for the model.
"""

from __future__ import annotations

import numpy as np

from relexkit.geometry.trajectory_model.response import Clock, Response

_JITTER = 1e-10  # of the last step's variance: keeps the factorisation of a noiseless line finite
_NUDGE = 1e-5  # of the search's coordinates, for slopes
# logit of momentum, log rounding, memory of the noise, carried momentum, log drift-to-noise ratio,
# log correlation time over the last step
START = (2.2, -8.0, 0.0, 0.0, 0.0, -0.7)
_BOUNDS = np.array([(-6.0, 4.0), (-16.0, 6.0), (0.0, 0.9), (0.0, 30.0), (-10.0, 10.0), (-5.0, 4.0)])
# the first step of the search has length one: in these units it does not leap from no memory to
# the most there is, from where it can end in an optimum with all of the momentum taken for memory
_UNITS = np.array([1.0, 1.0, 0.1, 1.0, 1.0, 1.0])
WALK = 4
"""So many of these, the first ones, describe the walk."""
ALONE, CONTINUED = (0, 1, 2), (1, 2, 3)
"""Those of the walk that are searched: of a run, and of a stretch inside one whose momentum is
known.
"""


def search(
    gram: np.ndarray,
    steps: np.ndarray,
    clock: Clock,
    start: tuple[float, ...],
    free: tuple[int, ...] = ALONE,
) -> tuple[float, np.ndarray]:
    """Least ``-log p`` per parameter over the ``free`` parameters of the walk and, if the start has
    them, strength and life of a drift; the others stay.
    """
    from scipy.linalg.lapack import (
        dpotrf,
        dpotri,
    )  # half the time of a fit is the overhead of calls
    from scipy.optimize import minimize

    times, origin, eye = steps.astype(np.float64), np.array(start), np.eye(len(steps))
    grid = clock.at(times)
    places = np.r_[np.array(free), np.arange(WALK, len(origin))]
    units, center = _UNITS[places], origin[places]

    def drift_of(response: Response, lifetime: float, unit: float) -> np.ndarray:
        """Covariance of the drift, which has variance ``unit`` at the last step."""
        if len(origin) == WALK:
            return np.zeros((len(times), len(times)))
        drift = response.covariance(np.exp(-np.exp(-lifetime) / times[-1]))
        return unit / drift[-1, -1] * drift

    def loss(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        x = units * scaled
        there = np.r_[origin, 0.0, 0.0][: len(START)]
        there[places] = x
        momentum, noise, memory, carried, ratio, lifetime = there
        response, turned = (grid.response(expit(m)) for m in (momentum, momentum + _NUDGE))
        walk = response.covariance(memory)
        unit = walk[-1, -1]
        drift = drift_of(response, lifetime, unit)
        coasted, turned_coasted = response.coasted(), turned.coasted()
        coasting = np.outer(coasted, coasted)
        covariance = walk + carried**2 * coasting + np.exp(noise) * unit * eye
        covariance += np.exp(ratio) * drift
        covariance += _JITTER * covariance[-1, -1] * eye
        left, failed = dpotrf(covariance, lower=1)
        assert not failed, "jitter keeps every covariance within the bounds positive definite"
        lower, _ = dpotri(left, lower=1)
        inverse = np.tril(lower) + np.tril(lower, -1).T
        explained = inverse @ gram
        energy = np.trace(explained)
        value = len(times) / 2 * np.log(energy / len(times)) + np.log(np.diag(left)).sum()
        # d value = tr(pull dK); the filters behind the correlations are differenced, the rest is
        # exact
        pull = inverse / 2 - len(times) / (2 * energy) * explained @ inverse

        def slope(walk_there: np.ndarray, drift_there: np.ndarray) -> np.ndarray:
            moved = walk_there - walk + np.exp(ratio) * (drift_there - drift)
            return (moved + np.exp(noise) * (walk_there[-1, -1] - unit) * eye) / _NUDGE

        faster, longer = turned.covariance(memory), response.covariance(memory + _NUDGE)
        turning = np.outer(turned_coasted, turned_coasted) - coasting
        slopes = [
            slope(faster, drift_of(turned, lifetime, faster[-1, -1]))
            + carried**2 * turning / _NUDGE,
            np.exp(noise) * unit * eye,
            slope(longer, longer[-1, -1] / unit * drift),
            2 * carried * coasting,
            np.exp(ratio) * drift,
            slope(walk, drift_of(response, lifetime + _NUDGE, unit)),
        ]
        gradient = np.array([(pull * slopes[place]).sum() for place in places])
        # the last term holds what the steps do not determine near the start
        value += 1e-6 * ((x - center) ** 2).sum()
        return float(value), units * (gradient + 2e-6 * (x - center))

    best = minimize(
        loss,
        center / units,
        jac=True,
        method="L-BFGS-B",
        bounds=_BOUNDS[places] / units[:, None],
        options={"ftol": 3e-8, "maxiter": 50},
    )
    found = origin.copy()
    found[places] = units * best.x
    return float(best.fun), found


def with_rounding(walk: np.ndarray, rounding: float) -> np.ndarray:
    """The walk's covariance with rounding, a share of its last variance, on the diagonal; positive
    definite.
    """
    return walk + (rounding + _JITTER) * walk[-1, -1] * np.eye(len(walk))


def logit(share: float) -> float:
    """From a share to a logit."""
    return float(np.log(share / (1 - share)))


def expit(value: float) -> float:
    """From a logit to a share."""
    return float(1 / (1 + np.exp(-value)))
