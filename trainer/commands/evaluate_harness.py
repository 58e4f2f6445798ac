"""``relexkit evaluate --harness``: tasks of lm-evaluation-harness on folders and on steps of a
store.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexkit import Table
from relexkit.extension import console, number, print_json, say

if TYPE_CHECKING:
    from relexkit.trainer.evaluation.harness import Score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that belong to ``--harness``."""
    group = parser.add_argument_group("lm-evaluation-harness (needs relexkit[harness])")
    group.add_argument(
        "--harness",
        nargs="+",
        metavar="TASK",
        help="tasks or groups of the harness in place of --task; results are kept as it keeps them",
    )
    group.add_argument("--include-path", metavar="DIR", help="further task files of the harness")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a question")
    group.add_argument(
        "--limit", type=float, metavar="N", help="the first N documents of a task, or a share"
    )
    group.add_argument(
        "--apply-chat-template", action="store_true", help="questions as messages of a user"
    )
    group.add_argument(
        "--output",
        metavar="DIR",
        help="where results are kept (default: beside the store, RUN.evaluations)",
    )


def answer(arguments: argparse.Namespace, models: Iterable[tuple[str, Any, Any]]) -> Table:
    """A row for each model and metric; the document has the differences to the first model too."""
    found = _evaluate(arguments, models)
    models_found = document(found)
    rows = [{"model": m["name"], **score} for m in models_found for score in m["scores"]]
    return Table({"harness": arguments.harness, "models": models_found}, rows)


def run(arguments: argparse.Namespace, models: Iterable[tuple[str, Any, Any]]) -> None:
    """Print each metric with its interval, and each model against the first one."""
    found = _evaluate(arguments, models)
    if arguments.json:
        print_json({"harness": arguments.harness, "models": document(found)})
    else:
        print_table(found)


def _evaluate(
    arguments: argparse.Namespace, models: Iterable[tuple[str, Any, Any]]
) -> dict[str, list[Score]]:
    """Evaluate every model on the tasks."""
    from relexkit.trainer.evaluation.harness import Harness, keep, scores

    harness = Harness(
        arguments.harness,
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        apply_chat_template=arguments.apply_chat_template,
    )
    folder = _folder(arguments)
    found: dict[str, list[Score]] = {}
    for name, model, tokenizer in models:
        given = {"source": arguments.model, "evaluated": name}
        given |= {key: getattr(arguments, key) for key in ("scale", "dtype", "rounding", "seed")}
        results = harness.evaluate(model, tokenizer, given)
        found[name] = scores(results)
        if folder is not None:
            keep(results, folder, name)
    if folder is not None:
        say(f"results are kept in {folder}")
    return found


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Where results are kept: as asked for, or beside a store that is a local folder."""
    if arguments.output is not None:
        return Path(arguments.output)
    source = arguments.model[0]
    local_store = "://" not in source and (Path(source) / "zarr.json").is_file()
    return Path(source).with_suffix(".evaluations") if local_store else None


def document(found: dict[str, list[Score]]) -> list[dict[str, Any]]:
    """What ``--json`` prints of every model."""
    first = next(iter(found.values()))
    models = []
    for name, of_model in found.items():
        rows: list[dict[str, Any]] = []
        for score, other in zip(of_model, first, strict=True):
            row: dict[str, Any] = {
                "task": score.task,
                "metric": score.metric,
                "value": score.value,
                "interval": None if score.interval is None else list(score.interval),
            }
            difference = None if of_model is first else score.minus(other)
            if difference is not None:
                row["difference"] = {
                    "value": difference.difference,
                    "interval": list(difference.interval),
                }
            rows.append(row)
        models.append({"name": name, "scores": rows})
    return models


def print_table(found: dict[str, list[Score]]) -> None:
    """A row for each metric and model."""
    from rich.table import Table

    first_name, first = next(iter(found.items()))
    table = Table(box=None, header_style="bold")
    for heading in ("task", "metric", "model"):
        table.add_column(heading, no_wrap=True)
    for heading in ("value [95 % interval]", f"against {first_name}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, of_first in enumerate(first):
        for place, (name, of_model) in enumerate(found.items()):
            score = of_model[index]
            difference = None if place == 0 else score.minus(of_first)
            table.add_row(
                *((score.task, score.metric) if place == 0 else ("", "")),
                name,
                _between(score.value, score.interval),
                "" if difference is None else _between(difference.difference, difference.interval),
            )
    console().print(table)


def _between(value: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"
