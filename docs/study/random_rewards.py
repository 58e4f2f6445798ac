"""The sorting task with rewards that say nothing: a fair coin for every rollout, the control of
arXiv 2506.10947.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from relexkit.trainer.tasks import Problem, Split, Task, load_task


@dataclass(frozen=True)
class Coin:
    """Another task's problems with a reward of 0 or 1 by chance, in the order of the calls."""

    task: Task
    toss: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def name(self) -> str:
        """Of the task, and that its rewards are random."""
        return f"{self.task.name}, random rewards"

    def problems(self, split: Split) -> Sequence[Problem]:
        """Those of the task."""
        return self.task.problems(split)

    def reward(self, problem: Problem, completion: str) -> float:
        """A fair coin, whatever the completion."""
        return float(self.toss.random() < 0.5)


def make() -> Coin:
    """The control of the study."""
    return Coin(load_task({"name": "arithmetic", "family": "sorting"}))
