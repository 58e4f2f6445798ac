"""Arithmetic on characters, for models small enough to be trained in minutes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from relexkit import RelexkitError
from relexkit.trainer.tasks.problems import Problem, Split, Splits, split_drawn

Draw = Callable[[random.Random, int], tuple[str, str]]


def _sorting(rng: random.Random, digits: int) -> tuple[str, str]:
    numbers = rng.choices("0123456789", k=digits)
    return "".join(numbers) + ">", "".join(sorted(numbers))


def _addition(rng: random.Random, digits: int) -> tuple[str, str]:
    first, second = (rng.randrange(10**digits) for _ in range(2))
    return f"{first}+{second}=", str(first + second)


def _subtraction(rng: random.Random, digits: int) -> tuple[str, str]:
    first, second = sorted((rng.randrange(10**digits) for _ in range(2)), reverse=True)
    return f"{first}-{second}=", str(first - second)


def _modulo(rng: random.Random, digits: int) -> tuple[str, str]:
    first, second = rng.randrange(10**digits), rng.randrange(2, 10)
    return f"{first}%{second}=", str(first % second)


FAMILIES: dict[str, Draw] = {
    "sorting": _sorting,
    "addition": _addition,
    "subtraction": _subtraction,
    "modulo": _modulo,
}
"""Family -> draws one prompt and its answer with numbers of so many digits."""

CHARACTERS = "0123456789+-%=>"
"""All characters of prompts and answers."""


@dataclass(frozen=True)
class Arithmetic:
    """Problems of one family; a completion is right if it is the answer."""

    name: str
    splits: Splits

    def problems(self, split: Split) -> list[Problem]:
        """Distinct problems; no prompt is in both splits."""
        return self.splits.of(split)

    def reward(self, problem: Problem, completion: str) -> float:
        """1 for the answer and nothing else, blanks around it aside; else 0."""
        return float(completion.strip() == problem.answer)


def make(
    family: str = "sorting",
    digits: int = 8,
    num_train: int = 8192,
    num_validation: int = 512,
    seed: int = 0,
) -> Arithmetic:
    """A task of one of ``FAMILIES``.

    Raises:
        RelexkitError: the family is unknown, or has too few problems of so many digits.
    """
    if family not in FAMILIES:
        raise RelexkitError(
            f"task 'arithmetic': family {family!r} is unknown; expected {', '.join(FAMILIES)}"
        )
    if digits < 1:
        raise RelexkitError(f"task 'arithmetic': digits {digits} is too small; expected 1 or more")
    name = f"{family} of {digits} digits"
    rng = random.Random(f"{family} {digits} {seed}")

    def draw() -> Iterator[Problem]:
        for _ in range(100 * (num_train + num_validation)):
            prompt, answer = FAMILIES[family](rng, digits)
            yield Problem(key=prompt, prompt=prompt, answer=answer)

    return Arithmetic(name, split_drawn(draw(), num_train, num_validation, seed, name))
