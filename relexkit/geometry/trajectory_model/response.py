"""How gradients become recorded deltas: the optimizer's momentum, its bias correction and learning
rate, as a linear map.

Shape suffixes: T recorded steps, S grid points of optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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

    def response(self, steps: np.ndarray, momentum: float) -> np.ndarray:
        """``H``: what a unit gradient at every grid point adds to the delta of every step,
        ``[len(steps), S]``.
        """
        count = int(np.ceil(steps.max() / self.unit))
        padded = np.zeros((len(steps), self.history + count))
        response = padded[:, self.history :]
        np.clip(steps[:, None] / self.unit - np.arange(count), 0.0, 1.0, out=response)
        if self.rates is not None:
            # beyond its end a schedule keeps its last rate
            at = np.minimum((np.arange(count) + 0.5) * self.unit, len(self.rates)).astype(np.int64)
            response *= self.rates[np.minimum(at, len(self.rates) - 1)]
        beta = momentum**self.unit
        response *= (1 - beta) / (1 - beta ** (np.arange(1, count + 1) + self.history))
        return _summed(padded, beta, backwards=True)

    def coasted(self, response: np.ndarray) -> np.ndarray:
        """What a unit of gradient at every step before the base adds, ``[len(response)]``: how far
        its momentum carries.
        """
        return response[:, : self.history].sum(axis=1)

    def covariance(
        self, response: np.ndarray, correlation: float, white: np.ndarray | None = None
    ) -> np.ndarray:
        """``H R H^T`` of gradients of which neighbours correlate by 0 (white noise) to 1 (a line).

        By a recursion, so that no matrix over optimizer steps is formed. ``white`` is ``H H^T``
        where it is known.
        """
        forward = self._smooth(response, correlation) @ response.T
        return forward + forward.T - (response @ response.T if white is None else white)

    def cross_covariance(
        self, response: np.ndarray, correlation: float, other: np.ndarray
    ) -> np.ndarray:
        """``H R other^T`` of such gradients, by a recursion each way."""
        ways = (self._smooth(response, correlation) - response) @ other.T
        return ways + response @ self._smooth(other, correlation).T

    def variance(self, response: np.ndarray, correlation: float) -> np.ndarray:
        """The diagonal of ``covariance``, ``[len(response)]``."""
        return ((2 * self._smooth(response, correlation) - response) * response).sum(axis=1)

    def decayed(self, response: np.ndarray, scale: float) -> np.ndarray:
        """``H`` for gradients that die out as ``exp(-step / scale)``."""
        if np.isinf(scale):
            return response
        at = np.maximum(0.0, self.unit * (np.arange(response.shape[1]) - self.history + 0.5))
        return response * np.exp(-at / scale)

    def _smooth(self, response: np.ndarray, correlation: float) -> np.ndarray:
        """Every grid point's share in the gradients after it, itself included."""
        return _summed(response, correlation**self.unit)


def _summed(values_TS: np.ndarray, ratio: float, *, backwards: bool = False) -> np.ndarray:
    """``y[:, s] = x[:, s] + ratio y[:, s - 1]``, or with ``s + 1`` backwards, ``float64 [T, S]``.

    A banded triangular system: LAPACK is there anyway, and importing ``scipy.signal`` for its
    filter takes a second.
    """
    from scipy.linalg.lapack import dtbtrs

    bands = np.ones((2, values_TS.shape[1]), order="F")
    bands[1] = -ratio
    summed, failed = dtbtrs(bands, values_TS.T, uplo="L", trans="T" if backwards else "N")
    assert not failed, "a unit diagonal is never singular"
    return summed.T
