"""The ``relexkit sweep`` command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from relexkit import Output, Table, TrajectoryStore, extrapolate
from relexkit.extension import (
    less_than_asked,
    number,
    print_json,
    print_table,
    progress_bar,
    say,
    show,
)
from relexkit.options import group, option
from relexkit.trainer.commands.evaluate import OnTask
from relexkit.trainer.evaluation.settings import EvaluationSettings, run_setting
from relexkit.trainer.experiments.sweep import Grid, Sweep, sweep
from relexkit.trainer.policy.loading import Loading


@dataclass(frozen=True, kw_only=True)
class Options(OnTask):
    """Options of ``relexkit sweep``."""

    store: str = option("store", metavar="RUN.zarr")
    """the trajectory store, a folder or a URL"""
    grid: Grid = group(Grid)
    settings: EvaluationSettings = group(EvaluationSettings, "num_problems", "samples", "seed")
    loading: Loading = group(Loading, "dtype", "rounding", "trust_remote_code")
    write: Path | None = option(default=None, metavar="OUT")
    """write the winner to OUT/step-STEP if it beats the last step"""
    json: bool = False
    """print one JSON document, which relexkit report --sweep reads"""


def answer(options: Options) -> Table:
    """Race, and write what was asked for; ``plot`` draws the candidates."""
    swept, outcome = race_candidates(options)
    _write(options, swept)
    return Table(outcome, outcome["candidates"], [outcome["recommendation"]])


def run(options: Options) -> None:
    """Race, print, and write what was asked for."""
    swept, outcome = race_candidates(options)
    if options.json:
        print_json(outcome)
    else:
        _print_candidates(outcome)
    _write(options, swept)


def _write(options: Options, swept: Sweep) -> None:
    if options.write is None:
        return
    if not swept.beats_it:
        say(f"nothing was written: {swept.recommendation()}")
        return
    best, loading = swept.winner, options.loading
    written = extrapolate(
        TrajectoryStore(options.store),
        [best.target],
        options.write,
        best.prediction(swept.last_step),
        output=Output(
            dtype=None if loading.dtype == "float32" else loading.dtype,
            rounding=loading.rounding,
            seed=options.settings.seed,
        ),
    )
    say(f"wrote {written[0].folder}")


def race_candidates(options: Options) -> tuple[Sweep, dict[str, Any]]:
    """The outcome, and what ``--json`` prints of it."""
    task, settings = options.chosen(options.store, options.settings)
    loading = replace(options.loading, seed=settings.seed)
    store = TrajectoryStore(options.store)
    asked = [c.prediction(options.grid.until) for c in options.grid.candidates(store.steps[-1])]
    for line in less_than_asked(store, asked, options.grid.to):
        say(line)
    with progress_bar() as progress:
        swept = sweep(store, task, options.grid, settings, loading, progress=progress)
    named = options.task or _as_typed(run_setting(options.store, "task"))
    return swept, swept.document() | {
        "dtype": loading.dtype,
        "rounding": loading.rounding,
        "command": _command(options, named, settings),
    }


def _as_typed(task: str | dict[str, Any]) -> str:
    """What ``--task`` takes for the task of a configuration: its name, if that is all."""
    if isinstance(task, str):
        return task
    return str(task["name"]) if task.keys() == {"name"} else json.dumps(task)


def _command(options: Options, task: str, settings: EvaluationSettings) -> str:
    """The command that gives this sweep, every option spelt out."""
    grid, loading = options.grid, options.loading
    asked = {
        "task": task,
        **{field.name: getattr(grid, field.name) for field in fields(grid)},
        "num_problems": settings.num_problems,
        "max_completion_length": settings.max_completion_length,
        "samples": settings.samples,
        "dtype": loading.dtype,
        "rounding": loading.rounding,
        "seed": settings.seed,
        "json": True,
    }
    words = ["relexkit", "sweep", options.store]
    for name, value in asked.items():
        if value in (None, (), False):
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words.append(f"--{name.replace('_', '-')}")
        words += [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return shlex.join(words)


def _print_candidates(outcome: dict[str, Any]) -> None:
    """The candidates against the last observed step, and the recommendation."""
    from rich.table import Table

    title = f"Accuracy on {outcome['task']} against step {outcome['last_step']}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("candidate", no_wrap=True)
    for heading in ("problems", "accuracy", "95 %", "difference", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = outcome["baseline"]
    rows = sorted(outcome["candidates"], key=lambda c: (-c["num_problems"], -c["accuracy"]))
    table.add_row(
        f"step {outcome['last_step']} (observed)",
        str(outcome["num_problems"]),
        number(base["accuracy"]),
        _span(base["interval"]),
        "",
        "",
    )
    for c in rows:
        table.add_row(
            c["name"] + (" (stopped)" if c["stopped"] else ""),
            str(c["num_problems"]),
            number(c["accuracy"]),
            _span(c["interval"]),
            f"{c['difference']:+.3f}",
            _span(c["difference_interval"]),
        )
    print_table(table)
    answers, most = outcome["answers"], outcome["answers_of_full_grid"]
    show(f"{answers} answers, {100 * answers / most:.0f} % of the {most} of the full grid.")
    ties = [c["name"] for c in outcome["candidates"] if c["tied"]]
    if any(c["stopped"] for c in outcome["candidates"]):
        show(
            "Stopped ones answered fewer problems: compare their difference, on the problems that"
            " they answered, not their accuracy."
        )
    if ties:
        show(f"As good as the winner when it alone went on: {', '.join(ties)}.")
    show(outcome["recommendation"])


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"
