"""Exact and randomized passes as the number of steps grows, beside what ``--pca auto`` estimates
for them.

    python tests/benchmarks/pca_crossover.py WORK [--parameters D] [--steps T ...] [--repeats N]

One process, after one pass of each kind that is not counted; the two in turn, nothing kept from
before. Prints a table of processor seconds. Stores are made under WORK and removed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from made_store import make_store

from relexkit import TrajectoryStore, gram
from relexkit.gram_matrix.lowrank.randomized import randomized_gram
from relexkit.gram_matrix.pca import estimated_seconds

PASSES: dict[str, Callable] = {"exact": gram, "randomized": randomized_gram}


def seconds(path: Path, name: str) -> float:
    """Processor seconds of a pass over a store that keeps no result."""
    for kept in ("gram", "randomized"):
        shutil.rmtree(path / kept, ignore_errors=True)
    store = TrajectoryStore(path)
    used = time.process_time()
    PASSES[name](store)
    return time.process_time() - used


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--parameters", type=float, default=2**19)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 100, 300])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / "made.zarr"
    print(
        "| T | exact CPU s | estimated | randomized CPU s | estimated | randomized / exact |"
        " estimated |"
    )
    print("|---|---|---|---|---|---|---|")
    for count in given.steps:
        store = make_store(path, int(given.parameters), count)
        estimates = dict(zip(PASSES, estimated_seconds(store, count, 8), strict=True))
        found: dict[str, list[float]] = {name: [] for name in PASSES}
        for repeat in range(given.repeats + 1):
            for name in PASSES if repeat % 2 else reversed(PASSES):
                found[name].append(seconds(path, name))
        middle = {name: statistics.median(values[1:]) for name, values in found.items()}
        cells = [
            f"{middle[n]:.2f} ({min(found[n][1:]):.2f} to {max(found[n][1:]):.2f}) |"
            f" {estimates[n]:.2f}"
            for n in PASSES
        ]
        ratios = (
            f"{middle['randomized'] / middle['exact']:.2f} |"
            f" {estimates['randomized'] / estimates['exact']:.2f}"
        )
        print(f"| {count} | {' | '.join(cells)} | {ratios} |", flush=True)
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
