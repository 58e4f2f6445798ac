"""What commands print: tables and JSON on standard output, progress and messages on standard
error.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from relexkit.errors import printable

if TYPE_CHECKING:
    from relexkit.store import ProgressCallback


@contextlib.contextmanager
def progress_bar(after: float = 2.0) -> Iterator[ProgressCallback]:
    """Progress on standard error, on a terminal only, from ``after`` seconds on.

    What is done counts up in bars that go when they are full; while nothing counts, such as during
    the start of a model, a line says that work goes on and for how long.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    working = bar.add_task("working", total=None)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total, visible=done < total)
        counting = any(not task.finished for task in bar.tasks if task.id != working)
        bar.update(working, visible=not counting)

    begin = threading.Timer(after, bar.start)
    begin.daemon = True
    if bar.console.is_terminal:
        begin.start()
    try:
        yield progress
    finally:
        begin.cancel()
        if begin.is_alive():
            begin.join()  # it is starting the bar at this moment
        if bar.live.is_started:
            bar.stop()


def print_table(
    table: Any, *, names: int = 1, least: Sequence[str] = (), wide: bool = False
) -> None:
    """Print a table in the width of the terminal: names never shrink, columns go.

    Args:
        table: a ``rich`` table.
        names: how many of its first columns hold names, which wrap if need be.
        least: headings of the columns that may go, the least important first.
        wide: keep all of them, however wide the table gets; output that is not a terminal has all.
    """
    from rich.measure import Measurement

    terminal = console()
    for place, column in enumerate(table.columns):
        column.no_wrap, column.overflow = place >= names, "fold"

    def width() -> int:
        return Measurement.get(terminal, terminal.options.update(width=10_000), table).maximum

    gone: list[str] = []
    if wide or not terminal.is_terminal:
        terminal.width = max(terminal.width, width())
    for heading in least:
        if width() <= terminal.width:
            break
        table.columns = [c for c in table.columns if c.header != heading]
        gone.append(heading)
    terminal.print(table)
    if gone:
        show(f"(too narrow for {', '.join(gone)}: --wide shows all)")


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
    """A result in words, on standard output; on a terminal broken between words."""
    print(_between_words(printable(text), sys.stdout))


def say(message: str) -> None:
    """A message, on standard error; on a terminal broken between words."""
    print(_between_words(printable(message), sys.stderr), file=sys.stderr)


def _between_words(text: str, stream: TextIO) -> str:
    """``text`` in lines of the terminal's width, with the indentation of the line that they go on
    from; a command goes on after a backslash, so that it can be copied.
    """
    if not stream.isatty():
        return text
    width = max(20, shutil.get_terminal_size().columns)
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    words = line.lstrip()
    indent = " " * (len(line) - len(words))
    command = words.startswith("relexkit ")
    further = indent + ("    " if command else "  " if words.startswith("- ") else "")
    lines = textwrap.wrap(
        words,
        width - 2 * command,
        initial_indent=indent,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return (" \\\n" if command else "\n").join(lines)


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
