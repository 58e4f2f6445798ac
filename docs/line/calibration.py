"""The tables of docs/line.md: errors of predictions and coverage of intervals on simulated runs of
every kind.

    PYTHONPATH=tests python docs/line/calibration.py [NUM_RUNS]

Half of the runs record every step up to 50, half 21 irregular ones. The intervals' prior was chosen
on seeds 100 to 139.
"""

from __future__ import annotations

import sys

import numpy as np
from simulated import COVERAGE_FAMILIES, IRREGULAR, D, Run, covered, simulate
from strategies import gram_of

from relexkit import Prediction
from relexkit.geometry.trajectory_model import fit_trajectory
from relexkit.predict.extrapolators import predict_weights

OTHERS = ("hold", "two-point", "least-squares", "relex")


def errors(run: Run, seed: int) -> list[float]:
    """Squared relative errors at step 100 from irregular steps up to 50, by method."""
    deltas = simulate(run, 100, seed)
    seen, gram = deltas[IRREGULAR - 1], deltas[IRREGULAR - 1] @ deltas[IRREGULAR - 1].T
    runs = gram_of({"w": seen}, IRREGULAR)
    weights = [predict_weights(runs, [100.0], Prediction(method=name))[0, 0] for name in OTHERS]
    weights.append(fit_trajectory(gram, IRREGULAR, num_parameters=D).weights(100.0))
    return [
        float(((seen.T @ a - deltas[-1]) ** 2).sum() / (deltas[-1] ** 2).sum()) for a in weights
    ]


def main() -> None:
    num_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    print(f"| kind of run | {' | '.join(OTHERS)} | model |")
    for kind, run in COVERAGE_FAMILIES.items():
        found = np.sqrt(np.mean([errors(run, seed) for seed in range(8)], axis=0))
        print(f"| {kind} | {' | '.join(f'{e:.3f}' for e in found)} |", flush=True)
    every = []
    print("\n| kind of run | coverage | standard error | by target |")
    for kind, run in COVERAGE_FAMILIES.items():
        hits = np.array([covered(run, seed) for seed in range(200, 200 + num_runs)])
        error = hits.mean(axis=1).std() / np.sqrt(num_runs)
        every.append(hits)
        print(
            f"| {kind} | {hits.mean():.3f} | {error:.3f} |"
            f" {', '.join(f'{h:.2f}' for h in hits.mean(axis=0))} |",
            flush=True,
        )
    print(f"all: {np.mean(every):.3f}; by target {np.mean(every, axis=(0, 1)).round(3)}")


if __name__ == "__main__":
    main()
