"""The Gram matrix of a whole run as one small file, from which spectrum, null and advice follow.

It holds the products of the updates in float32: those of the deltas would lose, on a line, what
their differences say about single updates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from relexkit import Gram, TrajectoryStore, gram

_EVERY = 150
"""Steps up to which every one is kept; after it every fifth."""


def as_gram(steps: np.ndarray, whole: np.ndarray, num_parameters: int) -> Gram:
    """A Gram matrix as a group of its own; counts of changed weights say nothing."""
    counts = np.zeros((1, len(steps)), np.int64)
    size = np.array([num_parameters])
    return Gram(steps, ("model",), size, whole[None], counts, counts, counts)


def every(matrices: Gram, interval: int) -> tuple[Gram, np.ndarray]:
    """The run as if only every so many steps had been saved, and which rows these are."""
    rows = np.flatnonzero(matrices.steps % interval == 0)
    whole = matrices.matrices[0][np.ix_(rows, rows)]
    return as_gram(matrices.steps[rows], whole, int(matrices.num_parameters[0])), rows


def keep_gram(store: TrajectoryStore, place: Path) -> None:
    """Write the Gram matrix of the whole model, and which prompts had nothing to learn from."""
    matrices = gram(store)
    rows = np.flatnonzero((matrices.steps <= _EVERY) | (matrices.steps % 5 == 0))
    whole = matrices.matrices.sum(axis=0)[np.ix_(rows, rows)]
    updates = np.diff(np.diff(np.pad(whole, ((1, 0), (1, 0))), axis=0), axis=1)
    still = store.metrics()["frac_reward_zero_std"][rows]
    np.savez_compressed(
        place,
        steps=matrices.steps[rows],
        updates=updates[np.triu_indices(len(rows))].astype(np.float32),
        num_parameters=matrices.num_parameters.sum(),
        frac_reward_zero_std=still.astype(np.float32),
    )


def load_gram(place: Path) -> tuple[Gram, dict[str, np.ndarray]]:
    """The Gram matrix, float64, and the metric that says which steps were informative."""
    kept = np.load(place)
    steps = kept["steps"]
    updates = np.zeros((len(steps), len(steps)))
    updates[np.triu_indices(len(steps))] = kept["updates"]
    updates += np.triu(updates, 1).T
    whole = updates.cumsum(axis=0).cumsum(axis=1)
    return as_gram(steps, whole, int(kept["num_parameters"])), {
        "frac_reward_zero_std": kept["frac_reward_zero_std"]
    }
