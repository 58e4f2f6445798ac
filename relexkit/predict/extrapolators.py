"""Extrapolators: each is a function from a Gram matrix to weights over the observed deltas.

``predicted delta at step t = M^T a(t)``: every published method has this form, so none needs the
weights to be fitted, and one streaming pass writes the prediction. ``METHODS`` is the whole table;
a function takes ``(gram [T, T], steps [T], target, options)`` and returns ``a [T]``, float64.

Sources: RELEX, arXiv 2605.21468 and its released scripts; weight linearity and two-point
extrapolation, arXiv 2601.04537; first-update scaling, the replication study
basetenlabs/relex-replication; averages of the latest checkpoints, arXiv 2209.14981.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from relexkit.errors import ExtrapolationError
from relexkit.geometry.shape import decompose
from relexkit.geometry.trajectory_model import fit_trajectory
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas

_AVERAGED = 10  # recorded steps, where no window is given


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the methods can be told; each method names the ones that it uses in ``METHODS``.

    Attributes:
        rank: principal directions kept, at most as many as there are (RELEX, reconstruct).
        fit: how a coefficient is continued: ``linear``, ``polynomial`` or ``sinusoid`` (RELEX).
        degree: of the polynomial fit.
        window: use only the last so many recorded steps; None for all (RELEX) or 10 (average).
        refit_every: continue autoregressively, refitting after so many predicted steps; None for
            one fit.
        axis: fit against real ``step`` numbers, or against ``row`` numbers as the released RELEX
            scripts do.
        anchor: the earlier recorded step of the two-point line; None for the base.
        alpha: multiple of the first delta (first-update); None for target / first step.
    """

    rank: int = 1
    fit: Literal["linear", "polynomial", "sinusoid"] = "linear"
    degree: int = 2
    window: int | None = None
    refit_every: int | None = None
    axis: Literal["step", "row"] = "step"
    anchor: int | None = None
    alpha: float | None = None

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


Curve = Callable[[float], float]
"""A fitted coefficient as a function of the step (or row)."""

Fit = Callable[[np.ndarray, np.ndarray, Options], Curve]
"""``(x [n], y [n], options) -> curve``; raises ``ExtrapolationError`` when it does not converge."""


def fit_polynomial(x: np.ndarray, y: np.ndarray, options: Options) -> Curve:
    """Least-squares polynomial of ``options.degree``."""
    return _polynomial(x, y, options.degree)


def fit_linear(x: np.ndarray, y: np.ndarray, options: Options) -> Curve:
    """Least-squares line."""
    return _polynomial(x, y, 1)


def _polynomial(x: np.ndarray, y: np.ndarray, degree: int) -> Curve:
    if len(x) <= degree:
        raise ExtrapolationError(
            f"{len(x)} recorded step{'s' * (len(x) != 1)} cannot fix a polynomial of degree"
            f" {degree}; record more steps, widen --window, or use --method two-point or hold"
        )
    if (
        degree == 1
    ):  # in closed form: autoregressive refits come here a thousand times for every tensor
        middle, height = x.mean(), y.mean()
        slope = (x - middle) @ y / ((x - middle) ** 2).sum()
        return lambda t: float(height + slope * (t - middle))
    series = np.polynomial.Polynomial.fit(x, y, degree)
    return lambda t: float(series(t))


def fit_sinusoid(x: np.ndarray, y: np.ndarray, options: Options) -> Curve:
    """``A sin(2 pi f x + phi) + c`` by non-linear least squares from the strongest frequency of the
    spectrum.
    """
    from scipy.optimize import (
        OptimizeWarning,
        curve_fit,
    )  # a second of imports that only this fit needs
    from scipy.signal import lombscargle

    if len(x) < 5:
        raise ExtrapolationError(
            f"{len(x)} recorded steps cannot fix a sinusoid of four numbers; expected at least 5"
        )
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", OptimizeWarning
            )  # an undetermined covariance is not a failed fit
            (a, f, phase, c), _ = curve_fit(_sinusoid, x, y, p0=start, maxfev=10000)
    except RuntimeError:
        raise ExtrapolationError(
            "the sinusoid fit did not converge; use --fit linear or polynomial"
        ) from None
    return lambda t: float(_sinusoid(t, a, f, phase, c))


def _sinusoid(x: Any, a: float, f: float, phase: float, c: float) -> Any:
    return a * np.sin(2 * np.pi * f * x + phase) + c


FITS: dict[str, Fit] = {
    "linear": fit_linear,
    "polynomial": fit_polynomial,
    "sinusoid": fit_sinusoid,
}


def relex(gram: np.ndarray, steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """RELEX: continue the coefficients of the first ``rank`` directions; ``a = U diag(1/S)
    c_hat(t)``.
    """
    directions = decompose(gram)
    rank = min(options.rank, len(directions.singular_values))
    coefficients = directions.coefficients[:, :rank]
    predicted = [_continue(coefficients[:, k], steps, target, options) for k in range(rank)]
    return directions.left[:, :rank] @ (np.array(predicted) / directions.singular_values[:rank])


def _continue(values: np.ndarray, steps: np.ndarray, target: float, options: Options) -> float:
    window = len(steps) if options.window is None else min(options.window, len(steps))
    by_row = options.axis == "row"
    x = np.arange(window, dtype=np.float64) if by_row else steps[-window:].astype(np.float64)
    y, fit, last = values[-window:], FITS[options.fit], float(steps[-1])
    if options.refit_every is None or target <= last:
        return fit(x, y, options)(x[-1] + target - last if by_row else target)
    # The released scripts evaluate one row past the window at every step, also between refits.
    future = np.append(np.arange(last + 1, target), target)
    x = np.concatenate([x, np.full(len(future), float(window)) if by_row else future])
    y = np.concatenate([y, np.empty(len(future))])
    for first in range(0, len(future), options.refit_every):
        curve = fit(
            np.arange(window, dtype=np.float64) if by_row else x[first : first + window],
            y[first : first + window],
            options,
        )
        for place in range(window + first, min(window + first + options.refit_every, len(y))):
            y[place] = curve(x[place])
    return float(y[-1])


def reconstruct(gram: np.ndarray, steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """Projection of a recorded step on the first ``rank`` directions: ``a = U diag(1/S^2) U^T G[:,
    s]``.
    """
    row = _row_of(steps, target, "--to")
    directions = decompose(gram)
    left, singular = directions.left[:, : options.rank], directions.singular_values[: options.rank]
    return left @ ((left.T @ gram[:, row]) / singular**2)


def least_squares(
    gram: np.ndarray, steps: np.ndarray, target: float, options: Options
) -> np.ndarray:
    """A line with intercept through every weight: the hat vector ``[1, t] (X^T X)^-1 X^T``, ``X =
    [1, s]``.
    """
    if len(steps) < 2:
        raise ExtrapolationError(
            "1 recorded step cannot fix a line; record more, or use --method least-squares-origin"
        )
    time = steps - steps.mean()
    return 1 / len(steps) + (target - steps.mean()) * time / (time**2).sum()


def least_squares_origin(
    gram: np.ndarray, steps: np.ndarray, target: float, options: Options
) -> np.ndarray:
    """A line through the base for every weight: ``a_j = t s_j / sum s^2``."""
    real = steps.astype(np.float64)
    return target * real / (real**2).sum()


def two_point(gram: np.ndarray, steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """The line through the last recorded step and an earlier one (``anchor``), or the base."""
    weights = np.zeros(len(steps))
    last = len(steps) - 1
    if options.anchor is None:
        weights[last] = target / steps[last]
        return weights
    row = _row_of(steps, options.anchor, "--anchor")
    if row == last:
        raise ExtrapolationError(
            f"--anchor {options.anchor} is the last recorded step; expected an earlier one"
        )
    weights[last] = (target - steps[row]) / (steps[last] - steps[row])
    weights[row] = 1 - weights[last]
    return weights


def first_update(
    gram: np.ndarray, steps: np.ndarray, target: float, options: Options
) -> np.ndarray:
    """``alpha`` times the first delta; by default the number of first steps that fit into the
    target.
    """
    weights = np.zeros(len(steps))
    weights[0] = target / steps[0] if options.alpha is None else options.alpha
    return weights


def hold(gram: np.ndarray, steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """The last recorded step itself: the baseline that everything must beat."""
    weights = np.zeros(len(steps))
    weights[-1] = 1.0
    return weights


def average(gram: np.ndarray, steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """The mean of the last ``window`` recorded steps, whatever the target: it goes nowhere, but
    leaves noise behind.
    """
    count = min(len(steps), options.window or _AVERAGED)
    weights = np.zeros(len(steps))
    weights[-count:] = 1 / count
    return weights


def trajectory_model(
    gram: np.ndarray, steps: np.ndarray, target: float, options: Options
) -> np.ndarray:
    """The trajectory model: fits and predicts one target."""
    return fit_trajectory(gram, steps, num_parameters=np.inf).weights(target)


def trajectory_drift(
    gram: np.ndarray, steps: np.ndarray, target: float, options: Options
) -> np.ndarray:
    """The trajectory model's drift alone, without coasting on momentum."""
    return fit_trajectory(gram, steps, num_parameters=np.inf).drift_weights([target])[0]


def _row_of(steps: np.ndarray, step: float, option: str) -> int:
    found = np.flatnonzero(steps == step)
    if not len(found):
        raise ExtrapolationError(
            f"{option} {step_text(step)} is not among the {len(steps)} steps used; expected a"
            " recorded step"
        )
    return int(found[0])


@dataclass(frozen=True)
class Method:
    """A row of the table: the function, the options that it uses, whether it needs the Gram matrix.

    ``scope`` is what shares a fit unless the caller says otherwise. ``fit`` is given where a fit is
    costly enough to be shared among targets: ``(gram, steps, num_parameters, rates) -> (targets [J]
    -> weights [J, T])``.
    """

    weights: Callable[[np.ndarray, np.ndarray, float, Options], np.ndarray]
    options: tuple[str, ...] = ()
    needs_gram: bool = False
    scope: str = "tensor"
    fit: (
        Callable[
            [np.ndarray, np.ndarray, float, np.ndarray | None],
            Callable[[Sequence[float]], np.ndarray],
        ]
        | None
    ) = None


def _fit_model(
    gram: np.ndarray, steps: np.ndarray, num_parameters: float, rates: np.ndarray | None
) -> Callable[[Sequence[float]], np.ndarray]:
    fit = fit_trajectory(gram, steps, num_parameters=num_parameters, rates=rates)
    return lambda targets: fit.predict(targets)[0]


def _fit_drift(
    gram: np.ndarray, steps: np.ndarray, num_parameters: float, rates: np.ndarray | None
) -> Callable[[Sequence[float]], np.ndarray]:
    return fit_trajectory(gram, steps, num_parameters=num_parameters, rates=rates).drift_weights


METHODS: dict[str, Method] = {
    "relex": Method(
        relex, ("rank", "fit", "degree", "window", "refit_every", "axis"), needs_gram=True
    ),
    "reconstruct": Method(reconstruct, ("rank",), needs_gram=True),
    "least-squares": Method(least_squares),
    "least-squares-origin": Method(least_squares_origin),
    "two-point": Method(two_point, ("anchor",)),
    "first-update": Method(first_update, ("alpha",)),
    "hold": Method(hold),
    "average": Method(average, ("window",)),
    "model": Method(trajectory_model, needs_gram=True, scope="global", fit=_fit_model),
    "drift": Method(trajectory_drift, needs_gram=True, scope="global", fit=_fit_drift),
}


def step_text(step: float) -> str:
    """A step as people write it: ``1000000``, ``2.5``."""
    return str(int(step)) if float(step).is_integer() else repr(float(step))


def check_request(targets: Sequence[float], method: str, options: Options, scale: float) -> None:
    """Refuse an unknown method, an option that the method does not use, and targets or a scale that
    are no numbers.

    Raises:
        ExtrapolationError: with the choices.
    """
    if method not in METHODS:
        raise ExtrapolationError(
            f"--method {method} is unknown; choose one of {', '.join(METHODS)}"
        )
    used, default = METHODS[method].options, Options()
    for field in fields(Options):
        if field.name not in used and getattr(options, field.name) != getattr(default, field.name):
            allowed = ", ".join("--" + name.replace("_", "-") for name in used) or "no options"
            flag = "--" + field.name.replace("_", "-")
            raise ExtrapolationError(
                f"{flag} has no effect with --method {method}, which takes {allowed}; leave it out"
            )
    for target in targets:
        if not (math.isfinite(target) and target > 0):
            raise ExtrapolationError(f"--to {target:g} is not a step; expected a positive number")
    if not math.isfinite(scale):
        raise ExtrapolationError(
            f"--scale {scale:g} is not a number; expected a finite factor such as 0.5"
        )


def predict_weights(
    gram: Gram,
    targets: list[float],
    *,
    method: str = "relex",
    options: Options | None = None,
    scope: str | None = None,
    scale: float = 1.0,
    rates: np.ndarray | None = None,
) -> np.ndarray:
    """Weights of every tensor's observed deltas for every target, ``float64 [targets, N, T]``.

    Args:
        gram: per-tensor Gram matrices, already cut to the steps that may be used (``Gram.until``).
        scope: what one fit is shared by: each ``tensor``, ``layer``, ``module`` or the whole model
            (``global``); None for the method's own (RELEX: tensor, the trajectory model: global).
        scale: multiplies the predicted displacement from the base.
        rates: learning rates for the trajectory model, see
            ``relexkit.assess.metrics.learning_rates``; other methods have no use for them.

    A tensor that never moved gets zero weights. Reads no weights of the model.

    Raises:
        ExtrapolationError: unknown method or option, a target that is not a positive finite number,
            or a fit that fails (named by tensor).
    """
    options = options or Options()
    check_request(targets, method, options, scale)
    chosen = METHODS[method]
    scope = scope or chosen.scope
    grouped = gram.scoped(scope)
    by_group = np.zeros((len(targets), len(grouped.names), len(gram.steps)))
    with single_threaded_blas():
        for row, name in enumerate(grouped.names):
            matrix = grouped.matrices[row]
            if not np.trace(matrix) > 0:
                continue
            try:
                if chosen.fit is not None:
                    predict = chosen.fit(
                        matrix, gram.steps, float(grouped.num_parameters[row]), rates
                    )
                    by_group[:, row] = predict(targets)
                else:
                    by_group[:, row] = [
                        chosen.weights(matrix, gram.steps, target, options) for target in targets
                    ]
            except ExtrapolationError as error:
                raise ExtrapolationError(f"{name}: {error}") from None
    if scope != "tensor":
        by_group = by_group[:, [grouped.names.index(g) for g in gram.groups(scope)]]
    return scale * by_group
