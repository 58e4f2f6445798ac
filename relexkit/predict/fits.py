"""What methods can be told, and how a coefficient is continued past the recorded steps.

``FITS`` is the table of the fits. Shape suffixes: N groups, R series of each, n observations, J
places to predict.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from relexkit.errors import ExtrapolationError

FitName = Literal["linear", "polynomial", "sinusoid"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the methods can be told; each method names the ones that it uses in ``METHODS``."""

    rank: int = 1
    """principal directions to keep, at most as many as there are"""
    fit: FitName = "linear"
    """how a coefficient is continued"""
    degree: int = 2
    """of the polynomial"""
    window: int | None = None
    """use only the last so many recorded steps (default: all, of the average 10)"""
    refit_every: int | None = None
    """autoregressive: refit after so many predicted steps (default: one fit)"""
    axis: Literal["step", "row"] = "step"
    """fit against step numbers, or row numbers as the released RELEX scripts do"""
    anchor: int | None = None
    """two-point: the earlier recorded step (default: the base)"""
    alpha: float | None = None
    """first-update: multiple of the first delta (default: target / first step)"""

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("degree", 1), ("window", 2), ("refit_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ExtrapolationError(
                    f"--{name.replace('_', '-')} {value} is too small; expected at least {least}"
                )
        if self.fit not in FITS:
            raise ExtrapolationError(
                f"--fit {self.fit} is unknown; choose one of {', '.join(FITS)}"
            )
        if self.axis not in ("step", "row"):
            raise ExtrapolationError(f"--axis {self.axis} is unknown; choose step or row")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ExtrapolationError(
                f"--alpha {self.alpha:g} is not a number; expected a finite factor"
            )
        if self.degree != 2 and self.fit != "polynomial":
            raise ExtrapolationError(
                "--degree has an effect only with --fit polynomial; leave it out"
            )


class FitError(ExtrapolationError):
    """A fit that failed for the series of one group, number ``group`` of N."""

    def __init__(self, message: str, group: int):
        super().__init__(message)
        self.group = group


Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, Options], np.ndarray]
"""``(x [n], values [N, R, n], at [J], options) -> [N, R, J]``; raises ``ExtrapolationError`` where
there are too few observations, ``FitError`` where a group's series has no fit.
"""


def fit_linear(x: np.ndarray, values: np.ndarray, at: np.ndarray, options: Options) -> np.ndarray:
    """Least-squares line."""
    return values @ _weights_of_polynomial(x, at, 1).T


def fit_polynomial(
    x: np.ndarray, values: np.ndarray, at: np.ndarray, options: Options
) -> np.ndarray:
    """Least-squares polynomial of ``options.degree``."""
    return values @ _weights_of_polynomial(x, at, options.degree).T


def _weights_of_polynomial(x: np.ndarray, at: np.ndarray, degree: int) -> np.ndarray:
    """Weights of the observations in the fitted values, ``[J, n]``."""
    if len(x) <= degree:
        raise ExtrapolationError(
            f"{len(x)} recorded step{'s' * (len(x) != 1)} cannot fix a polynomial of degree"
            f" {degree}; record more steps, widen --window, or use --method two-point or hold"
        )
    middle, half = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
    seen, asked = (np.polynomial.chebyshev.chebvander((t - middle) / half, degree) for t in (x, at))
    return asked @ np.linalg.pinv(seen)


def fit_sinusoid(x: np.ndarray, values: np.ndarray, at: np.ndarray, options: Options) -> np.ndarray:
    """``A sin(2 pi f x + phi) + c`` by non-linear least squares from the strongest frequency of the
    spectrum.
    """
    if len(x) < 5:
        raise ExtrapolationError(
            f"{len(x)} recorded steps cannot fix a sinusoid of four numbers; expected at least 5"
        )
    predicted = np.empty((*values.shape[:2], len(at)))
    for group, series in enumerate(values):
        for row, y in enumerate(series):
            try:
                predicted[group, row] = _sinusoid(at, *_fitted_sinusoid(x, y))
            except RuntimeError:
                raise FitError(
                    "the sinusoid fit did not converge; use --fit linear or polynomial", group
                ) from None
    return predicted


def _fitted_sinusoid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # a second of imports that only this fit needs
    from scipy.optimize import OptimizeWarning, curve_fit
    from scipy.signal import lombscargle

    offset, amplitude = y.mean(), 3 * y.std() / np.sqrt(2)
    spacing = np.diff(x)
    if np.allclose(spacing, spacing[0]):
        power = np.abs(np.fft.rfft(y - offset))
        frequencies = np.fft.rfftfreq(len(x), d=spacing[0])
    else:
        span = x[-1] - x[0] + spacing.mean()
        frequencies = np.arange(len(x) // 2 + 1) / span
        power = np.r_[0.0, lombscargle(x, y - offset, 2 * np.pi * frequencies[1:])]
    start = (amplitude, frequencies[1:][np.argmax(power[1:])], 0.0, offset)
    with warnings.catch_warnings():
        # an undetermined covariance is not a failed fit
        warnings.simplefilter("ignore", OptimizeWarning)
        return curve_fit(_sinusoid, x, y, p0=start, maxfev=10000)[0]


def _sinusoid(x: Any, a: float, f: float, phase: float, c: float) -> Any:
    return a * np.sin(2 * np.pi * f * x + phase) + c


FITS: dict[str, Fit] = {
    "linear": fit_linear,
    "polynomial": fit_polynomial,
    "sinusoid": fit_sinusoid,
}


def continued(
    values: np.ndarray, steps: np.ndarray, targets: np.ndarray, options: Options
) -> np.ndarray:
    """Series ``values [N, R, T]`` over the recorded ``steps [T]`` at ``targets [J]``, by the fit,
    window, axis and refits of ``options``, ``[N, R, J]``.
    """
    fit = FITS[options.fit]
    window = len(steps) if options.window is None else min(options.window, len(steps))
    by_row, last = options.axis == "row", float(steps[-1])
    x = np.arange(window, dtype=np.float64) if by_row else steps[-window:].astype(np.float64)
    y, at = values[..., -window:], x[-1] + targets - last if by_row else targets
    if options.refit_every is None:
        return fit(x, y, at, options)
    return np.concatenate(
        [
            fit(x, y, at[j : j + 1], options)
            if target <= last
            else _refitted(fit, x, y, last, float(target), options)
            for j, target in enumerate(targets)
        ],
        axis=-1,
    )


def _refitted(
    fit: Fit, x: np.ndarray, y: np.ndarray, last: float, target: float, options: Options
) -> np.ndarray:
    """Autoregressive: predicted values are fitted too, every ``refit_every`` steps; ``[N, R,
    1]``.
    """
    window, every, by_row = len(x), options.refit_every or 1, options.axis == "row"
    future = np.append(np.arange(last + 1, target), target)
    # the released scripts evaluate one row past the window at every step, also between refits
    places = np.full(len(future), float(window)) if by_row else future
    along = np.concatenate([x, places])
    for first in range(0, len(future), every):
        seen = x if by_row else along[first : first + window]
        ahead = places[first : first + every]
        y = np.concatenate([y, fit(seen, y[..., first : first + window], ahead, options)], axis=-1)
    return y[..., -1:]
