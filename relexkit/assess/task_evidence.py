"""What a drift was worth on the task: predictions of the study's runs beside what training gained.

A drift ``rho`` times the noise at the last step ``T`` that lasts ``ell`` steps has the standing
``rho ell / T``: how many times over it was above the noise, times how many times as long as the run
it lasts. A strong drift that turns soon has a low one, and so has a lasting one within the noise.
``python docs/study/report.py`` computes ``STUDY`` again.
"""

from __future__ import annotations

from dataclasses import dataclass

from relexkit.geometry.trajectory_model import TrajectoryFit

_LONGEST = 8.0  # of the run: more than that a record cannot tell


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
    Worth("3e-6", 25, 50, (0, 1, 2, 3, 4), (36.50, 53.45), 0.043, 0.054),
    Worth("3e-6", 50, 100, (0, 1), (42.34, 48.37), 0.034, 0.055),
    Worth("1e-5", 25, 50, (0,), (2.82, 2.82), 0.006, 0.049),
    Worth("1e-5", 50, 100, (0, 1), (1.78, 3.34), 0.005, 0.051),
    Worth("3e-5", 25, 50, (0,), (0.22, 0.22), -0.047, 0.062),
)


def standing(fit: TrajectoryFit) -> float:
    """Of a run's drift; see the module."""
    last = float(fit.steps[-1])
    return fit.drift_to_noise * min(fit.correlation_time / last, _LONGEST)


GAINING = 10.0
"""The standing from which an extrapolation is advised: between the greatest that gained nothing
(3.3) and the least that gained (33), in the middle of their logarithms. No run lies in between.
"""


def worth(fit: TrajectoryFit) -> str:
    """What the study's runs of this standing gained on the task, as a sentence."""
    here = standing(fit)
    gained = here >= GAINING
    alike = [w for w in STUDY if (w.standing[0] >= GAINING) == gained]
    low, high = min(w.standing[0] for w in alike), max(w.standing[1] for w in alike)
    between = "" if (here >= low if gained else here <= high) else ", the nearest that there are,"
    what = "kept most of what training gains" if gained else "were worth nothing"
    return (
        f"Drift to noise times lasting over last step is {here:.2g}. In the study (greedy accuracy"
        f" of one small model, docs/study.md) predictions of runs at {low:.2g} to"
        f" {high:.2g}{between} {what} on the task: {'; '.join(map(str, alike))}."
    )
