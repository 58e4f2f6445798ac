"""Two processes write together; at some operation on the disk one dies, or its disk is full.

This file is also the program that starts them: it loads everything once and forks a fresh pair for
every fault.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from disk import Disk, watched
from runs import Run, write_run
from safetensors.torch import load_file
from scenarios import SHAPES, STEPS, Scenario, Undisturbed, command, content_of, tree
from test_kills import begin, in_child

from relexkit import import_checkpoints

SIZE = 2
_DEAD = 9
_PATIENCE = 120.0  # seconds; a fault is noticed in one


def mixed(folder: Path, steps: list[int], motion: str = "bits") -> Run:
    """A run with tensors in three formats, so that both processes own parts that move."""
    return write_run(
        folder,
        steps=steps,
        shapes={**SHAPES, "model.layers.0.mlp.up_proj.weight": (9, 7)},
        density=0.2,
        motion=motion,
        dtypes={"model.norm.weight": "float32", "model.layers.0.mlp.up_proj.weight": "float16"},
        head="tied",
        extras=False,
        buffers=True,
        metrics=True,
    )


def importing(begun: int = 0) -> Scenario:
    """``relexkit import``, of the steps after the first ``begun`` ones."""

    def prepare(folder: Path) -> None:
        run = mixed(folder, STEPS)
        if begun:
            steps = f":{STEPS[begun - 1]}"
            import_checkpoints(run.source, folder / "s.zarr", base=run.base, steps=steps)

    words = ("import", "@run", "-o", "@s.zarr", "--base", "@base")
    return Scenario(prepare, command(*words), content_of("s.zarr"), store="s.zarr")


def writing(*words: str) -> Scenario:
    """A command that writes checkpoint folders."""

    def prepare(folder: Path) -> None:
        run = mixed(folder, [1, 2, 4, 5], "drift")
        import_checkpoints(run.source, folder / "s.zarr", base=run.base, gram=True)

    return Scenario(prepare, command(*words, "-o", "@out"), checkpoints, store="s.zarr")


def checkpoints(folder: Path) -> dict[str, dict[str, bytes]]:
    """The checkpoint folders in ``out``, however their tensors are divided over files."""
    found: dict[str, dict[str, bytes]] = {}
    for path in (folder / "out").rglob("*"):
        place = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in place.parts):
            continue
        content = found.setdefault(str(place.parent), {})
        if path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                assert name not in content
                content[name] = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        elif not path.name.endswith(".index.json"):
            content[path.name] = path.read_bytes()
    return found


TOGETHER = {
    "import": importing(),
    "append": importing(begun=1),
    "extrapolate": writing("extrapolate", "@s.zarr", "--to", "7", "9"),
    "checkout": writing("checkout", "@s.zarr", "--step", "4"),
}


@dataclass
class _DeadlyDisk(Disk):
    """A disk whose user dies at an operation, if it is not to fail there."""

    deadly: bool = False

    def step(self, kind: str, path: str) -> None:
        if self.deadly and self.count + 1 == self.fail_at:
            os._exit(_DEAD)
        super().step(kind, path)


@dataclass(frozen=True)
class Fault:
    """What happens to which process, at which of its operations."""

    rank: int
    at: int
    deadly: bool


class Pair:
    """A scenario run by two processes."""

    def __init__(self, name: str, place: Path):
        self.name, self.scenario, self.place = name, TOGETHER[name], place / name
        told = in_child(self._prepare)
        assert not told, told

    def _prepare(self) -> None:
        found = Undisturbed.of(self.scenario, self.place)
        (self.place / "known").write_bytes(pickle.dumps((found.expected, found.checksums)))
        (self.place / "files").write_bytes(pickle.dumps(self._files()))

    def _files(self) -> dict[str, bytes]:
        """The store, but for sums that are cut where the columns of a process end."""
        found = tree(self.place / "work" / "s.zarr")
        return {name: content for name, content in found.items() if "gram/" not in name}

    def known(self) -> Undisturbed:
        expected, checksums = pickle.loads((self.place / "known").read_bytes())
        before, work = self.place / "before", self.place / "work"
        return Undisturbed(self.scenario, before, work, expected, checksums)

    def run(self, fault: Fault) -> list[tuple[int, str, int]]:
        """Status, what was said, and number of operations of each process."""
        told = in_child(lambda: self.known().fresh() and None)
        assert not told, told
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [begin(lambda r=r: self._work(r, port, fault))[0] for r in range(SIZE)]
        statuses = _wait(children)
        found = []
        for rank, status in enumerate(statuses):
            report = self.place / f"report-{rank}"
            said, count = json.loads(report.read_text()) if status in (0, 1) else ("", 0)
            found.append((status, said, count))
        return found

    def _work(self, rank: int, port: int, fault: Fault) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work = self.place / "work"
        at = fault.at if rank == fault.rank else 0
        with watched(_DeadlyDisk(work, fail_at=at, stays=True, deadly=fault.deadly)) as disk:
            outcome = self.scenario.run(work)
        (self.place / f"report-{rank}").write_text(json.dumps([outcome.said, disk.count]))
        os._exit(outcome.status)

    def check(self, fault: Fault, found: list[tuple[int, str, int]]) -> None:
        """All have ended, the error was told once, and what is left is whole and completed."""
        statuses = [status for status, _, _ in found]
        said = [line for _, text, _ in found for line in text.splitlines()]
        assert not any("Traceback" in line for line in said), said
        if fault.deadly and _DEAD in statuses:
            assert sorted(statuses) in ([1, _DEAD], [0, _DEAD]), (statuses, said)
            assert len(said) == statuses.count(1), said
        elif 1 in statuses:
            assert statuses == [1] * SIZE, (statuses, said)
            assert len(said) == 1, said
        else:  # not reached, or what failed was not asked for
            assert (statuses, said) == ([0] * SIZE, []), (statuses, said)
        told = in_child(self._look)
        assert not told, told

    def _look(self) -> None:
        known = self.known()
        known.check_whole()
        for name, content in checkpoints(known.work).items():
            assert known.expected[name] == content, f"{name} is not whole"
        known.check_completed()

    def check_undisturbed(self, found: list[tuple[int, str, int]]) -> None:
        """Two processes leave byte for byte what one does."""
        assert all((status, said) == (0, "") for status, said, _ in found), found
        assert all(count > 3 for _, _, count in found), found
        told = in_child(self._compare)
        assert not told, told

    def _compare(self) -> None:
        assert self.scenario.result(self.place / "work") == self.known().expected
        wanted = pickle.loads((self.place / "files").read_bytes())
        now = self._files()
        assert now.keys() == wanted.keys(), now.keys() ^ wanted.keys()
        assert [name for name in now if now[name] != wanted[name]] == []


def _wait(children: list[int]) -> list[int]:
    """How all ended; those that hang are killed."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + _PATIENCE
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def check_all(place: Path, sample: int) -> dict[str, object]:
    """Every scenario undisturbed, then with faults at ``sample`` operations of each process (0: at
    every one).
    """
    import torch.distributed  # noqa: F401  once, before anything is forked

    import relexkit.ingest.importer
    import relexkit.materialize  # noqa: F401

    count, problems = 0, []
    for name in TOGETHER:
        pair = Pair(name, place)
        none = Fault(rank=-1, at=0, deadly=False)
        undisturbed = pair.run(none)
        pair.check_undisturbed(undisturbed)
        for rank, (_, _, total) in enumerate(undisturbed):
            stride = max(1, total // sample) if sample else 1
            for number, at in enumerate(range(1 + rank, total + 1, stride)):
                for deadly in (False, True) if not sample else (bool(number % 2),):
                    fault = Fault(rank=rank, at=at, deadly=deadly)
                    count += 1
                    found = pair.run(fault)
                    try:
                        pair.check(fault, found)
                    except AssertionError as problem:
                        problems.append(f"{name}, {fault}: {problem}; {found}"[:900])
        print(name, undisturbed, count, problems, file=sys.stderr, flush=True)
    return {"faults": count, "problems": problems}


@pytest.mark.parametrize("sample", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_fault_in_one_process_ends_all_and_loses_nothing(sample: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(tmp_path), str(sample)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == []
    assert report["faults"] >= 2 * SIZE * len(TOGETHER)


if __name__ == "__main__":
    print(json.dumps(check_all(Path(sys.argv[1]), int(sys.argv[2]))))
