"""What commands print: tables and JSON on standard output, progress and messages on standard
error.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from relexkit.errors import printable

if TYPE_CHECKING:
    from relexkit.store import ProgressCallback


@contextlib.contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A progress bar on standard error that appears after two seconds of work, on a terminal
    only.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}
    began = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)
        if not bar.live.is_started and time.monotonic() - began > 2 and bar.console.is_terminal:
            bar.start()

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def console() -> Any:
    """The terminal, or 200 columns where standard output is not one."""
    from rich.console import Console

    class Printable(Console):
        """Escapes what could steer the terminal in every text that it is given."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

    terminal = Printable()
    return terminal if terminal.is_terminal else Printable(width=200)


def print_pairs(title: str, rows: list[tuple[str, str]]) -> None:
    """A table of names and values under a title."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console().print(table)


def print_json(document: Any) -> None:
    """One JSON document on standard output; a number that does not exist is null."""
    print(json.dumps(_without_nan(document)))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def show(text: str) -> None:
    """A result in words, on standard output."""
    print(printable(text))


def say(message: str) -> None:
    """A message, on standard error."""
    print(printable(message), file=sys.stderr)


def percent(value: float) -> str:
    """A share as ``12.3 %``; NaN as ``-``."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Three decimals; NaN as ``-``."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def size_text(num_bytes: float) -> str:
    """Bytes as ``12.3 MB``."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 100 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
