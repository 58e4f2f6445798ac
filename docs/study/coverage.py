"""How often the forecast intervals of ``relexkit backtest`` held what the study's runs did later.

    python docs/study/coverage.py

Asks every plain run in docs/study/results from several of its steps, as if every step or only every
fifth had been saved, for its first coefficient at 1.1, 1.25, 1.5 and 2 times the last one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from kept_gram import every, load_gram
from report import table

from relexkit import Gram
from relexkit.assess.forecast import forecast
from relexkit.geometry.trajectory_model import SPACED, TrajectoryFit, fit_whole

RESULTS = Path(__file__).parent / "results"
LAST = (12, 20, 30, 50, 75, 100, 120)
RATIOS = (1.1, 1.25, 1.5, 2.0)
INTERVALS = (1, 5)
CERTAIN, UNCERTAIN, NONE = (
    "a drift certainly above the noise",
    "not certain",
    "of these, no evidence at all",
)


def asked(run: Gram, last: int, interval: int) -> tuple[Gram, np.ndarray]:
    """The steps that were saved up to ``last``, and the rows of the targets in ``run``."""
    seen = every(run.until(last), interval)[0]
    targets = [ratio * last for ratio in RATIOS if ratio * last <= run.steps[-1]]
    return seen, np.array([np.abs(run.steps - target).argmin() for target in targets], np.int64)


def held(run: Gram, seen: Gram, rows: np.ndarray) -> np.ndarray:
    """Whether the 90 % interval held the run's first coefficient, ``bool [targets]``."""
    found = forecast(seen, run.steps[rows])
    values, vectors = np.linalg.eigh(seen.matrices[0])
    axis = vectors[:, -1] * np.sign(vectors[-1, -1]) / np.sqrt(values[-1])
    known = np.searchsorted(run.steps, seen.steps)
    true = run.matrices[0][np.ix_(known, rows)].T @ axis
    return (found.low[:, 0] <= true) & (true <= found.high[:, 0])


def evidence(fit: TrajectoryFit) -> tuple[str, ...]:
    """The rows of the table that a question belongs to."""
    if fit.p_value > 0.05:
        return UNCERTAIN, NONE
    return (CERTAIN,) if fit.drift_to_noise_interval[0] > 1 else (UNCERTAIN,)


def questions() -> Iterator[tuple[str, int, str, np.ndarray]]:
    """The run's arm, how often it was saved, the evidence, and what was held."""
    for place in sorted(RESULTS.glob("plain-*/seed-*-gram.npz")):
        run, _ = load_gram(place)
        for interval in INTERVALS:
            for last in LAST:
                seen, rows = asked(run, last, interval)
                fit = fit_whole(seen, SPACED) if len(seen.steps) >= 4 and len(rows) else None
                if fit is None:
                    continue
                answers = held(run, seen, rows)
                for name in evidence(fit):
                    yield place.parent.name, interval, name, answers


def coverage_table() -> str:
    """Coverage by evidence and distance; every step saved / every fifth."""
    by_evidence: dict[str, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for arm, interval, name, answers in questions():
        by_evidence[name][interval].append(answers)
        if name != NONE:
            by_evidence[arm][interval].append(answers)
    rows = []
    for name in sorted(by_evidence, key=lambda n: (n.startswith("plain"), n)):
        found = by_evidence[name]
        counts = " / ".join(str(sum(map(len, found[i]))) for i in INTERVALS)
        whole = " / ".join(
            f"{np.mean(np.concatenate(found[i])):.2f}" for i in INTERVALS if found[i]
        )
        cells = []
        for place in range(len(RATIOS)):
            shares = [[a[place] for a in found[i] if len(a) > place] for i in INTERVALS]
            cells.append(" / ".join(f"{np.mean(s):.2f}" if s else "-" for s in shares))
        rows.append((name, counts, whole, *cells))
    head = ("evidence of a drift", "questions", "coverage", *(f"{r:g} times" for r in RATIOS))
    return table(head, rows)


if __name__ == "__main__":
    print(coverage_table())
