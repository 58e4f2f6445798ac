"""A store of thousands of small steps: what a step costs to append as the store grows, and what
opening it and asking about it costs then.

    python tests/benchmarks/many_steps.py [--steps N ...] [--parameters D] [--json FILE]

Steps are bfloat16, 0.5 % of the weights move in each, two metrics are logged. Processor seconds of
this machine, user and system; questions are whole commands.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from made_store import base_store, sparse_step
from measure import machine, run

from relexkit import TrajectoryStore
from relexkit.store import StoreWriter
from relexkit.store.encodings.bits import block_checksums, content_checksum

QUESTIONS = {
    "spectrum": ("spectrum", "--scope", "global", "--json"),
    "again": ("spectrum", "--scope", "tensor", "--json"),
    "backtest": ("backtest", "--json"),
    "advise": ("advise", "--json"),
}


def append(path: Path, num_parameters: int, num_steps: int) -> list[float]:
    """Processor seconds of each tenth of the steps."""
    store = base_store(path, num_parameters, dtype="bfloat16")
    [spec] = store.layout.parts
    state = store.read_base(0, 0, spec.numel)
    tenths = [0.0] * 10
    with StoreWriter(path) as writer:
        for step in range(1, num_steps + 1):
            columns, differences = sparse_step(0, 0, spec.numel, step, 0.005)
            state[columns] += differences.view(np.uint16)
            began = time.process_time()
            writer.begin(step)
            writer.write_sparse(0, columns, differences, content_checksum(block_checksums(state)))
            writer.commit({"reward": step / num_steps, "kl": 0.1})
            tenths[10 * (step - 1) // num_steps] += time.process_time() - began
    return tenths


def measure(folder: Path, num_parameters: int, num_steps: int) -> dict[str, Any]:
    """One store: appending, opening, questions."""
    path = folder / f"{num_steps}.zarr"
    tenths = append(path, num_parameters, num_steps)
    began = time.process_time()
    assert len(TrajectoryStore(path).steps) == num_steps
    opening = time.process_time() - began
    costs = {}
    for name, (command, *options) in QUESTIONS.items():
        words = [sys.executable, "-m", "relexkit", command, path, *options]
        cost = run(words, folder / "log", ())
        costs[name] = {"cpu_seconds": cost.cpu_seconds, "peak_bytes": cost.peak_bytes}
    return {
        "steps": num_steps,
        "milliseconds a step, each tenth": [1e4 * t / num_steps for t in tenths],
        "open": opening,
        "questions": costs,
        "files": sum(1 for p in path.rglob("*") if p.is_file()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 3000, 5000])
    parser.add_argument("--parameters", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(json.dumps(machine()))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for num_steps in options.steps:
            found.append(measure(Path(folder), options.parameters, num_steps))
            print(json.dumps(found[-1], indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
