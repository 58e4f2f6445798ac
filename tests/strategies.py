"""Trajectories for the tests of the linear algebra: explicit delta matrices, hypothesis strategies
that draw them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from relexkit import Gram

KINDS = ("line", "walk", "noise", "low rank", "still at first", "oscillating")


@dataclass(frozen=True)
class Trajectory:
    """``deltas`` float64 ``[T, D]`` against the base, recorded at ``steps`` int64 ``[T]``."""

    steps: np.ndarray
    deltas: np.ndarray


def trajectory(
    kind: str, steps: np.ndarray, num_columns: int, seed: int, scale: float = 1.0
) -> Trajectory:
    """A trajectory of one of ``KINDS`` at the given steps."""
    random = np.random.default_rng(seed)
    shape = (len(steps), num_columns)
    gaps = np.diff(steps, prepend=0).astype(np.float64)
    if kind == "line":
        deltas = np.outer(steps, random.standard_normal(num_columns))
    elif kind == "walk":
        deltas = (random.standard_normal(shape) * np.sqrt(gaps)[:, None]).cumsum(axis=0)
    elif kind == "noise":
        deltas = random.standard_normal(shape)
    elif kind == "low rank":
        deltas = random.standard_normal((len(steps), 2)) @ random.standard_normal((2, num_columns))
    elif kind == "still at first":
        deltas = random.standard_normal(shape).cumsum(axis=0)
        deltas[: len(steps) // 2] = 0.0
    else:
        deltas = np.outer((-1.0) ** np.arange(len(steps)), random.standard_normal(num_columns))
        deltas += 0.1 * random.standard_normal(shape)
    return Trajectory(steps, scale * deltas)


@st.composite
def step_numbers(draw: st.DrawFn, min_steps: int = 1, max_steps: int = 9) -> np.ndarray:
    """Ascending optimizer steps with irregular gaps."""
    gaps = draw(st.lists(st.integers(1, 40), min_size=min_steps, max_size=max_steps))
    return np.cumsum(np.array(gaps, np.int64))


@st.composite
def trajectories(
    draw: st.DrawFn, min_steps: int = 1, max_steps: int = 9, max_columns: int = 25
) -> Trajectory:
    """Any kind of trajectory, also with fewer columns than steps, from tiny to huge."""
    steps = draw(step_numbers(min_steps, max_steps))
    return trajectory(
        draw(st.sampled_from(KINDS)),
        steps,
        draw(st.integers(1, max_columns)),
        draw(st.integers(0, 2**32 - 1)),
        10.0 ** draw(st.integers(-8, 3)),
    )


def gram_of(deltas: Mapping[str, np.ndarray], steps: np.ndarray) -> Gram:
    """Gram matrices of explicit deltas (name -> ``[T, D]``), in float64, with counts by direct
    comparison.
    """
    changed, moved, unit = [], [], []
    for delta in deltas.values():
        changed.append((np.diff(delta, axis=0, prepend=0.0) != 0).sum(axis=1))
        moved.append((delta != 0).sum(axis=1))
        unit.append(np.full(len(steps), -1))
    return Gram(
        np.asarray(steps, np.int64),
        tuple(deltas),
        np.array([d.shape[1] for d in deltas.values()], np.int64),
        np.stack([d @ d.T for d in deltas.values()]),
        np.array(changed, np.int64),
        np.array(moved, np.int64),
        np.array(unit, np.int64),
    )


def gram_from(
    matrices: np.ndarray,
    steps: np.ndarray,
    num_parameters: float,
    rates: np.ndarray | None = None,
) -> Gram:
    """Given matrices ``[N, T, T]`` of groups that share ``num_parameters``, without counts."""
    nothing = np.zeros((len(matrices), len(steps)), np.int64)
    return Gram(
        steps=steps,
        names=tuple(f"group {n}" for n in range(len(matrices))),
        num_parameters=np.full(len(matrices), num_parameters / len(matrices)),
        matrices=matrices,
        changed=nothing,
        moved=nothing,
        unit_moves=nothing - 1,
        rates=rates,
    )


def walk_with_momentum(
    rng: np.random.Generator,
    num_steps: int,
    num_columns: int,
    beta: float,
    rates: np.ndarray | None = None,
) -> np.ndarray:
    """A walk without direction ``[num_steps, num_columns]`` by a fresh Adam-like optimizer's own
    recursion.
    """
    state, position, rows = np.zeros(num_columns), np.zeros(num_columns), []
    for index in range(num_steps):
        state = beta * state + (1 - beta) * rng.standard_normal(num_columns)
        rate = 1.0 if rates is None else rates[index]
        position = position + rate * state / (1 - beta ** (index + 1))
        rows.append(position)
    return np.array(rows)
