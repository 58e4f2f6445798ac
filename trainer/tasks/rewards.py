"""Reward functions: our own by name, and the user's, in our signature or in TRL's.

    def reward(completion: str, answer: str, row: dict) -> float
    def reward(completions, prompts, **columns) -> list[float | None]

The second one is TRL's and sees all completions of a generation at once. Completions are chat
messages where prompts are, as in TRL, every column of the data is a list with one value a
completion, and None means that the function does not apply to a completion.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relexkit import RelexkitError
from relexkit.trainer.tasks.answers import gives_answer
from relexkit.trainer.tasks.problems import Problem, load_function, question_text

SIGNATURES = (
    "expected function(completion, answer, row) -> float, or TRL's"
    " function(completions, prompts, **columns) -> list[float | None]"
)
_NAMED_BY_TRL = ("prompt", "prompts", "completion", "completions", "completion_ids")


def _mathematics(completion: str, problem: Problem) -> float:
    return float(gives_answer(completion, problem.answer, question_text(problem)))


def _exact(completion: str, problem: Problem) -> float:
    return float(completion.strip() == problem.answer.strip())


OWN: dict[str, Callable[[str, Problem], float]] = {"math": _mathematics, "exact": _exact}
"""Rewards by name: of a completion and its problem. They need an answer."""


@dataclass(frozen=True)
class RewardFunction:
    """One function and its weight.

    ``values(problems, completions)`` gives a number for every completion, or None where the
    function does not apply.
    """

    name: str
    weight: float
    values: Callable[[Sequence[Problem], Sequence[str]], list[float | None]]
    needs_answer: bool


def load_rewards(
    places: str | Sequence[str], weights: Sequence[float] | None
) -> tuple[RewardFunction, ...]:
    """The functions that ``places`` name: ``math``, ``exact``, ``FILE.py:FUNCTION``, or
    ``PACKAGE.MODULE:FUNCTION``.

    Raises:
        RelexkitError: one is unknown, cannot be called with our arguments or TRL's, or there are
            not as many weights as functions.
    """
    names = [places] if isinstance(places, str) else list(places)
    if not names or not all(isinstance(name, str) for name in names):
        raise RelexkitError(f"reward {places!r} names no function; expected one, or a list of them")
    given = [1.0] * len(names) if weights is None else list(weights)
    if len(given) != len(names) or not all(
        isinstance(w, int | float) and math.isfinite(w) for w in given
    ):
        raise RelexkitError(
            f"reward_weights {weights!r} do not fit; expected {len(names)} numbers, one a reward"
        )
    functions = [_load(name, float(weight)) for name, weight in zip(names, given, strict=True)]
    short = [function.name for function in functions]
    return tuple(
        replace(function, name=place) if short.count(function.name) > 1 else function
        for function, place in zip(functions, names, strict=True)
    )


def weighted(
    functions: Sequence[RewardFunction], problems: Sequence[Problem], completions: Sequence[str]
) -> list[dict[str, float | None]]:
    """What every function says of every completion, by its name, and under ``""`` their weighted
    sum (what does not apply counts as 0, as in TRL).
    """
    columns = {f.name: f.values(problems, completions) for f in functions}
    rows = []
    for index in range(len(completions)):
        row: dict[str, float | None] = {name: values[index] for name, values in columns.items()}
        row[""] = sum(f.weight * (row[f.name] or 0.0) for f in functions)
        rows.append(row)
    return rows


def _load(name: str, weight: float) -> RewardFunction:
    if name in OWN:
        own = OWN[name]
        return RewardFunction(
            name,
            weight,
            lambda problems, texts: [own(t, p) for t, p in zip(texts, problems, strict=True)],
            True,
        )
    if ":" not in name and "." not in name:
        raise RelexkitError(
            f"reward {name!r} is unknown; expected {', '.join(OWN)}, FILE.py:FUNCTION or"
            " PACKAGE.MODULE:FUNCTION"
        )
    function = load_function(name)
    short = name.replace(":", ".").rpartition(".")[2]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise RelexkitError(f"reward {name}: has no signature; {SIGNATURES}") from None
    if "completions" in signature.parameters:
        return RewardFunction(short, weight, _batched(name, function, signature), False)
    try:
        signature.bind("completion", "answer", {})
    except TypeError as error:
        raise RelexkitError(f"reward {name}: takes {signature} ({error}); {SIGNATURES}") from None
    return RewardFunction(
        short,
        weight,
        lambda problems, texts: [
            _one(name, function, problem, text)
            for problem, text in zip(problems, texts, strict=True)
        ],
        False,
    )


def _one(name: str, function: Any, problem: Problem, text: str) -> float:
    where = f"reward {name}, problem {problem.key}, prompt {_shown(problem.prompt)}"
    try:
        value = function(text, problem.answer, dict(problem.metadata))
    except Exception as error:
        raise RelexkitError(
            f"{where}: raised {type(error).__name__} ({error}) on {_shown(text)}; {SIGNATURES}"
        ) from error
    return _checked(where, value, text)


def _batched(
    name: str, function: Any, signature: inspect.Signature
) -> Callable[[Sequence[Problem], Sequence[str]], list[float | None]]:
    parameters = signature.parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def values(problems: Sequence[Problem], texts: Sequence[str]) -> list[float | None]:
        prompts = [problem.prompt for problem in problems]
        completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = dict.fromkeys(column for problem in problems for column in problem.metadata)
        arguments: dict[str, Any] = {
            column: [problem.metadata.get(column) for problem in problems]
            for column in columns
            if column not in _NAMED_BY_TRL
        }
        arguments |= {"prompts": prompts, "completions": completions}
        if not takes_all:
            arguments = {k: v for k, v in arguments.items() if k in signature.parameters}
        where = f"reward {name}, from problem {problems[0].key}, prompt {_shown(prompts[0])}"
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise RelexkitError(
                f"{where}: {error}; the data has the columns {', '.join(columns) or 'none'};"
                f" {SIGNATURES}"
            ) from None
        try:
            rewards = function(**arguments)
        except Exception as error:
            kind = "text" if isinstance(completions[0], str) else "lists of messages"
            hint = (
                "; functions for chats need prompts of messages: give `system`"
                if kind == "text" and isinstance(error, TypeError)
                else ""
            )
            raise RelexkitError(
                f"{where}: raised {type(error).__name__} ({error}) on completions that are"
                f" {kind}{hint}; {SIGNATURES}"
            ) from error
        if not isinstance(rewards, Sequence | tuple) and not hasattr(rewards, "tolist"):
            raise RelexkitError(f"{where}: gave {_shown(rewards)}; {SIGNATURES}")
        listed = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
        if len(listed) != len(texts):
            raise RelexkitError(
                f"{where}: gave {len(listed)} rewards for {len(texts)} completions; {SIGNATURES}"
            )
        return [
            None if value is None else _checked(where, value, text)
            for value, text in zip(listed, texts, strict=True)
        ]

    return values


def _checked(where: str, value: Any, text: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RelexkitError(
            f"{where}: its reward is {value!r} for {_shown(text)}; expected a finite number"
        )
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
