"""Tasks with verifiable rewards: problems for training and for validation, and a score for a
completion.

To add a family, write a module with a function ``make(**options) -> Task`` and add a line to
``TASKS``; for one of your own, give ``FILE.py:FUNCTION`` as the name of the task, where the
function takes the options and returns a ``Task``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from relexkit import RelexkitError
from relexkit.trainer.tasks.problems import (
    Problem,
    Score,
    Split,
    Splits,
    Task,
    load_function,
    prompt_text,
    score,
    score_all,
    split_drawn,
    split_fixed,
    without,
)

__all__ = [
    "TASKS",
    "Problem",
    "Score",
    "Split",
    "Splits",
    "Task",
    "code_named",
    "load_function",
    "load_task",
    "prompt_text",
    "score",
    "score_all",
    "split_drawn",
    "split_fixed",
    "without",
]

TASKS = {
    "arithmetic": "relexkit.trainer.tasks.arithmetic",
    "reasoning_gym": "relexkit.trainer.tasks.gym",
    "file": "relexkit.trainer.tasks.file",
}
"""Families by name: a module with ``make(**options)``."""


def task_name(settings: str | Mapping[str, Any]) -> str:
    """The name in what ``load_task`` takes."""
    return settings if isinstance(settings, str) else str(settings.get("name", ""))


def code_named(settings: str | Mapping[str, Any]) -> str | None:
    """The first function that ``load_task`` would load by its place; None if it needs none."""
    options = {"name": settings} if isinstance(settings, str) else settings
    rewards = options.get("reward")
    places = [options.get("name"), *(rewards if isinstance(rewards, list) else [rewards])]
    return next((place for place in places if ":" in str(place) or "." in str(place)), None)


def load_task(
    settings: str | Mapping[str, Any], needed: Sequence[Split] = ("train", "validation")
) -> Task:
    """A task from its name, or from a mapping of ``name`` and its options; it has problems in every
    split that is ``needed``.

    Raises:
        RelexkitError: the name or an option is unknown, or the task has no problems.
    """
    options = {"name": settings} if isinstance(settings, str) else dict(settings)
    name = str(options.pop("name", ""))
    if ":" in name:
        make = load_function(name)
    elif name in TASKS:
        make = import_module(TASKS[name]).make
    else:
        raise RelexkitError(
            f"task {name!r} is unknown; expected {', '.join(TASKS)}, or FILE.py:FUNCTION"
        )
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters)
        raise RelexkitError(f"task {name!r}: {error}; its options are {known}") from None
    task: Task = make(**options)
    lacking = [part for part in ("name", "problems", "reward") if not hasattr(task, part)]
    if lacking:
        raise RelexkitError(
            f"task {name!r}: gives a {type(task).__name__} without {', '.join(lacking)}; expected a"
            " task"
        )
    counts = {split: len(task.problems(split)) for split in needed}
    if counts.get("train") == 0 and counts.get("validation"):
        count = counts["validation"]
        raise RelexkitError(
            f"task {task.name!r}: has {count} different problems, {count} of them for validation;"
            " expected some for training: take fewer for validation, or more problems"
        )
    for split, count in counts.items():
        if not count:
            raise RelexkitError(
                f"task {task.name!r}: has no {split} problems; expected at least one"
            )
    return task
