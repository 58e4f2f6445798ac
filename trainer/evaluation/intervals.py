"""What a finite number of problems says about accuracies: 95 % intervals, differences on common
problems, pass@k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054


def mean_interval(value_N: np.ndarray, num_answers: int | None = None) -> tuple[float, float]:
    """95 % interval of the mean of a problem's value between 0 and 1, over ``N`` problems drawn
    from many.

    Wilson's interval with the number of trials that has the variance observed between problems, at
    least ``N`` and at most ``num_answers`` (default ``N``), the answers behind the values. For
    values 0 and 1 this is Wilson's interval itself.
    """
    count = len(value_N)
    mean, variance = float(np.mean(value_N)), float(np.var(value_N))
    trials = float(count)
    if 0 < mean < 1 and num_answers is not None:
        wanted = count * mean * (1 - mean) / variance if variance > 0 else math.inf
        trials = min(max(trials, wanted), float(num_answers))
    spread = _Z95**2 / trials
    middle = (mean + spread / 2) / (1 + spread)
    half = math.sqrt(max(0.0, mean * (1 - mean)) * spread + spread**2 / 4) / (1 + spread)
    return (0.0 if mean == 0 else middle - half), (1.0 if mean == 1 else middle + half)


@dataclass(frozen=True)
class Difference:
    """Mean of the first minus the second over ``num_problems`` common problems, with its 95 %
    interval.
    """

    difference: float
    interval: tuple[float, float]
    num_problems: int

    @property
    def verdict(self) -> str:
        """``above``, ``below`` or ``not told apart``: on which side of zero the interval lies."""
        low, high = self.interval
        return "above" if low > 0 else "below" if high < 0 else "not told apart"


def paired_difference(first_N: np.ndarray, second_N: np.ndarray) -> Difference:
    """Mean difference of two models' values (between 0 and 1) on the same problems.

    Interval after Agresti and Min (2005): Wald's for paired values with half an observation added
    to each of both right, both wrong, only the first and only the second right, which keeps its
    coverage where few problems differ.
    """
    difference_N = np.asarray(first_N, np.float64) - np.asarray(second_N, np.float64)
    count = len(difference_N) + 2
    middle = float(difference_N.sum()) / count
    variance = (float((difference_N**2).sum()) + 1) / count - middle**2
    half = _Z95 * math.sqrt(variance / count)
    return Difference(
        float(difference_N.mean()),
        (max(-1.0, middle - half), min(1.0, middle + half)),
        len(difference_N),
    )


def pass_at_k(num_right_N: np.ndarray, num_samples: int, k: int) -> np.ndarray:
    """Unbiased estimate, for every problem, that at least one of ``k`` samples is right: ``1 - C(n
    - c, k) / C(n, k)``.

    With ``n = num_samples`` samples of which ``c`` are right (Chen et al. 2021, arXiv 2107.03374);
    ``float64 [N]``.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}; expected 1 to the number of samples, {num_samples}")
    ways = math.comb(num_samples, k)
    return np.array([1 - math.comb(num_samples - int(right), k) / ways for right in num_right_N])
