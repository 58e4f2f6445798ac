"""The ``relexkit sweep`` command."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relexkit import METHODS, Output, Prediction, TrajectoryStore, extrapolate
from relexkit.extension import number, print_json, print_table, progress_bar, say, show
from relexkit.trainer.commands.trust import add_trust
from relexkit.trainer.experiments.sweep import DEFAULT_METHODS, Candidate, document, grid, sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit sweep``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--task",
        help="a name, FILE.py:FUNCTION, or a mapping as in a configuration, in quotes"
        " (default: the task of the run)",
    )
    parser.add_argument(
        "--to", type=float, nargs="+", required=True, metavar="STEP", help="steps to predict"
    )
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="predict from the steps up to this one"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(DEFAULT_METHODS),
        choices=[m for m in METHODS if m != "reconstruct"],
    )
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="multiples of the predicted displacement",
    )
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[1], help="of RELEX: the ablation grid on the task"
    )
    parser.add_argument(
        "--fit", nargs="+", default=["linear"], choices=("linear", "polynomial", "sinusoid")
    )
    parser.add_argument(
        "--window",
        type=int,
        nargs="+",
        default=[None],
        metavar="W",
        help="of RELEX and the average",
    )
    parser.add_argument(
        "--num-problems", type=int, metavar="N", help="validation problems (default: all)"
    )
    parser.add_argument(
        "--max-completion-length",
        type=int,
        metavar="L",
        help="tokens (default: as in the run, else 256)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        help="sampled answers of each problem (default: greedy ones)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="round weights as a written checkpoint would be (default: float32)",
    )
    parser.add_argument("--rounding", choices=("stochastic", "nearest"), default="stochastic")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the samples, and of stochastic rounding (default: 0)",
    )
    add_trust(parser)
    parser.add_argument(
        "--full", action="store_true", help="evaluate every candidate on every problem"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="OUT",
        help="write the winner to OUT/step-STEP if it beats the last step",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document, which relexkit report --sweep reads",
    )


def run(arguments: argparse.Namespace) -> None:
    """Race, print, and write what was asked for."""
    found, best = race_candidates(arguments)
    if arguments.json:
        print_json(found)
    else:
        _print_candidates(found)
    if arguments.write is None:
        return
    if best is None:
        say(f"nothing was written: {found['recommendation']}")
        return
    written = extrapolate(
        TrajectoryStore(arguments.store),
        [best.target],
        arguments.write,
        Prediction(
            until=arguments.until, method=best.method, options=best.options, scale=best.scale
        ),
        output=Output(
            dtype=None if arguments.dtype == "float32" else arguments.dtype,
            rounding=arguments.rounding,
            seed=arguments.seed,
        ),
    )
    say(f"wrote {written[0].folder}")


def race_candidates(arguments: argparse.Namespace) -> tuple[dict[str, Any], Candidate | None]:
    """What ``--json`` prints, and the winner if it is surely better than the last observed step."""
    from relexkit.trainer.evaluation.settings import chosen_length, chosen_task, run_setting

    task = chosen_task(arguments.task, arguments.store, "validation")
    arguments.max_completion_length = chosen_length(
        arguments.max_completion_length, arguments.store
    )
    if arguments.task is None:  # for the command that gives this sweep again
        arguments.task = json.dumps(run_setting(arguments.store, "task"))
    store = TrajectoryStore(arguments.store)
    seen = store.steps[
        : (
            None
            if arguments.until is None
            else np.searchsorted(store.steps, arguments.until, side="right")
        )
    ]
    last_step = int(seen[-1]) if len(seen) else 0  # without any, the sweep says what is wrong
    candidates = grid(
        arguments.to,
        methods=arguments.method,
        scales=arguments.scale,
        ranks=arguments.rank,
        fits=arguments.fit,
        windows=arguments.window,
        last_step=last_step,
    )
    with progress_bar() as progress:
        result = sweep(
            store,
            task,
            candidates,
            max_completion_length=arguments.max_completion_length,
            until=arguments.until,
            num_problems=arguments.num_problems,
            samples=arguments.samples,
            seed=arguments.seed,
            halving=not arguments.full,
            dtype=arguments.dtype,
            rounding=arguments.rounding,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    found = document(candidates, result, task=task.name, last_step=last_step)
    found |= {
        "dtype": arguments.dtype,
        "rounding": arguments.rounding,
        "command": _command(arguments),
    }
    return found, candidates[result.winner] if result.fresh.verdict == "above" else None


def _command(arguments: argparse.Namespace) -> str:
    """The command that gives this sweep, every option spelt out."""
    words = ["relexkit", "sweep", str(arguments.store)]
    for name in (
        "task",
        "to",
        "until",
        "method",
        "scale",
        "rank",
        "fit",
        "window",
        "num_problems",
        "max_completion_length",
        "samples",
        "dtype",
        "rounding",
        "seed",
    ):
        value = getattr(arguments, name)
        if value not in (None, [None]):
            shown = [
                f"{v:g}" if isinstance(v, float) else str(v)
                for v in (value if isinstance(value, list) else [value])
            ]
            words += [f"--{name.replace('_', '-')}", *shown]
    return shlex.join([*words, *(["--full"] if arguments.full else []), "--json"])


def _print_candidates(found: dict[str, Any]) -> None:
    """The candidates against the last observed step, and the recommendation."""
    from rich.table import Table

    title = f"Accuracy on {found['task']} against step {found['last_step']}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("candidate", no_wrap=True)
    for heading in ("problems", "accuracy", "95 %", "difference", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = found["baseline"]
    rows = sorted(found["candidates"], key=lambda c: (-c["num_problems"], -c["accuracy"]))
    table.add_row(
        f"step {found['last_step']} (observed)",
        str(found["num_problems"]),
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
    share = found["answers"] / found["answers_of_full_grid"]
    show(
        f"{found['answers']} answers, {100 * share:.0f} % of the {found['answers_of_full_grid']} of"
        " the full grid."
    )
    ties = [c["name"] for c in found["candidates"] if c["tied"]]
    if any(c["stopped"] for c in found["candidates"]):
        show(
            "Stopped ones answered fewer problems: compare their difference, on the problems that"
            " they answered, not their accuracy."
        )
    if ties:
        show(f"As good as the winner when it alone went on: {', '.join(ties)}.")
    show(found["recommendation"])


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"
