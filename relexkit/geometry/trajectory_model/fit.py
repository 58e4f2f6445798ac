"""The fitted trajectory model: what it says about a run, and what it predicts.

For the model see ``relexkit.geometry.trajectory_model``. Shape suffixes: N tensors or groups, T
recorded steps, S optimizer steps, L kinds of drift, C drift strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from relexkit.errors import ExtrapolationError
from relexkit.geometry.trajectory_model.likelihood import (
    ALONE,
    CONTINUED,
    START,
    WALK,
    expit,
    logit,
    search,
    with_rounding,
)
from relexkit.geometry.trajectory_model.posterior import RATIOS, Drift, integrate, kept, quantiles
from relexkit.geometry.trajectory_model.response import Clock
from relexkit.gram_matrix import Gram

# optimizer steps resolved one by one; longer runs are resolved in this many equal stretches
_GRID = 4096
_HISTORY = 64  # gradients before the base that a warm optimizer's momentum still remembers
_CARRIED = 0.3  # where the search for it starts
_MOST, _RECENT = 200, 100  # recorded steps used by a fit, and how many of them are the latest
SPACED = 16
"""Recorded steps, evenly spaced, that tell what lasts from what does not (``spaced``)."""
_DOUBT = 0.05  # p-value of the drift above which momentum and rounding are those of a walk
# times the drift's gain: a state of the optimizer whose walk is worse by more is not tried with a
# drift
_FAR_BEHIND = 3.0


@dataclass(frozen=True)
class TrajectoryFit:
    """A fitted trajectory model.

    Attributes:
        steps: the recorded steps that it was fitted to, ``int64 [T]``.
        momentum: fitted ``beta`` of the optimizer.
        memory: fitted correlation ``phi`` of the noise of neighbouring steps, 0 to 0.9, beyond the
            optimizer's.
        warm: whether the optimizer had a history before the base (a resumed run, or no bias
            correction).
        carried: what the momentum held at the base besides noise, as the constant gradient that
            would have left it there, in units of the noise; 0 unless the momentum was given.
        rounding: ``nu^2`` as a share of the walk's variance at the last step.
        drift_to_noise: variance of the drift over that of the walk at the last step (``rho_T``);
            posterior median.
        drift_to_noise_interval: central 90 % of the posterior.
        correlation_time: in optimizer steps, ``ell`` or, of a line that dies out, ``kappa``;
            posterior median, infinite for a line that goes on.
        correlation_time_interval: central 90 % of the posterior.
        effective_dimension: independent parameters that the scatter of the data amounts to.
        evidence: twice the log likelihood ratio of drift against none, in effective parameters.
        p_value: chance of at least this evidence on a drift-free walk, at most: half the tail of
            chi-square with two degrees of freedom, since the strength is at its bound and the
            correlation time unknown there. Simulated walks with and without momentum and rounding
            raise false alarms at most at the nominal rate.
        gram: what it was fitted to, ``float64 [T, T]``.
    """

    steps: np.ndarray
    momentum: float
    warm: bool
    memory: float
    carried: float
    rounding: float
    drift_to_noise: float
    drift_to_noise_interval: tuple[float, float]
    correlation_time: float
    correlation_time_interval: tuple[float, float]
    effective_dimension: float
    evidence: float
    p_value: float
    gram: np.ndarray
    _clock: Clock
    _rows: np.ndarray
    _gram: np.ndarray
    _parts: tuple[tuple[Drift, np.ndarray], ...]

    def weights(self, target: float) -> np.ndarray:
        """Weights over the observed deltas that predict the delta at ``target`` (a positive step),
        ``float64 [T]``.
        """
        return self.predict([target])[0][0]

    def variance(self, target: float) -> float:
        """Expected squared error at ``target``, summed over the parameters of the Gram matrix that
        was fitted.

        Includes what the posterior leaves open about drift strength and correlation time, not the
        rounding of the target.
        """
        return float(self.predict([target])[1][0])

    def summary(self) -> dict[str, Any]:
        """What was fitted, as plain numbers under the names of the attributes."""
        names = (
            "momentum",
            "warm",
            "memory",
            "rounding",
            "drift_to_noise",
            "drift_to_noise_interval",
            "correlation_time",
            "correlation_time_interval",
            "effective_dimension",
            "evidence",
            "p_value",
        )
        values = {name: getattr(self, name) for name in names}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    def walk_covariance(self, momentum: float | None = None) -> np.ndarray:
        """Covariance of walk, carried momentum and rounding at the recorded steps, up to a factor,
        ``[T, T]``: the run without drift.

        ``momentum`` replaces what was fitted, then of noise without a memory. Positive definite.
        """
        beta, memory = (self.momentum, self.memory) if momentum is None else (momentum, 0.0)
        response = self._clock.at(self.steps.astype(np.float64)).response(beta)
        walk, coasted = response.covariance(memory), self.carried * response.coasted()
        return with_rounding(walk, self.rounding) + np.outer(coasted, coasted)

    def shares(self, matrices: np.ndarray) -> np.ndarray:
        """Share of the scope's variance that falls on tensors with Gram matrices ``[N, T, T]``, by
        likelihood, ``[N]``.

        ``variance(target) * shares`` is each tensor's expected squared error.
        """
        chosen = matrices[:, self._rows[:, None], self._rows]
        shares = np.zeros(len(matrices))
        for part, share in self._parts:
            white = ((chosen @ part.basis) * part.basis).sum(axis=1)
            shares += (
                white @ (1 / (1 + part.strengths[:, None] * part.spread)).T / part.scales
            ) @ share
        return shares / len(self._rows)

    def predict(self, targets: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``weights`` and ``variance`` of J targets at once, ``float64 [J, T]`` and ``[J]``; hardly
        dearer than one.
        """
        weights, left, spread = self._moments(np.asarray(targets, np.float64), self._gram)
        return weights, left + spread

    def drift_weights(self, targets: Sequence[float] | np.ndarray) -> np.ndarray:
        """Weights of J targets if only the drift goes on from the last step, ``float64 [J, T]``.

        ``predict`` also coasts on the optimizer's momentum. That is nearer to the weights of the
        run, whose later gradients it takes for independent; but gradients push back where the loss
        is steep, and there coasting can ruin the task.
        """
        return self._moments(np.asarray(targets, np.float64), self._gram, coasting=False)[0]

    def coefficients(
        self, targets: Sequence[float] | np.ndarray, axis: np.ndarray, *, fading: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted coefficients along the direction ``M^T axis`` and their standard deviations,
        ``float64 [J]`` each.

        ``axis [T]`` makes the direction a unit vector: ``U[:, k] / S[k]``. What no hyperparameter
        explains falls on all directions alike; what the posterior leaves open about the drift lies
        in the observed ones. Without ``fading`` a turning drift only turns: it does not also die
        with the chance that one of its age does.
        """
        along = self.gram[self._rows] @ axis
        weights, left, spread = self._moments(
            np.asarray(targets, np.float64), np.outer(along, along), fading
        )
        return weights[:, self._rows] @ along, np.sqrt(left / self.effective_dimension + spread)

    def _moments(
        self, at: np.ndarray, metric: np.ndarray, fading: bool = True, coasting: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean weights ``[J, T]``, the unexplained variance ``[J]``, and the posterior's spread in
        ``metric [T, T]``.
        """
        times = self.steps[self._rows].astype(np.float64)
        union = np.unique(np.r_[times, at])
        seen, ahead = np.searchsorted(union, times), np.searchsorted(union, at)
        count = int(seen[-1]) + 1  # of the steps that are not later than the last observed one
        grid = self._clock.at(union)
        response = grid.response(self.momentum)
        # A drift that turns has been seen for s steps and survives to step t with chance s / t; a
        # line goes on.
        whole = np.ones(len(grid.middles))
        survivors = times[-1] / np.maximum(grid.middles, times[-1]) if fading else whole
        walked = ahead if coasting else np.repeat(seen[-1:], len(at))

        def between(correlation: float, share: np.ndarray, to: np.ndarray) -> np.ndarray:
            """Covariance of the observed steps with others, ``[T, J]``."""
            known = response.covariance(correlation, count)
            if to.max() >= count:
                onward = response.onward(correlation, known, share)
                known = np.concatenate([known, onward], axis=1)
            return known[np.ix_(seen, to)]

        carried = self.carried * response.coasted()
        walk = between(self.memory, whole, walked) + np.outer(carried[seen], carried[walked])
        walk_ahead = (response.variance(self.memory) + carried**2)[walked]
        mean, left, square = np.zeros((len(at), len(times))), np.zeros(len(at)), np.zeros(len(at))
        for part, share in self._parts:
            if np.isfinite(part.decay):
                reached = response.reached(part.decay)
                drift, drift_ahead = np.outer(reached[seen], reached[ahead]), reached[ahead] ** 2
            else:
                correlation = float(np.exp(-1 / part.lifetime))
                lasting = survivors if np.isfinite(part.lifetime) else whole
                drift = between(correlation, lasting, ahead)
                drift_ahead = response.variance(correlation)[ahead]
            strengths = part.strengths[:, None]
            cross = (walk + strengths[..., None] * drift).transpose(
                2, 0, 1
            ) @ part.basis  # [J, C, T]
            shrunk = cross / (1 + strengths * part.spread)
            mean += share @ shrunk @ part.basis.T
            explained = (cross * shrunk).sum(axis=2)
            left += (
                part.scales
                * (walk_ahead[:, None] + part.strengths * drift_ahead[:, None] - explained)
            ) @ share
            white_metric = part.basis.T @ metric @ part.basis
            square += ((shrunk @ white_metric) * shrunk).sum(axis=2) @ share
        weights = np.zeros((len(at), len(self.steps)))
        weights[:, self._rows] = mean
        return weights, left, np.maximum(0.0, square - ((mean @ metric) * mean).sum(axis=1))


def fit_whole(gram: Gram, spaced: int | None = None) -> TrajectoryFit | None:
    """``fit_trajectory`` of all groups together; None with fewer than three steps, or if nothing
    moved.
    """
    whole = gram.whole
    if len(gram.steps) < 3 or not np.trace(whole) > 0:
        return None
    return fit_trajectory(
        whole,
        gram.steps,
        num_parameters=float(gram.num_parameters.sum()),
        rates=gram.rates,
        momentum=gram.momentum,
        spaced=spaced,
    )


def fit_trajectory(
    gram: np.ndarray,
    steps: np.ndarray,
    *,
    num_parameters: float,
    rates: np.ndarray | None = None,
    momentum: float | None = None,
    spaced: int | None = None,
) -> TrajectoryFit:
    """The model fitted to a Gram matrix, usually the sum over a scope (``Gram.scoped("global")``):
    one fit for all targets.

    Args:
        gram: ``float64 [T, T]``.
        steps: recorded optimizer steps ``[T]``, positive and increasing.
        num_parameters: coordinates that the Gram matrix sums over; bounds the effective dimension.
        rates: learning rate of every optimizer step from 1 on, in any unit, possibly past the last
            recorded step; None for a constant one. Past its end it keeps its last value.
        momentum: of an optimizer that these steps go on with, as earlier ones of the run tell it;
            None to fit it. An optimizer that starts with the steps shows it in the first ones; to a
            fit of few steps of a warm one a drift may be a slow walk. What this one's momentum
            holds at the base may be anything, and is no evidence of a drift.
        spaced: where there are twice as many recorded steps or more, fit to so many, evenly spaced.
            What lasts is then told from what does not by long lags, whatever the noise is like at
            short ones and however often the run was saved. None for all, which show the momentum
            best.

    A few tenths of a second at 100 steps, most of it the search for momentum and rounding; reads no
    weights. Of more than 200 recorded steps the last 100 and 100 spread over the earlier ones are
    used.

    Raises:
        ExtrapolationError: fewer than three recorded steps, or nothing moved.
    """
    if len(steps) < 3:
        raise ExtrapolationError(
            f"{len(steps)} recorded step{'s' * (len(steps) != 1)} cannot tell a drift from a walk; "
            "record at least 3, or use --method two-point or hold"
        )
    if not np.trace(gram) > 0:
        raise ExtrapolationError(
            "nothing moved up to here, so there is no motion to continue; use later steps"
        )
    rows = _thin(len(steps)) if spaced is None else spaced_rows(steps, spaced)
    recorded, whole = steps, gram
    gram, steps = gram[np.ix_(rows, rows)], steps[rows]
    unit = max(1.0, float(steps[-1]) / _GRID)
    start, free = START[:WALK], ALONE
    histories: tuple[int, ...] = (0, _HISTORY)
    if momentum is not None:
        start = (logit(momentum), *START[1:3], _CARRIED)
        free, histories = CONTINUED, (_HISTORY,)
    clocks = [Clock(unit, history, rates) for history in histories]
    walks = [(*search(gram, steps, clock, start, free), clock) for clock in clocks]
    (null, walk_only, walk_clock), *others = sorted(walks, key=itemgetter(0))
    drifts = [(*search(gram, steps, walk_clock, (*walk_only, *START[WALK:]), free), walk_clock)]
    for loss, walk, clock in others:
        if loss - null < 1 + _FAR_BEHIND * (null - drifts[0][0]):
            drifts.append((*search(gram, steps, clock, (*walk, *START[WALK:]), free), clock))
    loss, parameters, clock = min(drifts, key=itemgetter(0))
    # The walk of the best drift may, on its own, explain more than the walk fitted first: then that
    # fit had missed the optimum, and the difference is not evidence of a drift.
    again, walk_there = search(gram, steps, clock, tuple(parameters[:WALK]), free)
    if again < null:
        null, walk_only, walk_clock = again, walk_there, clock
    parts, posterior, effective = integrate(gram, steps, clock, parameters, num_parameters)
    evidence = max(0.0, 2 * effective * (null - loss))
    p_value = 0.5 * float(np.exp(-evidence / 2)) if evidence else 1.0
    if p_value > _DOUBT:
        # A slow walk and a drift that turns quickly look alike: without evidence the walk's
        # momentum explains the motion.
        parameters, clock = walk_only, walk_clock
        parts, posterior, effective = integrate(gram, steps, clock, parameters, num_parameters)
    times = np.array([min(part.lifetime, part.decay) for part in parts])
    order = np.argsort(times)
    lasting = quantiles(times[order], posterior.sum(axis=1)[order])
    strong = quantiles(RATIOS, posterior.sum(axis=0))
    return TrajectoryFit(
        steps=recorded,
        momentum=expit(parameters[0]),
        warm=clock.history > 0,
        memory=float(parameters[2]),
        carried=float(parameters[3]),
        rounding=float(np.exp(parameters[1])),
        drift_to_noise=strong[1],
        drift_to_noise_interval=(strong[0], strong[2]),
        correlation_time=lasting[1],
        correlation_time_interval=(lasting[0], lasting[2]),
        effective_dimension=effective,
        evidence=evidence,
        p_value=p_value,
        gram=whole,
        _clock=clock,
        _rows=rows,
        _gram=gram,
        _parts=kept(parts, posterior),
    )


def spaced_rows(steps: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most so many of the recorded ``steps [T]``, evenly spaced, with the last; of
    all where that would leave less than two steps between them.
    """
    if len(steps) < 2 * most:
        return np.arange(len(steps))
    wanted = steps[-1] * np.arange(1, most + 1) / most
    return np.unique(np.abs(steps[:, None] - wanted).argmin(axis=0))


def _thin(num_steps: int) -> np.ndarray:
    """Indices of the recorded steps that a fit uses; its cost grows with their cube."""
    if num_steps <= _MOST:
        return np.arange(num_steps)
    earlier = np.linspace(0, num_steps - _RECENT - 1, _MOST - _RECENT).round().astype(np.int64)
    return np.r_[earlier, np.arange(num_steps - _RECENT, num_steps)]
