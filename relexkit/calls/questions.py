"""Questions about a run's shape, each with the defaults and the null of the command of its name.

All start from ``observe``: one pass over the deltas the first time, kept in the store.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relexkit.assess import advice as _advice
from relexkit.assess import backtest as _backtest
from relexkit.assess import forecast as _forecast
from relexkit.assess.observed import Observed
from relexkit.assess.observed import observe as _observe
from relexkit.calls.source import Source, of_run, store_of, warn_past_the_end
from relexkit.geometry import linearity as _linearity
from relexkit.geometry import spectrum as _spectrum
from relexkit.geometry.null import calibrate
from relexkit.geometry.shape import cosines_of_updates
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix import gram as _gram
from relexkit.gram_matrix.compute.settings import DEFAULT, Compute
from relexkit.materialize import alignment as _alignment
from relexkit.materialize.directions import Directions, find_directions
from relexkit.predict import extrapolators as _extrapolators
from relexkit.predict.fits import Options
from relexkit.predict.prediction import PLAIN, Extrapolator, Prediction

Seen = Source | Observed | Gram
"""A run, or what is already known of it."""

FORECAST_RATIOS = (1.25, 1.5, 2.0, 4.0)
"""Times the last step, where no targets are given."""

gram = of_run(_gram)
observe = of_run(_observe)


def seen(source: Seen, until: int | None, compute: Compute = DEFAULT) -> Observed:
    """What is known of a run up to a step."""
    if isinstance(source, Gram | Observed):
        warn_past_the_end((source if isinstance(source, Gram) else source.gram).steps, until)
    if isinstance(source, Gram):
        return Observed(source.until(until), {})
    if isinstance(source, Observed):
        return source.until(until)
    return observe(source, until=until, compute=compute)


def spectrum(
    source: Seen,
    *,
    scope: str = "tensor",
    until: int | None = None,
    centered: bool = False,
    momentum: float | None = None,
    compute: Compute = DEFAULT,
) -> _spectrum.Spectrum:
    """Principal directions of the updates, each statistic beside that of a walk without direction.

        relexkit.spectrum("run.zarr", scope="module").to_frame()

    Args:
        scope: ``tensor``, ``layer``, ``module`` or ``global``.
        until: use only steps up to this one.
        centered: about the mean checkpoint instead of the base.
        momentum: of the walk, Adam's first beta; fitted if None.
        compute: how the Gram matrices are computed.

    Raises:
        RelexkitError: no recorded step is as early as ``until``.
    """
    matrices = seen(source, until, compute).gram
    return _spectrum.spectrum(matrices, scope=scope, centered=centered, momentum=momentum)


def linearity(
    source: Source, *, until: int | None = None, scope: str = "module", compute: Compute = DEFAULT
) -> _linearity.Linearity:
    """How straight every single weight's path is, beside a walk with the run's own momentum.

    One pass over the deltas beside that of the Gram matrices.

    Raises:
        ExtrapolationError: fewer than three steps.
    """
    fit = calibrate(seen(source, until, compute).gram.scoped("global")).fitted
    by_tensor = _linearity.weight_linearity(
        store_of(source),
        until=until,
        covariance=None if fit is None else fit.walk_covariance(),
        progress=compute.progress,
    )
    return by_tensor.scoped(scope)


def backtest(
    source: Seen,
    *,
    method: Sequence[str | Extrapolator] | None = None,
    until: Sequence[int] | None = None,
    options: Options | None = None,
    compute: Compute = DEFAULT,
) -> _backtest.Backtest:
    """How every method would have done in the run's own past.

    Args:
        method: names, or functions ``(steps [T], target) -> weights [T]`` of your own; None for all
            that are quickly fitted and the trajectory model. Hold is always there.
        until: last steps of the prefixes; None for up to eight.
        options: each method takes those that it uses.

    Raises:
        ExtrapolationError: an unknown method, or a prefix without a later step.
    """
    methods = (*_backtest.CHEAP, _backtest.MODEL) if method is None else method
    return _backtest.backtest(seen(source, None, compute).gram, methods, until, options)


def forecast(
    source: Seen, to: Sequence[float] | None = None, *, compute: Compute = DEFAULT
) -> _forecast.Forecast:
    """Where the run goes along its first direction, with intervals by its own past.

    Args:
        to: later steps; None for 1.25, 1.5, 2 and 4 times the last one.

    Raises:
        ExtrapolationError: fewer than three steps, or nothing moved.
    """
    matrices = seen(source, None, compute).gram
    targets = [round(ratio * int(matrices.steps[-1])) for ratio in FORECAST_RATIOS]
    return _forecast.forecast(matrices, targets if to is None else to)


def predict_weights(
    source: Seen, to: Sequence[float], prediction: Prediction = PLAIN, compute: Compute = DEFAULT
) -> np.ndarray:
    """Weights of every tensor's recorded deltas for every target, ``float64 [targets, N, T]``; one
    of them is what ``apply`` takes.

    Raises:
        ExtrapolationError: unknown method or option, a target that is not a positive finite number,
            or a fit that fails.
    """
    return _extrapolators.predict_weights(
        seen(source, prediction.until, compute).gram, to, prediction
    )


def advise(source: Seen, *, until: int | None = None, compute: Compute = DEFAULT) -> _advice.Advice:
    """What to do next with a run, and why; ``until``: as if it had ended there.

    Raises:
        RelexkitError: no recorded step is as early as ``until``.
    """
    so_far = seen(source, until, compute)
    return _advice.advise(so_far.gram, so_far.metrics)


def update_cosines(
    source: Seen, *, scope: str = "global", until: int | None = None, compute: Compute = DEFAULT
) -> dict[str, np.ndarray]:
    """Cosines between all step-to-step updates, ``float64 [T, T]`` for every group of ``scope``;
    NaN where an update is zero. The first update is the first delta.

    Raises:
        RelexkitError: no recorded step is as early as ``until``.
    """
    grouped = seen(source, until, compute).gram.scoped(scope)
    return dict(zip(grouped.names, cosines_of_updates(grouped.matrices), strict=True))


def directions(
    source: Source,
    *,
    count: int = 2,
    scope: str = "tensor",
    until: int | None = None,
    centered: bool = False,
    compute: Compute = DEFAULT,
) -> Directions:
    """The first principal directions of a run, as arrays and as task vectors.

        directions = relexkit.directions("run.zarr")
        directions.vector("model.norm.weight")  # a unit vector; norm="task" for a task vector
        directions.write("directions")

    Args:
        count: directions of each group.
        scope: what shares a direction: ``tensor``, ``layer``, ``module`` or ``global``.
        until: use only steps up to this one.
        centered: about the mean checkpoint instead of the base.

    Raises:
        RelexkitError: more directions than steps.
    """
    store = store_of(source)
    matrices = seen(store, until, compute).gram
    return find_directions(store, matrices, count=count, scope=scope, centered=centered)


def compare_directions(
    first: Source,
    second: Source,
    *,
    count: int = 2,
    scope: str = "tensor",
    compute: Compute = DEFAULT,
) -> _alignment.Alignment:
    """The principal directions of two runs of one model against each other.

    Raises:
        RelexkitError: the runs have other tensors, or fewer than ``count`` steps.
    """
    pair = [directions(s, count=count, scope=scope, compute=compute) for s in (first, second)]
    return _alignment.align(*pair)
