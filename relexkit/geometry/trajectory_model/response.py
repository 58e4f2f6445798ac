"""How gradients become recorded deltas: the optimizer's momentum, its bias correction and learning
rate, as a linear map.

The state of the optimizer is its momentum, that of gradients with a memory the latest gradient. So
what a recorded step has in common with a later one follows from what it has in common with the
state at its own time, and covariances take one walk over the optimizer's steps and one number for
each pair of recorded steps: no matrix over optimizer steps is formed.

Shape suffixes: T recorded steps, S grid points of optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_LEAST = 1e-12  # momenta and correlations below are as good as none


@dataclass(frozen=True)
class Clock:
    """How optimizer steps lead to recorded deltas: the known part of the model.

    Attributes:
        unit: optimizer steps per grid point; 1 unless the run is longer than the grid.
        history: gradients before the base that the optimizer remembers; 0 for an optimizer that
            starts with the run.
        rates: learning rate by optimizer step (any unit), ``[S]``, or None for a constant one.
    """

    unit: float
    history: int
    rates: np.ndarray | None

    def at(self, times: np.ndarray) -> Grid:
        """The grid up to the last of ``times [T]``, ascending and positive."""
        return Grid(self, times)


class Grid:
    """Grid points between the base and recorded steps, the same whatever the momentum is.

    Attributes:
        clock: whose grid it is.
        times: ``float64 [T]``, ascending.
        last: grid point of the last update of each recorded step, ``int64 [T]``.
        share: of that update that has been made, above 0 and at most 1, ``[T]``.
        middles: of the grid points, in optimizer steps, ``[S]``.
        rates: learning rates there, ``[S]``.
        points: those after the first recorded step.
        interval, offset: the recorded step before each of them, and how many points ago it was.
    """

    def __init__(self, clock: Clock, times: np.ndarray):
        self.clock, self.times = clock, times
        self.last = np.ceil(times / clock.unit).astype(np.int64) - 1
        self.share = times / clock.unit - self.last
        self.middles = (np.arange(self.last[-1] + 1) + 0.5) * clock.unit
        self.rates = np.ones(len(self.middles))
        if clock.rates is not None:
            # beyond its end a schedule keeps its last rate
            known = np.minimum(self.middles, len(clock.rates) - 1).astype(np.int64)
            self.rates = clock.rates[known]
        self.points = np.arange(self.last[0] + 1, self.last[-1] + 1)
        self.interval = np.searchsorted(self.last, self.points) - 1
        self.offset = self.points - self.last[self.interval]

    @cached_property
    def lags(self) -> np.ndarray:
        """Grid points to each recorded step from each one up to it, -1 from later ones, ``[T,
        T]``.
        """
        lags = self.last[:, None] - self.last
        return np.where(np.tri(len(lags), dtype=bool), lags, -1)

    def response(self, momentum: float) -> Response:
        """What gradients lead to by an optimizer with this momentum."""
        return Response(self, momentum)


class Response:
    """The deltas of one parameter, of any scale, at recorded steps, by an optimizer with a given
    momentum.
    """

    def __init__(self, grid: Grid, momentum: float):
        clock, count = grid.clock, len(grid.middles)
        self._grid, self._history = grid, clock.history
        self._beta = beta = max(momentum**clock.unit, _LEAST)
        self._places = np.arange(count + 1)
        self._ages = np.arange(1, clock.history + count + 1)
        ages = self._ages[clock.history :]
        self._updates = grid.rates * (1 - beta) / (1 - beta**ages)  # of a unit of momentum, [S]
        self._faded = _powers(beta, self._places)
        self._gains = self._between(self._faded)

    def coasted(self) -> np.ndarray:
        """What a unit of gradient at every step before the base adds, ``[T]``: how far its momentum
        carries.
        """
        return self._of_gradients(np.zeros(len(self._updates)))

    def reached(self, scale: float) -> np.ndarray:
        """Deltas of gradients that die out as ``exp(-step / scale)``, ``[T]``."""
        return self._of_gradients(np.exp(-self._grid.middles / scale))

    def variance(self, correlation: float) -> np.ndarray:
        """The diagonal of ``covariance``, ``[T]``."""
        return self._moments(self._rho(correlation))[0]

    def covariance(self, correlation: float, count: int | None = None) -> np.ndarray:
        """Covariance of the deltas by gradients of which neighbours correlate by 0 (white noise) to
        1 (a line), ``[T, T]`` or of the first ``count`` steps.
        """
        rho, some = self._rho(correlation), slice(0, count)
        variance, with_momentum, with_gradient = (v[some] for v in self._moments(rho))
        lags = self._grid.lags[some, some]
        known = lags[:-1]  # from each step to the beginning of each interval between later ones
        gains = self._gains[: len(known), None]
        gained = self._faded[known]
        gained *= with_momentum
        if rho:
            remembered, turned = self._by_gradient(rho)
            gained += turned[known] * with_gradient
        gained *= gains
        if rho:
            left = remembered[known]
            left *= with_gradient
            left *= self._between(turned)[: len(known), None]
            gained += left
        covariance = np.empty(lags.shape)
        covariance[0] = 0.0
        np.cumsum(gained, axis=0, out=covariance[1:])
        covariance += variance
        return np.where(lags < 0, covariance.T, covariance)

    def onward(self, correlation: float, known: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Covariance of the first n steps, whose own ``known [n, n]`` is, with the later ones, to
        which gradients after the first n add only a ``share [S]`` by grid point, ``[n, T - n]``.
        """
        count = len(known)
        rho, grid = self._rho(correlation), self._grid
        _, with_momentum, with_gradient = (v[:count] for v in self._moments(rho))
        remembered, turned = self._by_gradient(rho)
        last = grid.last[count - 1]
        lags = last - grid.last[:count]
        momentum_there = with_momentum * self._faded[lags] + with_gradient * turned[lags]
        after = np.maximum(self._places[:-1] - last, -1)
        gradients = np.where(after > 0, share * remembered[after], 0.0)
        carried, renewed = (
            (reached := self._reach(momenta))[count:] - reached[count - 1]
            for momenta in (self._faded[after], _filtered(gradients, self._beta))
        )
        ahead = np.outer(momentum_there, carried)
        ahead += np.outer(with_gradient * remembered[lags], renewed)
        return ahead + known[:, -1:]

    def _rho(self, correlation: float) -> float:
        """Correlation of the gradients of neighbouring grid points."""
        rho = correlation**self._grid.clock.unit
        return float(rho) if rho > _LEAST else 0.0

    def _of_gradients(self, gradients: np.ndarray) -> np.ndarray:
        """Deltas of one series of gradients ``[S]``, with those before the base 1."""
        series = np.r_[np.ones(self._history), gradients]
        return self._reach(_filtered(series, self._beta)[self._history :])

    def _reach(self, momenta: np.ndarray) -> np.ndarray:
        """Deltas ``[T]`` of momenta ``[S]``."""
        steps, grid = self._updates * momenta, self._grid
        return (np.cumsum(steps) - steps)[grid.last] + grid.share * steps[grid.last]

    def _moments(self, rho: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Covariance of the delta of each recorded step with itself, and with momentum and gradient
        of its last update, ``[T]`` each.
        """
        beta = self._beta
        mixed = (1 - _powers(beta * rho, self._ages)[:-1]) / (
            1 - beta * rho
        )  # of gradient and momentum
        momenta = _filtered(1 + 2 * beta * rho * _before(mixed), beta**2)
        mixed, momenta = mixed[self._history :], momenta[self._history :]
        gradient_before = rho * _before(_filtered(self._updates * mixed, rho))
        own = self._updates * momenta
        momentum_before = gradient_before + beta * _before(_filtered(gradient_before + own, beta))
        grown = self._updates * (2 * momentum_before + own)
        at, share = self._grid.last, self._grid.share
        made = share * self._updates[at]
        return (
            (np.cumsum(grown) - grown)[at] + made * (2 * momentum_before[at] + made * momenta[at]),
            momentum_before[at] + made * momenta[at],
            gradient_before[at] + made * mixed[at],
        )

    def _by_gradient(self, rho: float) -> tuple[np.ndarray, np.ndarray]:
        """What is left of a gradient, and what it has added to the momentum, at every lag."""
        beta = self._beta
        remembered = _powers(rho, self._places)
        low, high = min(beta, rho), max(beta, rho)
        if not rho:
            return remembered, np.zeros(len(remembered))
        if low == high:
            return remembered, _at_lags(self._places) * remembered
        # rho (rho^lag - beta^lag) / (rho - beta), without cancellation
        less = np.expm1(np.log1p((low - high) / high) * self._places)
        greater = remembered if high == rho else self._faded
        return remembered, _at_lags(-rho / (high - low) * less) * greater

    def _between(self, momentum: np.ndarray) -> np.ndarray:
        """What each recorded step's momentum, as it is at every lag, adds until the next, ``[T -
        1]``.
        """
        grid, updates = self._grid, self._updates
        added = np.bincount(
            grid.interval, updates[grid.points] * momentum[grid.offset], len(grid.last) - 1
        )
        missing = (1 - grid.share) * updates[grid.last]
        return added + missing[:-1] * momentum[0] - missing[1:] * momentum[np.diff(grid.last)]


def _at_lags(values: np.ndarray) -> np.ndarray:
    """Values by lag, and 0 for lag -1."""
    by_lag = np.empty(len(values) + 1)
    by_lag[:-1], by_lag[-1] = values, 0.0
    return by_lag


def _powers(ratio: float, lags: np.ndarray) -> np.ndarray:
    """``_at_lags(ratio**lags)``, in a third of the time."""
    return _at_lags(np.exp(np.log(ratio) * lags) if ratio else (lags == 0).astype(np.float64))


def _before(values: np.ndarray) -> np.ndarray:
    """Of the grid point before; 0 at the first."""
    before = np.empty_like(values)
    before[0], before[1:] = 0.0, values[:-1]
    return before


def _filtered(values: np.ndarray, ratio: float) -> np.ndarray:
    """``y[s] = x[s] + ratio y[s - 1]``, ``float64 [S]``.

    A banded triangular system: LAPACK is there anyway, and importing ``scipy.signal`` for its
    filter takes a second.
    """
    from scipy.linalg.lapack import dtbtrs

    bands = np.ones((2, len(values)), order="F")
    bands[1] = -ratio
    summed, failed = dtbtrs(bands, values[:, None], uplo="L", trans="N")
    assert not failed, "a unit diagonal is never singular"
    return summed[:, 0]
