"""Jumps: recorded steps that were not trained but predicted, as a training with periodic
re-grounding has them.

A jump is a recorded step whose metric ``jump_steps`` says how many steps it skips. Analysis takes
the steps before the first one, which the optimizer made from the base; a further prediction takes
those since the last one (``relexkit.gram_matrix.segment``).
"""

from __future__ import annotations

import numpy as np

from relexkit.errors import StoreError
from relexkit.store import TrajectoryStore

JUMP_METRIC = "jump_steps"


def jumps(store: TrajectoryStore) -> np.ndarray:
    """Steps that a jump led to, ``int64 [J]``, ascending."""
    if JUMP_METRIC not in store.metric_names():
        return np.empty(0, np.int64)
    return store.steps[np.isfinite(store.metrics()[JUMP_METRIC])]


def last_trained(store: TrajectoryStore, until: int | None) -> int | None:
    """``until``, or the last step before the first jump if that is earlier.

    Raises:
        StoreError: the first recorded step is a jump.
    """
    jump_steps = jumps(store)
    if not len(jump_steps) or (until is not None and until < jump_steps[0]):
        return until
    trained = store.steps[store.steps < jump_steps[0]]
    if not len(trained):
        raise StoreError(
            f"{store.path}: begins with a jump at step {jump_steps[0]}; expected steps of training"
            " before it"
        )
    return int(trained[-1])
