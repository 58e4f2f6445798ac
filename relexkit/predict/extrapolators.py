"""Extrapolators: each is fitted to Gram matrices once and predicts as many steps as are asked for.

``predicted delta at step t = M^T a(t)``: every published method has this form, so none needs the
weights to be fitted, and one streaming pass writes the prediction. ``METHODS`` is the whole table.

Sources: RELEX, arXiv 2605.21468 and its released scripts; weight linearity and two-point
extrapolation, arXiv 2601.04537; first-update scaling, the replication study
basetenlabs/relex-replication; averages of the latest checkpoints, arXiv 2209.14981.

Shape suffixes: N groups, T recorded steps, J targets, R directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from relexkit.errors import ExtrapolationError
from relexkit.geometry.shape import leading_eigenpairs
from relexkit.geometry.trajectory_model import SPACED, TrajectoryFit, fit_trajectory
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.predict.fits import FitError, Options, continued
from relexkit.predict.prediction import PLAIN, Extrapolator, Prediction

_AVERAGED = 10  # recorded steps, where no window is given

Predict = Callable[[np.ndarray], np.ndarray]
"""Targets ``[J]`` -> weights over the recorded deltas, float64 ``[J, N, T]``, or ``[J, 1, T]``
where
all groups have the same.
"""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        fit: ``(gram, options) -> predict`` for N groups that have moved, each fitted on its own;
            raises ``ExtrapolationError`` where it cannot.
        about: what it does, for the help.
        options: names of the ``Options`` that it uses.
        needs_gram: whether the weights depend on more than the step numbers.
        scope: what shares a fit unless the caller says otherwise.
        reaches_later: whether it predicts steps that were not recorded.
        moves: whether the prediction depends on the target.
        cheap: whether a fit takes less than milliseconds.
        judged_by: the method whose past record speaks for it, where that is another one.
    """

    fit: Callable[[Gram, Options], Predict]
    about: str
    options: tuple[str, ...] = ()
    needs_gram: bool = False
    scope: str = "tensor"
    reaches_later: bool = True
    moves: bool = True
    cheap: bool = True
    judged_by: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether it predicts something else than what was recorded."""
        return self.moves and self.reaches_later


def relex(gram: Gram, options: Options) -> Predict:
    """RELEX: continue the coefficients of the first ``rank`` directions; ``a = U diag(1/S)
    c_hat(t)``.
    """
    steps = gram.steps
    values_NR, left_NTR = leading_eigenpairs(gram.matrices, options.rank)
    right_NRT = left_NTR.transpose(0, 2, 1)
    singular_NR1 = np.sqrt(values_NR)[..., None]

    def predict(targets: np.ndarray) -> np.ndarray:
        reached_NRJ = continued(right_NRT * singular_NR1, steps, targets, options)
        along_NRJ = reached_NRJ / np.where(singular_NR1 > 0, singular_NR1, 1.0)
        return (left_NTR @ along_NRJ).transpose(2, 0, 1)

    return predict


def reconstruct(gram: Gram, options: Options) -> Predict:
    """Projection of a recorded step on the first ``rank`` directions: ``a = U diag(1/S^2) U^T G[:,
    s] = U U^T e_s``.
    """
    steps = gram.steps
    left_NTR = leading_eigenpairs(gram.matrices, options.rank)[1]

    def predict(targets: np.ndarray) -> np.ndarray:
        rows = [_row_of(steps, target, "--to") for target in targets]
        return (left_NTR @ left_NTR[:, rows].transpose(0, 2, 1)).transpose(2, 0, 1)

    return predict


StepWeights = Callable[[np.ndarray, float, Options], np.ndarray]
"""``(steps [T], target, options) -> weights [T]`` of a method that needs the step numbers alone."""


def from_steps(weights: StepWeights) -> Callable[[Gram, Options], Predict]:
    """The ``fit`` of a method whose weights depend on the step numbers alone."""

    def fit(gram: Gram, options: Options) -> Predict:
        steps = gram.steps
        return lambda targets: np.array([weights(steps, t, options) for t in targets])[:, None]

    return fit


def least_squares(steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """A line with intercept through every weight: the hat vector ``[1, t] (X^T X)^-1 X^T``, ``X =
    [1, s]``.
    """
    if len(steps) < 2:
        raise ExtrapolationError(
            "1 recorded step cannot fix a line; record more, or use --method least-squares-origin"
        )
    time = steps - steps.mean()
    return 1 / len(steps) + (target - steps.mean()) * time / (time**2).sum()


def least_squares_origin(steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """A line through the base for every weight: ``a_j = t s_j / sum s^2``."""
    real = steps.astype(np.float64)
    return target * real / (real**2).sum()


def two_point(steps: np.ndarray, target: float, options: Options) -> np.ndarray:
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


def first_update(steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """``alpha`` times the first delta; by default the number of first steps that fit into the
    target.
    """
    weights = np.zeros(len(steps))
    weights[0] = target / steps[0] if options.alpha is None else options.alpha
    return weights


def hold(steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """The last recorded step itself: the baseline that everything must beat."""
    weights = np.zeros(len(steps))
    weights[-1] = 1.0
    return weights


def average(steps: np.ndarray, target: float, options: Options) -> np.ndarray:
    """The mean of the last ``window`` recorded steps, whatever the target: less noise, but no
    extrapolation.
    """
    count = min(len(steps), options.window or _AVERAGED)
    weights = np.zeros(len(steps))
    weights[-count:] = 1 / count
    return weights


def _row_of(steps: np.ndarray, step: float, option: str) -> int:
    rows = np.flatnonzero(steps == step)
    if not len(rows):
        raise ExtrapolationError(
            f"{option} {step_text(step)} is not among the {len(steps)} steps used; expected a"
            " recorded step"
        )
    return int(rows[0])


def _trajectory_model(
    weights: Callable[[TrajectoryFit, np.ndarray], np.ndarray], spaced: int | None = None
) -> Callable[[Gram, Options], Predict]:
    def fit(gram: Gram, options: Options) -> Predict:
        fits = [
            fit_trajectory(
                matrix,
                gram.steps,
                num_parameters=float(size),
                rates=gram.rates,
                momentum=gram.momentum,
                spaced=spaced,
            )
            for matrix, size in zip(gram.matrices, gram.num_parameters, strict=True)
        ]
        return lambda targets: np.stack([weights(fit, targets) for fit in fits], axis=1)

    return fit


BASELINE = "hold"
"""The method that every other one is held against."""

METHODS: dict[str, Method] = {
    "relex": Method(
        relex,
        "the first directions' coefficients continued",
        options=("rank", "fit", "degree", "window", "refit_every", "axis"),
        needs_gram=True,
    ),
    "reconstruct": Method(
        reconstruct,
        "a recorded step projected on the first directions",
        options=("rank",),
        needs_gram=True,
        reaches_later=False,
    ),
    "least-squares": Method(from_steps(least_squares), "a line through every weight"),
    "least-squares-origin": Method(
        from_steps(least_squares_origin), "a line through every weight and the base"
    ),
    "two-point": Method(
        from_steps(two_point), "the line through the last step and an earlier one", ("anchor",)
    ),
    "first-update": Method(from_steps(first_update), "a multiple of the first delta", ("alpha",)),
    BASELINE: Method(from_steps(hold), "the last recorded step", moves=False),
    "average": Method(
        from_steps(average), "the mean of the last recorded steps", ("window",), moves=False
    ),
    "model": Method(
        _trajectory_model(lambda fit, targets: fit.predict(targets)[0]),
        "the trajectory model",
        needs_gram=True,
        scope="global",
        cheap=False,
        judged_by="drift",
    ),
    "drift": Method(
        _trajectory_model(lambda fit, targets: fit.drift_weights(targets), SPACED),
        "the trajectory model without coasting on momentum",
        needs_gram=True,
        scope="global",
        cheap=False,
    ),
}


def method_of(method: str | Extrapolator) -> Method:
    """The row of a method of the table, or of a function of one's own.

    Raises:
        ExtrapolationError: an unknown name, with the choices.
    """
    if callable(method):
        return Method(from_steps(_checked(method)), (method.__doc__ or name_of(method)).strip())
    if method not in METHODS:
        raise ExtrapolationError(
            f"--method {method} is unknown; choose one of {', '.join(METHODS)}"
        )
    return METHODS[method]


def name_of(method: str | Extrapolator) -> str:
    """The name of a method; of a function its own."""
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


def _checked(function: Extrapolator) -> StepWeights:
    """The weights that a user's function gives, refused where they are not one finite number a
    step.
    """

    def weights(steps: np.ndarray, target: float, options: Options) -> np.ndarray:
        values = np.asarray(function(steps, target), np.float64)
        if values.shape != steps.shape or not np.isfinite(values).all():
            raise ExtrapolationError(
                f"{name_of(function)} gave weights of shape {list(values.shape)}; expected"
                f" {len(steps)} finite numbers, one for each recorded step"
            )
        return values

    return weights


def step_text(step: float) -> str:
    """A step as people write it: ``1000000``, ``2.5``."""
    return str(int(step)) if float(step).is_integer() else repr(float(step))


def check_request(targets: Sequence[float], prediction: Prediction) -> None:
    """Refuse an unknown method, an option that the method does not use, and targets or a scale that
    are not numbers.

    Raises:
        ExtrapolationError: with the choices.
    """
    options, scale = prediction.options, prediction.scale
    used, default = method_of(prediction.method).options, Options()
    for field in fields(Options):
        if field.name not in used and getattr(options, field.name) != getattr(default, field.name):
            allowed = ", ".join("--" + name.replace("_", "-") for name in used) or "no options"
            flag = "--" + field.name.replace("_", "-")
            raise ExtrapolationError(
                f"{flag} has no effect with --method {name_of(prediction.method)}, which takes"
                f" {allowed}; leave it out"
            )
    for target in targets:
        if not (math.isfinite(target) and target > 0):
            raise ExtrapolationError(f"--to {target:g} is not a step; expected a positive number")
    if not math.isfinite(scale):
        raise ExtrapolationError(
            f"--scale {scale:g} is not a number; expected a finite factor such as 0.5"
        )


def predict_weights(
    gram: Gram, targets: Sequence[float], prediction: Prediction = PLAIN
) -> np.ndarray:
    """Weights of every tensor's observed deltas for every target, ``float64 [targets, N, T]``.

    Args:
        gram: per-tensor Gram matrices; those of the steps to ``prediction.until`` are used, T of
            them.
        targets: optimizer steps.

    A tensor that never moved gets zero weights. Reads no weights of the model.

    Raises:
        ExtrapolationError: unknown method or option, a target that is not a positive finite number,
            or a fit that fails (named by tensor where only some can).
    """
    check_request(targets, prediction)
    gram = gram.until(prediction.until)
    predict = fit_method(gram, prediction.method, prediction.options, prediction.scope)
    weights = predict(np.array(targets, np.float64))
    shape = (len(targets), len(gram.names), len(gram.steps))
    return prediction.scale * np.broadcast_to(weights, shape)


def fit_method(
    gram: Gram, method: str | Extrapolator, options: Options, scope: str | None = None
) -> Predict:
    """A method fitted to the tensors of ``gram``: one fit for any number of targets; see
    ``predict_weights``.

    Raises:
        ExtrapolationError: the fit fails, here or where it is asked for a target.
    """
    chosen = method_of(method)
    scope = scope or chosen.scope
    grouped = gram.scoped(scope)
    moved = np.flatnonzero(np.trace(grouped.matrices, axis1=1, axis2=2) > 0)
    rows: slice | list[int] = slice(None)
    if scope != "tensor":
        row_of = {name: row for row, name in enumerate(grouped.names)}
        rows = [row_of[group] for group in gram.groups(scope)]
    if not len(moved):
        return lambda targets: np.zeros((len(targets), 1, len(gram.steps)))
    with single_threaded_blas():
        all_moved = len(moved) == len(grouped.names)
        predict_moved = chosen.fit(grouped if all_moved else grouped.only(moved), options)

    def predict(targets: np.ndarray) -> np.ndarray:
        try:
            with single_threaded_blas():
                moved_weights = predict_moved(targets)
        except FitError as error:
            raise ExtrapolationError(f"{grouped.names[moved[error.group]]}: {error}") from None
        if moved_weights.shape[1] == 1 and len(moved) == len(grouped.names):
            return moved_weights
        weights = np.zeros((len(targets), len(grouped.names), len(gram.steps)))
        weights[:, moved] = moved_weights
        return weights[:, rows]

    return predict
