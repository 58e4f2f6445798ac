"""What the metrics of a run say about its steps: the learning-rate schedule, and how many steps had
anything to learn from.

Metrics are arrays over the recorded steps with NaN where nothing was logged, as
``TrajectoryStore.metrics`` returns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# A step is informative if the first of these metrics that was logged says so; names are those of
# TRL, verl and our trainer.
_INFORMATIVE = {
    "num_informative_groups": lambda v: v > 0,
    "informative": lambda v: v > 0,
    "frac_reward_zero_std": lambda v: v < 1,
    "reward_std": lambda v: v > 0,
    "grad_norm": lambda v: v > 0,
}
_STRAIGHT = 1e-3  # of the largest rate: a schedule closer than this to a line is continued as one


@dataclass(frozen=True)
class Informative:
    """Steps with a gradient: at least one group whose rewards differ.

    Attributes:
        count: of the steps for which the metric was logged.
        known: number of those steps.
        metric: which metric told.
    """

    count: int
    known: int
    metric: str


def informative_steps(metrics: Mapping[str, np.ndarray]) -> Informative | None:
    """How many recorded steps had a gradient; None if no metric tells.

    Between them an optimizer with momentum only coasts along its last update, which looks like a
    line and is none.
    """
    for name, informative in _INFORMATIVE.items():
        values = np.asarray(metrics[name]) if name in metrics else np.empty(0)
        values = values[np.isfinite(values)]
        if len(values):
            return Informative(int(np.count_nonzero(informative(values))), len(values), name)
    return None


def learning_rates(steps: np.ndarray, metrics: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Learning rate of every optimizer step ``[S]``, for ``fit_trajectory``; None if it was
    constant or not logged.

    Interpolated between the recorded steps. A schedule whose last five logged rates fall on a
    descending line is continued down to zero, as a linear decay goes on; any other keeps its last
    rate.
    """
    if "learning_rate" not in metrics:
        return None
    values = np.asarray(metrics["learning_rate"], np.float64)
    known = np.isfinite(values) & (values >= 0)
    if (
        known.sum() < 2
        or not values[known].max() > 0
        or np.ptp(values[known]) < 1e-6 * values[known].max()
    ):
        return None
    at, rates = np.asarray(steps, np.float64)[known], values[known]
    recorded = np.interp(np.arange(1, int(steps[-1]) + 1), at, rates)
    if len(at) < 5:
        return recorded
    slope, height = np.polyfit(at[-5:], rates[-5:], 1)
    off = np.abs(slope * at[-5:] + height - rates[-5:]).max()
    if slope >= 0 or off > _STRAIGHT * rates.max():
        return recorded
    last = int(steps[-1])
    end = min(int(np.ceil(-height / slope)) + 1, 100 * last)
    return np.r_[recorded, np.maximum(0.0, slope * np.arange(last + 1, end + 1) + height)]
