"""Problems and their scores: what every family of tasks is made of."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from relexkit import RelexkitError

Split = Literal["train", "validation", "all"]


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


def load_function(place: str) -> Callable[..., Any]:
    """The function that ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME`` names; a file is executed, as
    the user's own.

    Raises:
        RelexkitError: there is no such file, module or function, or it fails when it is loaded.
    """
    path, colon, name = place.rpartition(":")
    if not colon:
        path, _, name = place.rpartition(".")
    if not path.endswith(".py"):
        try:
            module = import_module(path)
        except Exception as error:
            raise RelexkitError(
                f"{place}: {path} cannot be imported ({error}); expected FILE.py:FUNCTION or"
                " PACKAGE.MODULE:FUNCTION"
            ) from error
    else:
        spec = importlib.util.spec_from_file_location(f"relexkit_task_{Path(path).stem}", path)
        if not Path(path).is_file() or spec is None or spec.loader is None:
            raise RelexkitError(f"{path}: no such Python file; expected FILE.py:FUNCTION")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for names in their annotations
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise RelexkitError(
                f"{path}: fails when it is loaded ({type(error).__name__}: {error})"
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RelexkitError(f"{path}: has no function {name!r}; expected one of that name")
    return function


def question_text(problem: Problem) -> str:
    """The text of a prompt, of all messages of a chat."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(message["content"] for message in problem.prompt)


def prompt_text(problem: Problem, tokenizer: Any) -> str:
    """The prompt as the model reads it: by the tokenizer's chat template if it has one, where text
    is a user's message.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return question_text(problem)
    messages = (
        [{"role": "user", "content": problem.prompt}]
        if isinstance(problem.prompt, str)
        else problem.prompt
    )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def score(task: Task, problem: Problem, completion: str) -> float:
    """The reward of a completion, checked.

    Raises:
        RelexkitError: the task's function raises, or returns something that is not a finite number;
            the prompt is named.
    """
    where = f"task {task.name!r}, problem {problem.key}, prompt {_shown(problem.prompt)}"
    try:
        value = task.reward(problem, completion)
    except Exception as error:
        raise RelexkitError(
            f"{where}: its reward raised {type(error).__name__} ({error}) on {_shown(completion)}"
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RelexkitError(
            f"{where}: its reward is {value!r} for {_shown(completion)}; expected a finite number"
        )
    return number


@dataclass(frozen=True, slots=True)
class Score:
    """What a task says of a completion.

    Attributes:
        reward: what training maximises.
        value: what evaluation counts: the reward, or of several functions what the first one says.
        parts: of several functions, what each says; None where it does not apply.
    """

    reward: float
    value: float
    parts: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether the answer is right: a value of 1 and more."""
        return self.value >= 1


def score_all(task: Task, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
    """The scores of completions, in order: all at once where the task has a function ``scores`` of
    problems and completions, else one by one.

    Raises:
        RelexkitError: a function of the task raises, or returns something that is not a finite
            number; the prompt is named.
    """
    at_once = getattr(task, "scores", None)
    if at_once is not None:
        return at_once(problems, completions) if problems else []
    rewards = [score(task, p, text) for p, text in zip(problems, completions, strict=True)]
    return [Score(reward, reward) for reward in rewards]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Splits:
    """Problems in two lists without a common one."""

    train: list[Problem]
    validation: list[Problem]

    def of(self, split: Split) -> list[Problem]:
        """The list of a split; ``all`` has first those for validation."""
        if split == "all":
            return self.validation + self.train
        return self.train if split == "train" else self.validation


RESERVED = 8
"""One in so many problems that a generator can draw is kept for validation."""


def split_drawn(
    drawn: Iterable[Problem], num_train: int, num_validation: int, seed: int, name: str
) -> Splits:
    """Draw distinct problems until both splits are full; a problem's split depends on its prompt
    and ``seed`` alone.

    So a run on few problems and an evaluation on many never share one. What is drawn beyond is
    left.

    Raises:
        RelexkitError: ``drawn`` ended before.
    """
    splits, wanted, seen = Splits([], []), {"train": num_train, "validation": num_validation}, set()
    for problem in drawn:
        if (mark := _mark(problem, seed)) in seen:
            continue
        seen.add(mark)
        split: Split = "train" if mark % RESERVED else "validation"
        if len(splits.of(split)) < wanted[split]:
            splits.of(split).append(problem)
        if len(splits.train) == num_train and len(splits.validation) == num_validation:
            return splits
    raise RelexkitError(
        f"task {name!r}: found {len(splits.train)} different problems for training and"
        f" {len(splits.validation)} for validation; expected {num_train} and {num_validation}: ask"
        " for fewer, or make the task harder"
    )


def split_fixed(problems: Sequence[Problem], num_validation: int | None, seed: int) -> Splits:
    """Each distinct prompt once, ordered by ``seed``: the first ``num_validation`` (None: all) for
    validation, the rest for training.
    """
    ordered = sorted({_mark(problem, seed): problem for problem in reversed(problems)}.items())
    distinct = [problem for _, problem in ordered]
    count = len(distinct) if num_validation is None else num_validation
    return Splits(distinct[count:], distinct[:count])


def without(problems: Sequence[Problem], others: Sequence[Problem]) -> list[Problem]:
    """The distinct problems whose prompt is none of the ``others``'."""
    taken = {_mark(problem, 0) for problem in others}
    distinct = {_mark(problem, 0): problem for problem in reversed(problems)}
    return [problem for mark, problem in reversed(distinct.items()) if mark not in taken]


def _mark(problem: Problem, seed: int) -> int:
    """64 bits of a hash of the seed and of the prompt's words: equal for equal prompts, blanks and
    line ends aside.
    """
    words = " ".join(question_text(problem).split())
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{words}".encode(), digest_size=8).digest(), "big"
    )
