"""SIGKILL at random moments, over everything that writes. This file is also the program that does
the killing: it loads everything once and forks a fresh command for every kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from scenarios import LONG, SCENARIOS, Outcome, Undisturbed

_IN_A_ROW = 4  # kills of one folder, before it is completed

ONE_OF_EACH = (
    "import, exact",
    "append, float",
    "record, bfloat16",
    "watch, sparse",
    "gram",
    "extrapolate",
    "checkout",
    "round",
)
"""For the default tests: every command on one of the encodings, but for ``train``, which loads much
and whose own tests kill it.
"""


def begin(work: Callable[[], Any]) -> tuple[int, int]:
    """Fork and run ``work`` there, which then exits with 0; its process, and where it tells what
    went wrong.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        os._exit(0)
    except BaseException as error:
        os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
    os._exit(1)


def end(child: tuple[int, int]) -> tuple[int, str]:
    """Wait; the status, as of a shell, and what was told."""
    with open(child[1], "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child[0], 0)
    return os.waitstatus_to_exitcode(status), told


def in_child(work: Callable[[], Any]) -> str:
    """What went wrong in ``work``, nothing if it went well."""
    status, told = end(begin(work))
    return told or ("" if status == 0 else f"ended with {status}")


class Victim:
    """One scenario, killed again and again. Threads must not outlive a fork, so all work is done in
    children.
    """

    def __init__(self, name: str, place: Path):
        self.name, self.scenario = name, (SCENARIOS | LONG)[name]
        self.place = place / name.replace(", ", "-")
        told = in_child(lambda: self.known())
        assert not told, told
        began = time.monotonic()
        assert not in_child(self.run)
        self.seconds = time.monotonic() - began
        self.kills = 0

    def known(self) -> Undisturbed:
        """Made in the first child, found again by the others."""
        import pickle

        kept = self.place / "known.pickle"
        if not kept.exists():
            found = Undisturbed.of(self.scenario, self.place)
            kept.write_bytes(pickle.dumps((found.expected, found.checksums)))
        expected, checksums = pickle.loads(kept.read_bytes())
        before, work = self.place / "before", self.place / "work"
        return Undisturbed(self.scenario, before, work, expected, checksums)

    def run(self) -> None:
        outcome = self.scenario.run(self.place / "work")
        assert outcome == Outcome(0, ""), outcome

    def complete(self) -> None:
        self.known().check_completed()

    def look(self, before: int) -> None:
        steps = self.known().check_whole()
        assert len(steps) >= before, f"{before} steps were recorded, {len(steps)} are left"
        (self.place / "steps").write_text(str(len(steps)))

    def kill_some(self, chance: random.Random) -> list[str]:
        """Kill it in a row, look each time, complete it; what went wrong."""
        found = [in_child(lambda: self.known().fresh() and None)]
        (self.place / "steps").write_text("0")
        for _ in range(_IN_A_ROW):
            child = begin(self.run)
            time.sleep(chance.uniform(0, 1.1 * self.seconds))
            os.kill(child[0], signal.SIGKILL)
            status, told = end(child)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                found.append(told)
                break
            self.kills += 1
            steps = int((self.place / "steps").read_text())
            if not ("watch" in self.name or self.scenario.outputs or self.scenario.goes_back):
                found.append(in_child(lambda steps=steps: self.look(steps)))
            else:
                found.append(in_child(lambda: self.look(0)))
        found.append(in_child(self.complete))
        return [f"{self.name}, kill {self.kills}: {problem}" for problem in found if problem]


def kill(place: Path, kills: int, seed: int, names: Iterable[str]) -> None:
    """At least ``kills`` kills, the commands taking turns; prints one line of JSON."""
    chance = random.Random(seed)
    victims = [Victim(name, place) for name in names]
    problems: list[str] = []
    while sum(victim.kills for victim in victims) < kills:
        for victim in victims:
            problems += victim.kill_some(chance)
        print({v.name: v.kills for v in victims}, problems, file=sys.stderr, flush=True)
    print(json.dumps({"kills": {v.name: v.kills for v in victims}, "problems": problems}))


@pytest.mark.parametrize(
    ("kills", "names"),
    [
        (10, ONE_OF_EACH),
        pytest.param(1000, (), marks=pytest.mark.slow),
        pytest.param(12, tuple(LONG), marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_nothing_is_lost(
    kills: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(tmp_path), str(kills), "5", *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == []
    assert sum(report["kills"].values()) >= kills


if __name__ == "__main__":
    kill(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or SCENARIOS)
