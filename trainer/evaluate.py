"""Accuracy of a model on a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.rollout import Sampling, generate
from trainer.tasks import Split, Task, prompt_text, score


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Which problems were answered rightly, by key, greedily."""

    correct: dict[str, bool]

    @property
    def accuracy(self) -> float:
        """Share of the problems that were answered rightly."""
        return sum(self.correct.values()) / len(self.correct)


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    split: Split = "validation",
    num_problems: int,
    max_completion_length: int,
    seed: int = 0,
    batch_size: int = 64,
) -> Evaluation:
    """Greedy answers to the first ``num_problems`` of a split; a reward of 1 or more is a right one."""
    problems = list(task.problems(split))[:num_problems]
    prompts = [prompt_text(problem, tokenizer) for problem in problems]
    sampling = Sampling(max_completion_length=max_completion_length, temperature=0.0, seed=seed)
    completions = generate(model, tokenizer, prompts, [p.key for p in problems], sampling, batch_size=batch_size)
    pairs = zip(problems, completions, strict=True)
    return Evaluation(correct={problem.key: score(task, problem, c.text) >= 1 for problem, c in pairs})
