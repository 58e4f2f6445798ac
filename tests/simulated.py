"""Simulated runs of every kind that the trajectory model, the backtest and the advice are held
against.

A run is drift plus white noise as gradients, an Adam-like optimizer's own recursion, a
learning-rate schedule, and rounding of what is stored. ``D`` parameters are independent. The same
seed gives the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from strategies import gram_from

from relexkit import Prediction
from relexkit.assess.advice import advise
from relexkit.assess.forecast import forecast
from relexkit.geometry.shape import decompose
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.rates import learning_rates
from relexkit.predict.extrapolators import predict_weights

D = 600


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a simulated run; the base run is a walk of independent unit updates.

    Attributes:
        drift: size of the drift per step and parameter, in units of the noise.
        lifetime: steps after which the drift's direction has turned (exponential correlation).
        envelope: factor of the drift at a step (saturation, onset, regime), of the step counted
            from 1.
        turn_at: step from which on the drift has another, independent direction.
        beta, warm: momentum, and whether the optimizer had a history of 200 steps before the base.
        autocorrelation: of the noise itself (AR(1)), besides the optimizer's.
        rates: learning rate at a step, relative.
        rounding: standard deviation of the storage's error, in units of an update.
        informative: share of steps with a gradient at all.
        unit: spacing of stored values in units of an update: rounds to nearest as a 16-bit export
            does.
    """

    drift: float = 0.0
    lifetime: float = np.inf
    envelope: Callable[[float], float] = field(default=lambda step: 1.0)
    turn_at: float = np.inf
    beta: float = 0.0
    warm: bool = False
    autocorrelation: float = 0.0
    rates: Callable[[float], float] = field(default=lambda step: 1.0)
    rounding: float = 0.0
    informative: float = 1.0
    unit: float = 0.0
    noise: float = 1.0


def simulate(run: Run, num_steps: int, seed: int, num_parameters: int = D) -> np.ndarray:
    """Stored deltas of every optimizer step, ``[num_steps, D]``."""
    rng = np.random.default_rng(seed)
    direction, other = rng.standard_normal((2, num_parameters))
    noise, state = np.zeros(num_parameters), np.zeros(num_parameters)
    keep, hold = np.exp(-1 / run.lifetime), run.autocorrelation
    before = 200 if run.warm else 0
    position, rows = np.zeros(num_parameters), []
    for index in range(-before, num_steps):
        if np.isfinite(run.lifetime):
            direction = keep * direction + np.sqrt(1 - keep**2) * rng.standard_normal(
                num_parameters
            )
        noise = hold * noise + np.sqrt(1 - hold**2) * rng.standard_normal(num_parameters)
        now = other if index + 1 >= run.turn_at else direction
        gradient = run.drift * run.envelope(max(1, index + 1)) * now + run.noise * noise
        gradient = gradient * (rng.random() < run.informative)
        state = run.beta * state + (1 - run.beta) * gradient
        if index >= 0:
            position = position + run.rates(index + 1) * state / (
                1 - run.beta ** (index + 1 + before)
            )
            rows.append(position)
    deltas = np.array(rows) + run.rounding * rng.standard_normal((num_steps, num_parameters))
    if run.unit:
        deltas = np.round(deltas / run.unit) * run.unit  # the base is exact in the stored precision
    return deltas


def recorded(deltas: np.ndarray, steps: np.ndarray, num_tensors: int = 3) -> Gram:
    """Gram matrices of some tensors at some steps, with the counts that a 16-bit store would
    have.
    """
    chosen = deltas[np.asarray(steps) - 1]
    parts = np.array_split(chosen, num_tensors, axis=1)
    before = [np.diff(p, axis=0, prepend=0.0) for p in parts]
    units = [np.abs(b) for b in before]
    smallest = min((u[u > 0].min() for u in units if (u > 0).any()), default=1.0)
    return Gram(
        np.asarray(steps),
        tuple(f"model.layers.{i}.mlp.up_proj.weight" for i in range(num_tensors)),
        np.array([p.shape[1] for p in parts]),
        np.array([p @ p.T for p in parts]),
        np.array([(b != 0).sum(axis=1) for b in before]),
        np.array([(p != 0).sum(axis=1) for p in parts]),
        np.array([np.isclose(u, smallest, rtol=1e-6).sum(axis=1) for u in units]),
    )


IRREGULAR = np.array([1, 2, 4, 5, 6, 9, 12, 13, 17, 18, 20, 25, 26, 27, 33, 34, 38, 40, 44, 47, 50])


def saturating(scale: float) -> Callable[[float], float]:
    return lambda step: float(np.exp(-step / scale))


def linear_decay(end: float) -> Callable[[float], float]:
    return lambda step: max(0.0, 1 - step / end)


COVERAGE_FAMILIES: dict[str, Run] = {
    "walk": Run(),
    "walk with momentum": Run(beta=0.9),
    "walk, warm momentum, rounding": Run(beta=0.9, warm=True, rounding=0.5),
    "line, independent noise": Run(drift=0.3),
    "line, autocorrelated noise": Run(drift=0.3, autocorrelation=0.7),
    "line, autocorrelated noise and momentum": Run(drift=0.3, autocorrelation=0.5, beta=0.9),
    "saturating": Run(drift=0.6, envelope=saturating(30.0), beta=0.9),
    "slowly saturating": Run(drift=0.5, envelope=saturating(80.0)),
    "turning": Run(drift=0.4, lifetime=30.0),
    "turning with momentum": Run(drift=0.4, lifetime=60.0, beta=0.9),
}
"""Kinds of run on which the coverage of the coefficient intervals is measured."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A simulated run of the labelled set: what it is, and which advice is right.

    ``metrics`` by optimizer step; ``steps`` that are recorded.
    """

    run: Run
    right: tuple[str, ...]
    steps: np.ndarray = field(default_factory=lambda: np.arange(1, 49))
    metrics: dict[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)


_EVERY_SECOND = np.arange(2, 97, 2)
_LINE_OF_LITTLE_USE = ("extrapolate", "keep-training")
"""A drift a few times the noise predicts the weights, and in the study's runs it gained little."""
_NOT = ("not-a-line", "keep-training")

LABELLED: dict[str, Case] = {
    # walks: nothing to extrapolate
    "walk": Case(run=Run(), right=("not-a-line",)),
    "walk, momentum": Case(run=Run(beta=0.9), right=("not-a-line",)),
    "walk, momentum, warm optimizer": Case(run=Run(beta=0.9, warm=True), right=("not-a-line",)),
    "walk, rounding": Case(run=Run(rounding=1.0), right=("not-a-line",)),
    "walk, irregular steps": Case(run=Run(), right=("not-a-line",), steps=IRREGULAR),
    "walk, momentum, irregular steps": Case(
        run=Run(beta=0.9), right=("not-a-line",), steps=IRREGULAR
    ),
    "walk, decaying rate": Case(
        run=Run(rates=linear_decay(60)),
        right=("not-a-line",),
        metrics={"learning_rate": lambda s: 1 - s / 60},
    ),
    "walk, every second step": Case(run=Run(beta=0.9), right=("not-a-line",), steps=_EVERY_SECOND),
    # lines that last
    "line, strong": Case(run=Run(drift=0.5), right=_LINE_OF_LITTLE_USE),
    "line, fair": Case(run=Run(drift=0.3), right=_LINE_OF_LITTLE_USE),
    "line, momentum": Case(run=Run(drift=0.3, beta=0.9), right=_LINE_OF_LITTLE_USE),
    "line, momentum, warm optimizer": Case(
        run=Run(drift=0.4, beta=0.9, warm=True), right=("extrapolate",)
    ),
    "line, rounding": Case(run=Run(drift=0.4, rounding=1.0), right=("extrapolate",)),
    "line, irregular steps": Case(run=Run(drift=0.4), right=("extrapolate",), steps=IRREGULAR),
    "line, decaying rate": Case(
        run=Run(drift=0.5, rates=linear_decay(150)),
        right=("extrapolate",),
        metrics={"learning_rate": lambda s: 1 - s / 150},
    ),
    "line, every second step": Case(
        run=Run(drift=0.3, beta=0.9), right=("extrapolate",), steps=_EVERY_SECOND
    ),
    "line, autocorrelated noise": Case(
        run=Run(drift=0.5, autocorrelation=0.5), right=("extrapolate",)
    ),
    # the failure shapes of the replication study: gains at first, then collapse; right if the
    # advised step still gains
    "slow turn, momentum": Case(
        run=Run(drift=0.5, lifetime=60.0, beta=0.9), right=("extrapolate", "keep-training")
    ),
    "slow turn": Case(run=Run(drift=0.6, lifetime=60.0), right=("extrapolate", "keep-training")),
    "slow saturation": Case(
        run=Run(drift=0.6, envelope=saturating(60.0)), right=("extrapolate", "keep-training")
    ),
    "line that breaks off soon after": Case(
        run=Run(drift=0.5, turn_at=80, beta=0.9), right=("extrapolate", "keep-training")
    ),
    "line that dies soon after": Case(
        run=Run(drift=0.5, envelope=lambda s: float(s < 80)), right=("extrapolate", "keep-training")
    ),
    # a drift that is over or turns too fast
    "fast turn": Case(run=Run(drift=0.5, lifetime=4.0), right=_NOT),
    "fast turn, momentum": Case(run=Run(drift=0.5, lifetime=4.0, beta=0.9), right=_NOT),
    "saturated": Case(run=Run(drift=1.0, envelope=saturating(6.0)), right=_NOT),
    "died long ago": Case(run=Run(drift=0.8, envelope=lambda s: float(s < 12)), right=_NOT),
    "turned just now": Case(run=Run(drift=0.5, turn_at=30), right=("extrapolate", *_NOT)),
    # precision
    "walk below the spacing": Case(run=Run(unit=20.0), right=("hidden-by-precision",)),
    "line below the spacing": Case(run=Run(drift=0.2, unit=30.0), right=("hidden-by-precision",)),
    "line, momentum, below the spacing": Case(
        run=Run(drift=0.2, beta=0.9, unit=30.0), right=("hidden-by-precision",)
    ),
    # little to learn from
    "sparse reward": Case(
        run=Run(beta=0.9, informative=0.05),
        right=("keep-training", "not-a-line"),
        metrics={"frac_reward_zero_std": lambda s: np.where(np.isin(s, (7, 30)), 0.5, 1.0)},
    ),
    "sparse reward, one hit": Case(
        run=Run(beta=0.9, drift=2.0, envelope=lambda s: float(s == 5), noise=0.0),
        right=("keep-training", "not-a-line"),
        metrics={"reward_std": lambda s: np.where(s == 5, 0.4, 0.0)},
    ),
    "five steps": Case(run=Run(drift=0.5), right=("keep-training",), steps=np.arange(1, 6)),
    "two steps": Case(run=Run(drift=0.5), right=("keep-training",), steps=np.array([1, 2])),
}
"""The labelled set: kinds of run with the right advice. Several seeds of each make the confusion
table.
"""


def observe(
    case: Case, seed: int, times: float = 2.1
) -> tuple[Gram, dict[str, np.ndarray], np.ndarray]:
    """What a store of the run would hold, its metrics, and the true deltas up to ``times`` its last
    step.
    """
    deltas = simulate(case.run, int(times * case.steps[-1]), seed)
    gram = recorded(deltas, case.steps)
    metrics = {name: curve(case.steps) for name, curve in case.metrics.items()}
    gram = replace(gram, rates=learning_rates(case.steps, metrics))
    if not case.run.unit:  # float32 weights: every weight changes, by many units
        gram = replace(gram, unit_moves=np.full_like(gram.unit_moves, -1))
    return gram, metrics, deltas


def judge(case: Case, seed: int) -> tuple[str, bool]:
    """The verdict on a simulated run, and whether it is right: no step may be advised at which hold
    is better.
    """
    gram, metrics, deltas = observe(case, seed)
    advice = advise(gram, metrics)
    if advice.verdict not in case.right or advice.target is None:
        return advice.verdict, advice.verdict in case.right
    assert advice.method is not None
    weights = predict_weights(
        gram, [float(advice.target)], Prediction(method=advice.method, scope="global")
    )[0, 0]
    seen, truth = deltas[case.steps - 1], deltas[advice.target - 1]
    return advice.verdict, bool(
        ((seen.T @ weights - truth) ** 2).sum() < ((seen[-1] - truth) ** 2).sum()
    )


TARGETS = np.array([55, 65, 80, 100])


def covered(run: Run, seed: int) -> np.ndarray:
    """Whether each target's true coefficient along the first observed direction lies in the
    interval, ``bool [J]``.
    """
    deltas = simulate(run, 100, seed)
    steps = IRREGULAR if seed % 2 else np.arange(1, 51)
    seen = deltas[steps - 1]
    found = forecast(gram_from((seen @ seen.T)[None], steps, D), TARGETS)
    parts = decompose(seen @ seen.T)
    true = deltas[TARGETS - 1] @ (seen.T @ parts.left[:, 0]) / parts.singular_values[0]
    return (found.low[:, 0] <= true) & (true <= found.high[:, 0])
