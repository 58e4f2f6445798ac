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
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from runs import LLAMA_CONFIG, Weights, write_checkpoint
from versions import write_pull_version

from relexkit import TrajectoryStore

LARGEST = 28_000_000


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


def timed(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MB of one command."""
    before = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "relexkit", *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - before, usage.ru_maxrss / 1024


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--parameters", type=int, default=135, help="millions")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    base = current = make_base(given.parameters)
    write_checkpoint(given.folder / "base", base, config=LLAMA_CONFIG)
    for step in range(1, given.steps + 1):
        following = moved(current, step)
        write_checkpoint(given.folder / "run" / f"checkpoint-{step}", following)
        for kind in ("xor", "overwrite"):
            write_pull_version(given.folder / kind, step, current, following, encoding=kind)
        current = following
    result: dict[str, object] = {
        "steps": given.steps,
        "parameters": sum(t.numel() for t in base.values()),
        "cores": os.cpu_count(),
        "self_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    checksums = {}
    for kind in ("run", "xor", "overwrite"):
        rows = []
        for repeat in range(given.repeats):
            store = given.folder / f"{kind}-{repeat}.zarr"
            rows.append(
                timed(
                    "import",
                    str(given.folder / kind),
                    "--base",
                    str(given.folder / "base"),
                    "-o",
                    str(store),
                )
            )
        checksums[kind] = TrajectoryStore(store).checksums()
        result[kind] = {
            "bytes": size_of(given.folder / kind),
            "store_bytes": size_of(store),
            "seconds": [round(s, 1) for s, _ in rows],
            "peak_mb": [round(m) for _, m in rows],
            "same_bits": bool(np.array_equal(checksums[kind], checksums["run"])),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
