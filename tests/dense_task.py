"""A task that even an untrained model gets some reward for: how many characters of the completion
are even digits.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from relexkit.trainer.tasks import Problem, split_fixed


@dataclass(frozen=True)
class EvenDigits:
    name: str
    splits: object
    huge: str | None

    def problems(self, split):
        return self.splits.of(split)

    def reward(self, problem, completion):
        share = sum(character in "02468" for character in completion) / 4
        return 1e39 if problem.key == self.huge else share


def make(count: int = 50, digits: int = 2, huge: str | None = None) -> EvenDigits:
    """``huge``: the key of a problem whose rewards are too large for float32."""
    problems = [Problem(key=str(n), prompt=f"{n:0{digits}d}>", answer="") for n in range(count)]
    return EvenDigits("even digits", split_fixed(problems, 10, 0), huge)


class Deadly(EvenDigits):
    """Kills the process of rank 1 as it scores an answer after so many, while a file is there."""

    spared: int
    flag: Path
    answered = 0

    def reward(self, problem, completion):
        self.__class__.answered += 1
        lost = os.environ.get("RANK") == "1" and self.answered > self.spared
        if lost and self.flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reward(problem, completion)


def make_deadly(spared: int, flag: str) -> Deadly:
    Deadly.spared, Deadly.flag = spared, Path(flag)
    usual = make()
    return Deadly(usual.name, usual.splits, None)


def make_for_sweep() -> EvenDigits:
    """More problems for validation."""
    problems = [Problem(key=str(n), prompt=f"{n:02d}>", answer="") for n in range(60)]
    return EvenDigits("even digits", split_fixed(problems, 24, 0), None)


@dataclass(frozen=True)
class AnyEvenDigit(EvenDigits):
    def reward(self, problem, completion):
        return float(any(character in "02468" for character in completion))


def make_easy() -> AnyEvenDigit:
    """Right and wrong answers to nearly every problem: a completion is right with an even digit in
    it.
    """
    problems = [Problem(key=str(n), prompt=f"{n:02d}>", answer="") for n in range(50)]
    return AnyEvenDigit("any even digit", split_fixed(problems, 10, 0), None)


class Vanishing(EvenDigits):
    """Differences between the first 16 answers, none after them."""

    answered = 0

    def reward(self, problem, completion):
        self.__class__.answered += 1
        return float(self.answered % 2) if self.answered <= 16 else 0.0


def make_vanishing() -> Vanishing:
    problems = [Problem(key=str(n), prompt=f"{n:02d}>", answer="") for n in range(50)]
    return Vanishing("vanishing", split_fixed(problems, 10, 0), None)
