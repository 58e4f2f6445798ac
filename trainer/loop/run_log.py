"""The log of a run: one JSON line a step, TensorBoard events, and a progress bar; a resumed run
continues all of them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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
    """Writes ``metrics.jsonl`` and ``events/`` below ``folder``, and shows a bar on a terminal.

    Args:
        step: the step after which the run goes on; what a former process logged later is removed.
        total: steps of the whole run.
        active: false in every process but the first, whose log is the run's.
    """

    def __init__(self, folder: Path, step: int, total: int, *, active: bool):
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
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        _truncate(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115 (closed in __exit__)
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1 if step else None)
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
            self._events.add_text("advice", advice, step)
            self.say(advice)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        shown = "  ".join(
            f"{short} {metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics
        )
        self._bar.update(self._task, completed=step, description=shown)

    def say(self, message: str) -> None:
        """A message above the bar, on standard error."""
        if self._active:
            (
                self._bar.console.print(message, markup=False, highlight=False)
                if not self._bar.disable
                else print(message, file=sys.stderr)
            )

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._bar.stop()
            self._events.close()
            self._file.close()


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, a dictionary a step, in order. A line that a kill cut off is left
    out.
    """
    return [entry for entry, _ in _entries(Path(folder) / "metrics.jsonl")]


def _entries(path: Path) -> list[tuple[dict[str, Any], str]]:
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append((json.loads(line), line))
        except ValueError:
            break
    return entries


def _truncate(path: Path, step: int) -> None:
    kept = [line for entry, line in _entries(path) if entry["step"] <= step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)
