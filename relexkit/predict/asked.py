"""Options that have less effect than they ask for: a line for each, with what is done instead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relexkit.gram_matrix.jumps import last_trained
from relexkit.predict.prediction import Prediction
from relexkit.store import TrajectoryStore


def past_the_end(steps: np.ndarray, until: int | None) -> list[str]:
    """A line if ``until`` is past the last of the recorded ``steps [T]``."""
    if until is None or not len(steps) or until <= steps[-1]:
        return []
    return [f"--until {until}: the run ends with step {steps[-1]}; all of it is used"]


def less_than_asked(
    store: TrajectoryStore, predictions: Sequence[Prediction], targets: Sequence[float]
) -> list[str]:
    """Lines about predictions of a run, each once: a last step past its end, ranks above the number
    of directions, and targets that are recorded steps.
    """
    lines = [line for one in predictions for line in past_the_end(store.steps, one.until)]
    for one in predictions:
        used, rank = len(steps_used(store, one)), one.options.rank
        if 0 < used < rank:
            lines.append(
                f"--rank {rank}: {used} steps have at most {used} directions; all of them are used"
            )
    lines += [
        f"--to {target:g}: this step was trained and recorded, and here it is predicted;"
        f" relexkit checkout {store.path} --step {target:g} -o DIR gives the trained one"
        for target in targets
        if target in store.steps
    ]
    return list(dict.fromkeys(lines))


def steps_used(store: TrajectoryStore, prediction: Prediction) -> np.ndarray:
    """The recorded steps that a prediction is made from, ``int64 [W]``, ascending."""
    until = last_trained(store, prediction.until)
    seen = store.steps if until is None else store.steps[store.steps <= until]
    return seen[-(prediction.options.window or 0) :]
