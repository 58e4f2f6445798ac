"""One core against two: two threads of one process, and two processes of one core each.

    python tests/benchmarks/parallel.py --run DIR [--rounds N] [--steps A:B] [--work DIR]

DIR has ``base/`` and ``bfloat16/checkpoint-N``. Every process is bound to its cores, files are in
the page cache, rounds are interleaved. Timed is the work alone, once all processes are joined: the
start of an interpreter, and that of PyTorch, which joins processes, are the same for any size of
work and are given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKS = ("import", "gram", "materialise")
WAYS: dict[str, list[set[int]]] = {
    "one": [{0}],
    "two threads": [{0, 1}],
    "two processes": [{0}, {1}],
}
"""The cores of each process."""


def do(work: str, run: Path, place: Path, steps: str) -> dict[str, float]:
    """This process's share of a work; its wall and processor seconds."""
    began = time.perf_counter()
    from relexkit import TrajectoryStore, extrapolate, gram, import_checkpoints
    from relexkit.gram_matrix.compute.distributed import team as joined
    from relexkit.gram_matrix.compute.settings import Compute

    path = place / "run.zarr"
    with joined() as team:
        if not team.rank:
            made = {"import": path, "gram": path / "gram", "materialise": place / "out"}[work]
            shutil.rmtree(made, ignore_errors=True)
        team.share(lambda: None)
        start, cpu = time.perf_counter(), time.process_time()
        if work == "import":
            import_checkpoints(run / "bfloat16", path, base=run / "base", steps=steps, team=team)
        elif work == "gram":
            gram(TrajectoryStore(path), team=team)
        else:
            extrapolate(TrajectoryStore(path), [100], place / "out", compute=Compute(team=team))
        team.share(lambda: None)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "start_seconds": start - began,
        }


def measure(words: list[str], cores: list[set[int]]) -> dict[str, float]:
    """The same work by a process for each set of cores: the longest times."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, own in enumerate(cores):
        together = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(cores)}
        together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, *words],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"}
                | {name: str(value) for name, value in together.items() if len(cores) > 1},
                preexec_fn=lambda own=own: os.sched_setaffinity(0, own),
            )
        )
    found = []
    for process in started:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"exit status {process.returncode}: {' '.join(words)}")
        found.append(json.loads(out.splitlines()[-1]))
    return {name: max(one[name] for one in found) for name in found[0]}


def rounds(run: Path, place: Path, steps: str, count: int) -> dict[str, Any]:
    """Every work by every way, ``count`` times in turn."""
    found: dict[str, Any] = {work: {way: [] for way in WAYS} for work in WORKS}
    for number in range(count):
        for work in WORKS:
            for way in list(WAYS) if number % 2 == 0 else reversed(WAYS):
                words = ["--do", work, "--run", str(run), "--work", str(place), "--steps", steps]
                one = measure(words, WAYS[way])
                found[work][way].append(one)
                print(f"{work}, {way}: {one}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", default=":10")
    parser.add_argument("--work", type=Path, help="existing folder for temporary files")
    parser.add_argument("--do", choices=WORKS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.do:
        print(json.dumps(do(given.do, given.run, given.work, given.steps)))
        return
    with tempfile.TemporaryDirectory(prefix="relexkit-parallel-", dir=given.work) as place:
        print(json.dumps(rounds(given.run.resolve(), Path(place), given.steps, given.rounds)))


if __name__ == "__main__":
    main()
