"""SIGINT and SIGTERM at any moment: one line, status 130 or 143, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runs import write_run

from relexkit import TrajectoryStore
from relexkit.cli import main

SIGNALS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "terminated"),
]
SAID = "relexkit: {}; run the same command again to go on"


@pytest.mark.parametrize(("number", "status", "word"), SIGNALS)
def test_a_command_that_is_interrupted_says_so_in_one_line(
    bfloat16_store: TrajectoryStore,
    number: int,
    status: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(TrajectoryStore, "verify", lambda *_: signal.raise_signal(number))
    assert main(["verify", bfloat16_store.path]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", SAID.format(word) + "\n")
    assert signal.getsignal(number) is before


DESTRUCTOR = """
import signal, time
from relexkit.interrupts import raising
class Interrupted:
    def __del__(self):
        signal.raise_signal({number})
with raising():
    Interrupted()
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status", "word"), SIGNALS)
def test_in_a_destructor_which_would_ignore_it(number: int, status: int, word: str) -> None:
    code = DESTRUCTOR.format(number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, SAID.format(word) + "\n")


def test_in_another_thread_signals_stay_as_they_are(bfloat16_store: TrajectoryStore) -> None:
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(main(["info", bfloat16_store.path])))
    worker.start()
    worker.join()
    assert found == [0]


ALREADY = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {at!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["relexkit", "verify", {store!r}]
from relexkit.__main__ import command
sys.exit(command())
"""
"""The command with a signal that arrives while it imports a certain module."""


@pytest.mark.parametrize(("number", "status", "word"), SIGNALS)
@pytest.mark.parametrize(
    "at", ["argparse", "relexkit.cli", "relexkit.commands.verify", "numpy", "numpy.linalg", "zarr"]
)
def test_while_modules_are_imported(
    bfloat16_store: TrajectoryStore, at: str, number: int, status: int, word: str
) -> None:
    code = ALREADY.format(at=at, number=int(number), store=bfloat16_store.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == SAID.format(word) + "\n"


@pytest.mark.parametrize(("number", "status", "word"), SIGNALS)
def test_a_process_that_waits_for_checkpoints_ends_at_once(
    tmp_path: Path, number: int, status: int, word: str
) -> None:
    run = write_run(tmp_path, steps=[1])
    command = ["watch", str(run.source), "-o", str(tmp_path / "s.zarr"), "--base", str(run.base)]
    with subprocess.Popen(
        [sys.executable, "-m", "relexkit", *command, "--poll", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "step 1 recorded\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", SAID.format(word) + "\n")
    assert not (tmp_path / "s.zarr.lock").exists()


def test_a_reader_that_has_seen_enough_is_no_error(bfloat16_store: TrajectoryStore) -> None:
    command = f"{sys.executable} -m relexkit spectrum {bfloat16_store.path} --all | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
