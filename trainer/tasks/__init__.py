"""Tasks with verifiable rewards: problems for training and for validation, and a score for a completion.

To add a family, write a module with a function ``make(**options) -> Task`` and add a line to ``TASKS``; for one of your own,
give ``FILE.py:FUNCTION`` as the name of the task, where the function takes the options and returns a ``Task``.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from relexkit import RelexkitError

Split = Literal["train", "validation"]

TASKS = {
    "arithmetic": "trainer.tasks.arithmetic",
    "reasoning_gym": "trainer.tasks.gym",
    "file": "trainer.tasks.file",
}
"""Families by name: a module with ``make(**options)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem.

    Attributes:
        key: names it inside its task, the same in every run.
        prompt: text, or chat messages (``role`` and ``content``).
        answer: the reference answer, possibly empty.
        reference: a worked solution, where the data set has one.
        metadata: what else the task needs to score it.
    """

    key: str
    prompt: str | list[dict[str, str]]
    answer: str
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Problems and their scores."""

    @property
    def name(self) -> str:
        """What it is called in messages and tables."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; no problem is in both."""

    def reward(self, problem: Problem, completion: str) -> float:
        """The score of a completion; 1 and more is a right answer."""


def load_task(settings: str | Mapping[str, Any]) -> Task:
    """A task from its name, or from a mapping of ``name`` and its options.

    Raises:
        RelexkitError: the name or an option is unknown, or the task has no problems.
    """
    options = {"name": settings} if isinstance(settings, str) else dict(settings)
    name = str(options.pop("name", ""))
    if ".py:" in name:
        make = load_function(name)
    elif name in TASKS:
        make = import_module(TASKS[name]).make
    else:
        raise RelexkitError(f"task {name!r} is unknown; expected {', '.join(TASKS)}, or FILE.py:FUNCTION")
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters)
        raise RelexkitError(f"task {name!r}: {error}; its options are {known}") from None
    task: Task = make(**options)
    for split in ("train", "validation"):
        if not task.problems(split):
            raise RelexkitError(f"task {task.name!r}: has no {split} problems; expected at least one")
    return task


def load_function(place: str) -> Callable[..., Any]:
    """The function that ``FILE.py:NAME`` names; the file is executed, as the user's own.

    Raises:
        RelexkitError: there is no such file or function, or the file fails.
    """
    path, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"relexkit_task_{Path(path).stem}", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise RelexkitError(f"{path}: no such Python file; expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names in their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RelexkitError(f"{path}: fails when it is loaded ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, name, None)):
        raise RelexkitError(f"{path}: has no function {name!r}")
    return getattr(module, name)


def prompt_text(problem: Problem, tokenizer: Any) -> str:
    """The prompt as the model reads it: by the tokenizer's chat template if it has one, where text is a user's message."""
    if getattr(tokenizer, "chat_template", None) is None:
        if isinstance(problem.prompt, str):
            return problem.prompt
        return "\n".join(message["content"] for message in problem.prompt)
    messages = [{"role": "user", "content": problem.prompt}] if isinstance(problem.prompt, str) else problem.prompt
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def score(task: Task, problem: Problem, completion: str) -> float:
    """The reward of a completion, checked.

    Raises:
        RelexkitError: the task's function raises, or returns something that is not a finite number; the prompt is named.
    """
    where = f"task {task.name!r}, problem {problem.key}, prompt {_shown(problem.prompt)}"
    try:
        value = task.reward(problem, completion)
    except Exception as error:
        raise RelexkitError(f"{where}: its reward raised {type(error).__name__} ({error}) on {_shown(completion)}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RelexkitError(f"{where}: its reward is {value!r} for {_shown(completion)}; expected a finite number")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Splits:
    """Problems in two lists without a common one."""

    train: list[Problem]
    validation: list[Problem]

    def of(self, split: Split) -> list[Problem]:
        """The list of a split."""
        return self.train if split == "train" else self.validation


def split_problems(problems: Sequence[Problem], num_validation: int, seed: int, name: str) -> Splits:
    """Each distinct prompt once, shuffled by ``seed``; the first ``num_validation`` for validation, the rest for training.

    Raises:
        RelexkitError: nothing is left for training.
    """
    distinct = list({str(problem.prompt): problem for problem in reversed(problems)}.values())[::-1]
    random.Random(f"split {seed}").shuffle(distinct)
    if len(distinct) <= num_validation:
        raise RelexkitError(
            f"task {name!r}: has {len(distinct)} different problems, {num_validation} of them for validation; expected some "
            "for training: take fewer for validation, or more problems"
        )
    return Splits(distinct[num_validation:], distinct[:num_validation])
