"""A trajectory imported from weight-sync deltas and from folders of the same run: size, time, peak
memory, and whether the bits agree.

    python tests/benchmarks/weight_sync.py FOLDER [--steps 12] [--parameters 135]

The run is generated: bfloat16, normal weights of standard deviation 0.02 in tensors of up to 28M
elements; at each step 2 % of them move by one unit in the last place. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from runs import LLAMA_CONFIG, Weights, write_checkpoint
from versions import write_pull_version

from relexkit import TrajectoryStore

LARGEST = 28_000_000
KINDS = ("run", "xor", "overwrite")


def make_base(millions: int) -> Weights:
    generator = torch.Generator().manual_seed(0)
    sizes = [LARGEST] * (millions * 1_000_000 // LARGEST) + [885_000] * 30
    return {
        f"model.layers.{i}.mlp.weight": (0.02 * torch.randn(n, generator=generator)).bfloat16()
        for i, n in enumerate(sizes)
    }


def moved(weights: Weights, seed: int) -> Weights:
    random = np.random.default_rng(seed)
    out = {}
    for name, tensor in weights.items():
        bits = tensor.view(torch.int16).numpy().copy()
        at = random.integers(0, len(bits), len(bits) // 50)
        bits[at] += np.int16(1)
        out[name] = torch.from_numpy(bits).view(torch.bfloat16)
    return out


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def write_run(folder: Path, steps: int, millions: int) -> None:
    """The base, the run as folders and as deltas of both encodings."""
    folder.mkdir(parents=True)
    base = current = make_base(millions)
    write_checkpoint(folder / "base", base, config=LLAMA_CONFIG)
    for step in range(1, steps + 1):
        following = moved(current, step)
        write_checkpoint(folder / "run" / f"checkpoint-{step}", following)
        for kind in ("xor", "overwrite"):
            write_pull_version(folder / kind, step, current, following, encoding=kind)
        current = following


MEASURE = """
import os, resource, subprocess, sys, time
began = time.perf_counter()
command = [sys.executable, "-m", "relexkit", *sys.argv[1:]]
subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""
"""A process of its own: a child's peak memory counts that of the process it was forked from."""


def timed(*arguments: str) -> list[float]:
    """Seconds, seconds of CPU, and peak memory in MB of one command."""
    command = [sys.executable, "-c", MEASURE, *arguments]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [round(float(number), 1) for number in shown.split()]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--parameters", type=int, default=135, help="millions")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    if not given.folder.exists():
        write_run(given.folder, given.steps, given.parameters)
    steps = len(list((given.folder / "run").iterdir()))
    result: dict[str, object] = {"steps": steps, "cores": os.cpu_count()}
    rows: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for repeat in range(given.repeats):  # interleaved: the machine may be busy with other work
        for kind in KINDS:
            store = given.folder / f"{kind}-{repeat}.zarr"
            base = str(given.folder / "base")
            rows[kind].append(
                timed("import", str(given.folder / kind), "--base", base, "-o", str(store))
            )
    expected = TrajectoryStore(given.folder / "run-0.zarr").checksums()
    for kind in KINDS:
        store = given.folder / f"{kind}-0.zarr"
        result[kind] = {
            "bytes": size_of(given.folder / kind),
            "store_bytes": size_of(store),
            "seconds_cpu_seconds_peak_mb": rows[kind],
            "same_bits": bool(np.array_equal(TrajectoryStore(store).checksums(), expected)),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
