"""The learning-rate schedule of a run, from what was logged with its steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_STRAIGHT = 1e-3  # of the largest rate: a schedule closer than this to a line is continued as one


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
