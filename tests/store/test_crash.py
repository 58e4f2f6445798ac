"""Kill the import anywhere: the store holds whole steps only, and the same command completes it.

This file is also the program that does the killing: it imports relexkit once and forks a fresh
import for every crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import store_content, write_run

from relexkit import TrajectoryStore, import_checkpoints
from relexkit.cli import main
from relexkit.errors import StoreError

MUTATIONS = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
}
"""Audit events of the interpreter that change a file system; writing shows as ``open`` with a
writing mode.
"""

CRASHED = 99


def in_child(work: Callable[[], Any]) -> Iterator[Any]:
    """Fork and run ``work`` there; yields the process id at once, then its result (None if it
    died).
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            result = json.dumps(work()).encode()
            os.write(writer, result)
        except BaseException as error:
            os.write(writer, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(0)
    os.close(writer)
    yield pid
    with open(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    yield json.loads(text) if text else None


def run_child(work: Callable[[], Any]) -> Any:
    child = in_child(work)
    next(child)
    return next(child)


def crash_at(count: int, below: str) -> None:
    """End this process, as a kill would, just before its ``count``-th change of a file under
    ``below``.
    """
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        is_write = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (is_write or event in MUTATIONS) and any(
            str(a).startswith(below) for a in arguments[:2]
        ):
            seen += 1
            if seen == count:
                os._exit(CRASHED)

    sys.addaudithook(hook)


def digest(out: Path) -> str:
    """Of all but the Gram matrices, which the command leaves there once it gets so far; ``verify``
    covers them.
    """
    content = {k: v for k, v in store_content(out).items() if not k.startswith("gram")}
    return hashlib.sha256(
        repr(sorted(content.items(), key=lambda item: item[0])).encode()
    ).hexdigest()


def recorded_steps(out: Path) -> list[int] | None:
    """Steps of a store that opens and verifies; None if it says that there is no complete store."""
    try:
        store = TrajectoryStore(out)
    except StoreError as error:
        expected = ("no such store", "is not a trajectory store", "its creation was interrupted")
        return None if any(words in str(error) for words in expected) else [-1]
    store.verify()
    return [int(s) for s in store.steps]


def look(out: Path) -> dict[str, Any]:
    return {"steps": recorded_steps(out)}


class Killer:
    """Forks imports of one run and kills them. Nothing here may start a thread: it would not
    survive the fork.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.source, self.base = folder / "run", folder / "base"
        self.expected = run_child(lambda: self.complete(folder / "whole.zarr"))["digest"]

    def complete(self, out: Path) -> dict[str, Any]:
        """The same command again, to its end."""
        steps = recorded_steps(out)
        import_checkpoints(self.source, out, base=self.base)
        return {"steps": steps, "digest": digest(out), "completed": recorded_steps(out)}

    def crash(self, out: Path, count: int) -> bool:
        """Import until the ``count``-th change; False if the import was done before."""

        def work() -> bool:
            crash_at(count, str(out))
            import_checkpoints(self.source, out, base=self.base)
            return True

        return run_child(work) is None

    def report(self, what: str, out: Path) -> None:
        result = run_child(lambda: self.complete(out)) or {"error": "died"}
        result |= {
            "what": what,
            "same": result.get("digest") == self.expected,
            "lock": Path(f"{out}.lock").exists(),
        }
        print(json.dumps(result), flush=True)

    def every_change(self, first: int, stride: int) -> None:
        """Crash before change number first, first + stride, ...; complete each store once."""
        count = first
        while self.crash(self.folder / f"{count}.zarr", count):
            self.report(f"crash before change {count}", self.folder / f"{count}.zarr")
            count += stride
        print(json.dumps({"changes": count}), flush=True)

    def twice(self, stride: int, *places: int) -> None:
        """Crash, then crash early in the restart, which clears away or discards what is unfinished,
        then complete.
        """
        for count in range(3, 500, stride):
            for again in places:
                out = self.folder / f"{count}-{again}.zarr"
                if not self.crash(out, count):
                    return
                self.crash(out, again)
                self.report(
                    f"crash before change {count}, then before change {again} of the restart", out
                )

    def at_random(self, kills: int, seed: int) -> None:
        """SIGKILL the command at random moments; after each kill look, then run it again, until it
        gets through.
        """
        moments = random.Random(seed)
        command = ["import", str(self.source), "-o", "", "--base", str(self.base), "--json"]
        began = time.monotonic()
        run_child(
            lambda: self._quiet([*command[:3], str(self.folder / "timed.zarr"), *command[4:]])
        )
        duration = time.monotonic() - began
        done, rounds = 0, 0
        while done < kills:
            out = self.folder / f"random-{rounds}.zarr"
            rounds += 1
            steps: list[int] = []
            for _ in range(8):
                child = in_child(partial(self._quiet, [*command[:3], str(out), *command[4:]]))
                pid = next(child)
                time.sleep(moments.uniform(0, duration))
                os.kill(pid, signal.SIGKILL)
                if next(child) is not None:
                    break
                done += 1
                found = run_child(partial(look, out))
                line = found | {
                    "what": f"kill {done}",
                    "kept": (found.get("steps") or [])[: len(steps)] == steps,
                }
                steps = found.get("steps") or steps
                print(json.dumps(line), flush=True)
            self.report(f"completed after {done} kills", out)

    def _quiet(self, arguments: list[str]) -> int:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        return main(arguments)


def killer_reports(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", __file__, str(folder), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_reports(reports: list[dict[str, Any]], steps: list[int]) -> None:
    problems = []
    for report in reports:
        found = report.get("steps")
        whole = found is None or found == steps[: len(found)]
        finished = (
            report.get("same", True)
            and report.get("completed", steps) == steps
            and not report.get("lock")
        )
        if "error" in report or not whole or not finished or not report.get("kept", True):
            problems.append(json.dumps(report))
    assert not problems, "\n".join(problems)


def write_small_run(folder: Path) -> list[int]:
    """Float16 matrices in a log, a dense float32 vector, a buffer and metrics: every kind of file,
    few of each.
    """
    steps = [1, 2, 4]
    shapes = {"model.embed_tokens.weight": (53, 8), "model.norm.weight": (40,)}
    write_run(
        folder,
        steps=steps,
        shapes=shapes,
        dtypes={"model.norm.weight": "float32"},
        dtype="float16",
        density=0.1,
        extras=False,
        buffers=True,
        metrics=True,
        seed=4,
    )
    return steps


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_before_any_change_of_a_file_is_repaired_by_the_same_command(
    tmp_path: Path, stride: int
) -> None:
    steps = write_small_run(tmp_path)
    reports = killer_reports(tmp_path, "every_change", 1, stride)
    changes = reports.pop()["changes"]
    assert changes > 60
    assert len(reports) >= 60 // stride
    check_reports(reports, steps)
    seen = [r.get("steps") for r in reports]
    assert None in seen  # during creation
    assert [] in seen
    assert any(s for s in seen)  # and between and inside the steps


@pytest.mark.parametrize(
    ("stride", "places"),
    [(113, (2, 7)), pytest.param(7, (2, 4, 7, 15), marks=pytest.mark.slow)],
)
def test_a_crash_while_restarting_after_a_crash_is_repaired_too(
    tmp_path: Path, stride: int, places: tuple[int, ...]
) -> None:
    steps = write_small_run(tmp_path)
    reports = killer_reports(tmp_path, "twice", stride, *places)
    assert len(reports) >= 2 * len(places)
    check_reports(reports, steps)


@pytest.mark.parametrize("kills", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_store_opens_and_the_same_command_completes_it(
    tmp_path: Path, kills: int
) -> None:
    steps = list(range(1, 9))
    write_run(
        tmp_path,
        steps=steps,
        density=0.08,
        buffers=True,
        metrics=True,
        dtypes={"model.norm.weight": "float32"},
    )
    reports = killer_reports(tmp_path, "at_random", kills, 7)
    assert sum("kept" in r for r in reports) >= kills
    check_reports(reports, steps)


def test_the_command_itself_survives_sigkill(tmp_path: Path) -> None:
    """``python -m relexkit import`` in a process of its own, killed as soon as the store has its
    first, fourth... step.
    """
    steps = list(range(1, 13))
    run = write_run(tmp_path, steps=steps, density=0.08)
    out = tmp_path / "s.zarr"
    command = [
        sys.executable,
        "-m",
        "relexkit",
        "import",
        str(run.source),
        "-o",
        str(out),
        "--base",
        str(run.base),
    ]
    for until in (1, 4):
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            deadline = time.monotonic() + 60
            while (
                len(recorded_steps(out) or []) < until
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.002)
            process.kill()
        found = recorded_steps(out)
        assert found is not None
        assert found == steps[: len(found)]
        assert len(found) >= until
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert recorded_steps(out) == steps
    import_checkpoints(run.source, tmp_path / "whole.zarr", base=run.base)
    assert digest(out) == digest(tmp_path / "whole.zarr")


if __name__ == "__main__":
    getattr(Killer(Path(sys.argv[1])), sys.argv[2])(*map(int, sys.argv[3:]))
