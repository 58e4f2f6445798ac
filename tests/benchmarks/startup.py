"""How long commands take to start, as ratios to an empty Python of the same minute.

Run ``python tests/benchmarks/startup.py``; medians of interleaved repetitions. The budgets are 0.3
s for ``relexkit --help``, 0.7 s for ``info`` and 0.5 s for ``import relexkit``.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "data" / "sample-v1-exact.zarr"
STARTED = {
    "empty Python": ["-c", "pass"],
    "relexkit --help": ["-m", "relexkit", "--help"],
    "relexkit info": ["-m", "relexkit", "info", str(SAMPLE)],
    "import relexkit": ["-c", "import relexkit"],
}


def seconds(words: list[str]) -> float:
    """Wall time of one process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main(repetitions: int = 9) -> None:
    """Print medians, spread and ratios."""
    taken: dict[str, list[float]] = {name: [] for name in STARTED}
    for _ in range(repetitions):
        for name, words in STARTED.items():
            taken[name].append(seconds(words))
    empty = statistics.median(taken["empty Python"])
    for name, values in taken.items():
        middle = statistics.median(values)
        print(
            f"{name:<18} {middle:.3f} s ({min(values):.3f} to {max(values):.3f}),"
            f" {middle / empty:.1f} times an empty Python"
        )


if __name__ == "__main__":
    main()
