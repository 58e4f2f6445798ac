"""``relexkit evaluate --harness``: tasks of lm-evaluation-harness on folders and on steps of a
store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexkit import Table
from relexkit.extension import number, print_json, print_table, say
from relexkit.options import option

if TYPE_CHECKING:
    from relexkit.trainer.evaluation.harness import Score


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """Options of lm-evaluation-harness."""

    tasks: tuple[str, ...] = option("--harness", default=(), metavar="TASK")
    """tasks or groups of the harness in place of --task; results are kept as it keeps them"""
    include_path: str | None = option(default=None, metavar="DIR")
    """further task files of the harness"""
    num_fewshot: int | None = None
    """examples before a question"""
    limit: float | None = option(default=None, metavar="N")
    """the first N documents of a task, or a share"""
    apply_chat_template: bool = False
    """questions as messages of a user"""
    output: str | None = option(default=None, metavar="DIR")
    """where results are kept (default: beside the store, RUN.evaluations)"""


Models = Iterable[tuple[str, Any, Any]]
"""Name, model and tokenizer of each."""


def answer(asked: HarnessOptions, models: Models, told: dict[str, Any]) -> Table:
    """A row for each model and metric; the document has the differences to the first model too."""
    by_model = document(_evaluate(asked, models, told))
    rows = [{"model": m["name"], **score} for m in by_model for score in m["scores"]]
    return Table({"harness": list(asked.tasks), "models": by_model}, rows)


def run(asked: HarnessOptions, models: Models, told: dict[str, Any], *, as_json: bool) -> None:
    """Print each metric with its interval, and each model against the first one."""
    by_model = _evaluate(asked, models, told)
    if as_json:
        print_json({"harness": list(asked.tasks), "models": document(by_model)})
    else:
        print_scores(by_model)


def _evaluate(
    asked: HarnessOptions, models: Models, told: dict[str, Any]
) -> dict[str, list[Score]]:
    """Evaluate every model on the tasks; ``told`` is kept with the results."""
    from relexkit.trainer.evaluation.harness import Harness, keep, scores

    harness = Harness(
        asked.tasks,
        include_path=asked.include_path,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        batch_size=told["batch_size"],
        apply_chat_template=asked.apply_chat_template,
    )
    folder = _folder(asked, told["source"][0])
    by_model: dict[str, list[Score]] = {}
    for name, model, tokenizer in models:
        results = harness.evaluate(model, tokenizer, told | {"evaluated": name})
        by_model[name] = scores(results)
        if folder is not None:
            keep(results, folder, name)
    if folder is not None:
        say(f"results are kept in {folder}")
    return by_model


def _folder(asked: HarnessOptions, source: str) -> Path | None:
    """Where results are kept: as asked for, or beside a store that is a local folder."""
    if asked.output is not None:
        return Path(asked.output)
    local_store = "://" not in source and (Path(source) / "zarr.json").is_file()
    return Path(source).with_suffix(".evaluations") if local_store else None


def document(by_model: dict[str, list[Score]]) -> list[dict[str, Any]]:
    """What ``--json`` prints of every model."""
    first = next(iter(by_model.values()))
    models = []
    for name, of_model in by_model.items():
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


def print_scores(by_model: dict[str, list[Score]]) -> None:
    """A row for each metric and model."""
    from rich.table import Table

    first = next(iter(by_model.values()))
    table = Table(box=None, header_style="bold")
    for heading in ("task", "metric", "model"):
        table.add_column(heading, no_wrap=True)
    for heading in ("value [95 % interval]", "against first"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, of_first in enumerate(first):
        for place, (name, of_model) in enumerate(by_model.items()):
            score = of_model[index]
            difference = None if place == 0 else score.minus(of_first)
            table.add_row(
                *((score.task, score.metric) if place == 0 else ("", "")),
                name,
                _between(score.value, score.interval),
                "" if difference is None else _between(difference.difference, difference.interval),
            )
    print_table(table, names=3)


def _between(value: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"
