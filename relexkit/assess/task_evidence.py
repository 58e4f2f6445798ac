"""What a drift was worth on the task: predictions of the study's runs beside what training gained.

A drift ``rho`` times the noise at the last step ``T`` that lasts ``ell`` steps has the standing
``rho min(ell / T, 2)``: how many times over it was above the noise, times how many times as long as
the run it lasts, twice at most, for nothing is predicted beyond that. A strong drift that turns
soon has a low one, and so has a lasting one within the noise.
``python docs/study/report.py`` computes ``STUDY`` again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from relexkit.geometry.trajectory_model import TrajectoryFit

_LONGEST = 2.0  # of the run: no prediction goes farther than twice the last step


@dataclass(frozen=True)
class Worth:
    """Predictions by ``drift`` in runs of one learning rate.

    Attributes:
        rate: learning rate, as text.
        until, target: the last step that was used, and the predicted one.
        seeds: of the runs.
        standing: least and greatest over the runs.
        gained: of greedy accuracy over the last step, mean over the runs.
        trained: what training to ``target`` gained.
    """

    rate: str
    until: int
    target: int
    seeds: tuple[int, ...]
    standing: tuple[float, float]
    gained: float
    trained: float

    def __str__(self) -> str:
        runs = f"{len(self.seeds)} run{'s' * (len(self.seeds) != 1)} at {self.rate}"
        return (
            f"{self.gained:+.3f} where training gained {self.trained:+.3f} ({runs}, steps"
            f" {self.until} to {self.target})"
        )


STUDY = (
    Worth("3e-6", 25, 50, (0, 1, 2, 3, 4), (9.41, 13.29), 0.043, 0.054),
    Worth("3e-6", 50, 100, (0, 1), (25.76, 28.29), 0.034, 0.055),
    Worth("3e-6", 100, 200, (0, 1), (30.52, 47.11), 0.018, 0.045),
    Worth("3e-6", 150, 300, (0,), (42.60, 42.60), 0.025, 0.047),
    Worth("1e-5", 25, 50, (0, 1), (2.82, 4.92), -0.013, 0.045),
    Worth("1e-5", 50, 100, (0, 1), (1.77, 3.31), 0.008, 0.051),
    Worth("1e-5", 100, 200, (0,), (8.14, 8.14), 0.000, 0.047),
    Worth("1e-5", 150, 300, (0,), (10.73, 10.73), 0.004, 0.031),
    Worth("3e-5", 25, 50, (0, 1), (0.17, 0.22), -0.021, 0.055),
    Worth("1e-4", 25, 50, (0, 1), (0.01, 0.01), -0.003, 0.062),
    Worth("1e-4", 50, 100, (0,), (0.03, 0.03), -0.020, 0.029),
    Worth("1e-4", 100, 200, (0,), (4.32, 4.32), -0.246, 0.014),
    Worth("1e-4", 150, 300, (0,), (2.43, 2.43), 0.004, 0.018),
    Worth("3e-4", 25, 50, (0,), (0.01, 0.01), 0.002, 0.197),
)


def standing(fit: TrajectoryFit) -> float:
    """Of a run's drift; see the module."""
    last = float(fit.steps[-1])
    return fit.drift_to_noise * min(fit.correlation_time / last, _LONGEST)


GAINING = 11.0
"""The standing from which an extrapolation is advised. Runs that gained next to nothing had up to
10.7, runs that gained two fifths of what training did, or more, from 9.4 on: one of five at 3e-6
after 25 steps is below.
"""


def worth(fit: TrajectoryFit) -> str:
    """What the study's runs on this side of the bound gained on the task, the two rows of nearest
    standing, as a sentence.
    """
    here = standing(fit)
    alike = [w for w in STUDY if (w.standing[1] >= GAINING) == (here >= GAINING)]
    nearest = sorted(alike, key=lambda w: _apart(w, here))[:2]
    side, what = (
        ("above", "two fifths of what training does, or more,")
        if here >= GAINING
        else ("below", "next to nothing, or lost,")
    )
    return (
        f"Drift to noise times lasting over last step (2 at most) is {here:.2g}; {side}"
        f" {GAINING:.2g}, predictions of twice the steps gained {what} on the task in the study"
        f" (greedy accuracy of one small model, docs/study.md): {'; '.join(map(str, nearest))}."
    )


def _apart(worth: Worth, here: float) -> float:
    """How many times a standing lies outside a row's range, as a logarithm; 0 inside."""
    low, high = worth.standing
    return max(0.0, math.log(low / max(here, 1e-9)), math.log(max(here, 1e-9) / high))
