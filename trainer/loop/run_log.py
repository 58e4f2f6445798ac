"""The log of a run: one JSON line a step, the loggers of ``report_to``, and a progress bar; a
resumed run continues all of them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from relexkit.extension import printable, write_file
from relexkit.trainer.loop.loggers import Logger

SHOWN = {
    "reward": "reward",
    "eval/accuracy": "accuracy",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "clip_ratio/region_mean": "clipped",
    "grad_norm": "grad",
    "tokens_per_second": "tok/s",
    "live_variance_1": "1st dir",
    "live_straightness": "straight",
}
"""Metrics of the progress bar, with their short names."""


class RunLog(AbstractContextManager):
    """Writes ``metrics.jsonl`` below ``folder`` and to loggers, and shows a bar on a terminal.

    Args:
        step: the step after which the run goes on; what a former process logged later is removed.
            So are lines that a kill or a power cut has damaged, and a message says so.
        total: steps of the whole run.
        loggers: make the loggers of the run, which the log closes.
        active: false in every process but the first, whose log is the run's.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        total: int,
        *,
        loggers: Sequence[Callable[[], Logger]] = (),
        active: bool,
    ):
        self._active = active
        if not active:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._path = folder / "metrics.jsonl"
        damaged = _truncate(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115 (closed in __exit__)
        self._loggers = [make() for make in loggers]
        console = Console(stderr=True)
        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=step)
        self._bar.start()
        if damaged:
            lines = "a damaged line was" if damaged == 1 else f"{damaged} damaged lines were"
            self.say(f"{self._path}: {lines} dropped")

    def write(self, step: int, metrics: Mapping[str, float], advice: str | None = None) -> None:
        """Log one step; ``advice`` is a sentence that is also said above the bar."""
        if not self._active:
            return
        line: dict[str, Any] = {
            "step": step,
            **{key: value if math.isfinite(value) else None for key, value in metrics.items()},
        }
        if advice is not None:
            line["advice"] = advice
            self.say(advice)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.write(step, metrics, advice)
        shown = "  ".join(
            f"{short} {metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics
        )
        self._bar.update(self._task, completed=step, description=shown)

    def say(self, message: str) -> None:
        """A message above the bar, on standard error."""
        if self._active:
            (
                self._bar.console.print(printable(message), markup=False, highlight=False)
                if not self._bar.disable
                else print(printable(message), file=sys.stderr)
            )

    def sync(self) -> None:
        """Wait until what was logged is on the disk."""
        if self._active:
            os.fsync(self._file.fileno())

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._bar.stop()
            self._file.close()
            for logger in self._loggers:
                logger.close()


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, a dictionary a step, in order. A line that is damaged, as by a kill
    while it was written, is left out.
    """
    return [entry for entry, _ in _entries(Path(folder) / "metrics.jsonl")[0]]


def _entries(path: Path) -> tuple[list[tuple[dict[str, Any], bytes]], int]:
    """Entries with their lines, and how many other lines there are."""
    entries = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, not UTF-8, or deep without end
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append((entry, line))
    return entries, sum(bool(line) for line in lines) - len(entries)


def _truncate(path: Path, step: int) -> int:
    """Keep the entries up to ``step``; returns how many damaged lines were dropped."""
    entries, damaged = _entries(path)
    write_file(path, b"".join(line + b"\n" for entry, line in entries if entry["step"] <= step))
    return damaged
