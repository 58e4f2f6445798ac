"""A prediction as one value: which method, with which options, fitted to which steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from relexkit.predict.fits import Options
from relexkit.weights.layout import Scope

Extrapolator = Callable[[np.ndarray, float], np.ndarray]
"""A method of one's own: ``(steps [T], target) -> weights [T]`` over the recorded deltas, so that
``theta_0 + sum_i weights[i] * delta_i`` is the prediction.
"""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is to be predicted, whatever the targets."""

    method: str | Extrapolator = "relex"
    """how to predict"""
    options: Options = field(default_factory=Options)
    """what the method is told"""
    scope: Scope | None = None
    """what shares one fit (default: the method's own, tensor or global)"""
    scale: float = 1.0
    """multiply the predicted displacement from the base"""
    until: int | None = None
    """use only steps up to this one"""


PLAIN = Prediction()
"""RELEX along the first direction of every tensor, from all steps."""
