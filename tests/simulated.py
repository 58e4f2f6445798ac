"""Simulated runs of every kind that the trajectory model, the backtest and the advice are held against.

A run is drift plus white noise as gradients, an Adam-like optimizer's own recursion, a learning-rate schedule, and rounding of what
is stored. ``D`` parameters are independent. The same seed gives the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from relexkit.gram import Gram

D = 600


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a simulated run; the base run is a walk of independent unit updates.

    Attributes:
        drift: size of the drift per step and parameter, in units of the noise.
        lifetime: steps after which the drift's direction has turned (exponential correlation).
        envelope: factor of the drift at a step (saturation, onset, regime), of the step counted from 1.
        turn_at: step from which on the drift has another, independent direction.
        beta, warm: momentum, and whether the optimizer had a history of 200 steps before the base.
        autocorrelation: of the noise itself (AR(1)), besides the optimizer's.
        rates: learning rate at a step, relative.
        rounding: standard deviation of the storage's error, in units of an update.
        informative: share of steps with a gradient at all.
        unit: spacing of stored values in units of an update: rounds to nearest as a 16-bit export does.
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
            direction = keep * direction + np.sqrt(1 - keep**2) * rng.standard_normal(num_parameters)
        noise = hold * noise + np.sqrt(1 - hold**2) * rng.standard_normal(num_parameters)
        now = other if index + 1 >= run.turn_at else direction
        gradient = run.drift * run.envelope(max(1, index + 1)) * now + run.noise * noise
        gradient = gradient * (rng.random() < run.informative)
        state = run.beta * state + (1 - run.beta) * gradient
        if index >= 0:
            position = position + run.rates(index + 1) * state / (1 - run.beta ** (index + 1 + before))
            rows.append(position)
    deltas = np.array(rows) + run.rounding * rng.standard_normal((num_steps, num_parameters))
    if run.unit:
        base = rng.uniform(-0.5, 0.5, num_parameters) * 0  # base weights are exact in the stored precision
        deltas = np.round((base + deltas) / run.unit) * run.unit - base
    return deltas


def recorded(deltas: np.ndarray, steps: np.ndarray, num_tensors: int = 3) -> Gram:
    """Gram matrices of some tensors at some steps, with the counts that a 16-bit store would have."""
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
