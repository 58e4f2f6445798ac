"""What the metrics of a run say about its steps: how many had anything to learn from.

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
    line but is not one.
    """
    for name, informative in _INFORMATIVE.items():
        values = np.asarray(metrics[name]) if name in metrics else np.empty(0)
        values = values[np.isfinite(values)]
        if len(values):
            return Informative(int(np.count_nonzero(informative(values))), len(values), name)
    return None
