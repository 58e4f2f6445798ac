"""Accuracy of a model on a task: greedy, sampled and pass@k, kept by problem, so that models can be
compared in pairs.

Every model sees the same problems, and sample ``i`` of a problem draws the same noise in every
model (``trainer.policy.sampling``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relexkit import RelexkitError
from relexkit.extension import ProgressCallback
from relexkit.trainer.evaluation.intervals import (
    Difference,
    mean_interval,
    paired_difference,
    pass_at_k,
)
from relexkit.trainer.evaluation.settings import EvaluationSettings
from relexkit.trainer.policy.sampling import Completion, generate
from relexkit.trainer.tasks import Problem, Split, Task, prompt_text, score_all

RIGHT = 1.0
"""A reward of this and more is a right answer."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model scored on ``N`` problems, greedily and in ``S`` samples of each.

    Attributes:
        task, split, seed, temperature, max_completion_length: what was asked; two evaluations
            compare if these agree.
        keys: of the problems, ``N``.
        greedy_N: rewards of the greedy answers, ``float64 [N]``, or ``[0]`` where there were none.
        sampled_NS: rewards of the samples, ``float64 [N, S]``; ``S`` may be 0.
        texts: the greedy answers (the first sample of each problem where there are none).
        mean_length, truncated: tokens of an answer, and share of answers that did not end in time,
            over all answers.
    """

    task: str
    split: Split
    seed: int
    temperature: float
    max_completion_length: int
    keys: tuple[str, ...]
    greedy_N: np.ndarray
    sampled_NS: np.ndarray
    texts: tuple[str, ...] = field(repr=False)
    mean_length: float
    truncated: float

    @property
    def num_samples(self) -> int:
        """Samples of each problem."""
        return self.sampled_NS.shape[1]

    @property
    def accuracy(self) -> float:
        """Share of the problems with a right greedy answer (of right samples where there was no
        greedy answer).
        """
        return float(self.values().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``accuracy``."""
        return mean_interval(self.values(), None if len(self.greedy_N) else self.sampled_NS.size)

    @property
    def sampled_accuracy(self) -> float:
        """Share of right samples; NaN without samples."""
        return float((self.sampled_NS >= RIGHT).mean()) if self.num_samples else float("nan")

    @property
    def sampled_interval(self) -> tuple[float, float]:
        """95 % interval of ``sampled_accuracy``; samples of one problem are not independent, and
        count accordingly.
        """
        return mean_interval((self.sampled_NS >= RIGHT).mean(axis=1), self.sampled_NS.size)

    @property
    def mean_reward(self) -> float:
        """Mean reward of the answers that ``accuracy`` counts."""
        return float((self.greedy_N if len(self.greedy_N) else self.sampled_NS).mean())

    def values(self, kind: str | None = None) -> np.ndarray:
        """Share of right answers to each problem, ``greedy`` or ``sampled``, ``float64 [N]``
        (default: as ``accuracy``).
        """
        if (kind or ("greedy" if len(self.greedy_N) else "sampled")) == "greedy":
            return (self.greedy_N >= RIGHT).astype(np.float64)
        return (self.sampled_NS >= RIGHT).mean(axis=1)

    def pass_at(self, k: int) -> tuple[float, tuple[float, float]]:
        """Unbiased pass@k from the samples, and its 95 % interval over problems.

        Raises:
            RelexkitError: there are fewer than ``k`` samples of a problem.
        """
        if not 1 <= k <= self.num_samples:
            raise RelexkitError(
                f"pass@{k} needs {k} samples of a problem, there are {self.num_samples}; ask for"
                " more samples"
            )
        value_N = pass_at_k((self.sampled_NS >= RIGHT).sum(axis=1), self.num_samples, k)
        return float(value_N.mean()), mean_interval(value_N, self.sampled_NS.size)

    def minus(self, other: Evaluation, kind: str | None = None) -> Difference:
        """How much more accurate this model is than ``other``, in pairs over the common problems
        and seeds.

        Raises:
            RelexkitError: the two did not answer the same problems under the same settings.
        """
        names = (
            "task",
            "split",
            "keys",
            "max_completion_length",
            "seed",
            "temperature",
            "num_samples",
        )
        for name in names:
            if getattr(self, name) != getattr(other, name):
                raise RelexkitError(
                    f"evaluations with another {name} cannot be compared in pairs; evaluate both"
                    " alike"
                )
        return paired_difference(self.values(kind), other.values(kind))

    def summary(self, at: Sequence[int] = ()) -> dict[str, Any]:
        """The numbers as a JSON document; ``at`` lists the ``k`` of pass@k."""
        greedy, sampled = len(self.greedy_N) > 0, self.num_samples > 0
        document: dict[str, Any] = {
            "num_problems": len(self.keys),
            "num_samples": self.num_samples,
            "mean_reward": self.mean_reward,
            "mean_length": self.mean_length,
            "truncated": self.truncated,
        }
        if greedy:
            document["greedy"] = {"accuracy": self.accuracy, "interval": list(self.interval)}
        if sampled:
            document["sampled"] = {
                "accuracy": self.sampled_accuracy,
                "interval": list(self.sampled_interval),
            }
        for k in at:
            value, interval = self.pass_at(k)
            document.setdefault("pass_at", {})[str(k)] = {
                "accuracy": value,
                "interval": list(interval),
            }
        return document


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: EvaluationSettings,
    *,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """The answers that ``settings`` ask of a model, scored by the task.

    The model's weights, mode and settings stay as they are. Answers do not depend on the batch
    size, up to logits that differ in their last bits (``trainer.policy.sampling``).
    Memory: the key-value cache of ``settings.batch_size`` rows.

    Raises:
        RelexkitError: a prompt does not fit, or the reward function fails; the prompt is named.
    """
    samples, greedy = settings.samples, settings.greedy
    problems = list(task.problems(settings.split))[: settings.num_problems]
    prompts = [prompt_text(problem, tokenizer) for problem in problems]
    total = len(problems) * (samples + greedy)
    answered: list[Completion] = []

    def rewards(
        of: list[Problem], texts: list[str], keys: list[Any], temperature: float
    ) -> np.ndarray:
        sampling = settings.sampling(temperature)
        scores: list[float] = []
        for begin in range(0, len(of), settings.batch_size):
            rows = slice(begin, begin + settings.batch_size)
            completions = generate(model, tokenizer, texts[rows], keys[rows], sampling)
            scores += [s.value for s in score_all(task, of[rows], [c.text for c in completions])]
            answered.extend(completions)
            if progress:
                progress("evaluating", len(answered), total)
        return np.array(scores, np.float64)

    greedy_N = rewards(problems, prompts, [p.key for p in problems], 0.0) if greedy else np.zeros(0)
    pairs = [
        (problem, text, (problem.key, i))
        for problem, text in zip(problems, prompts, strict=True)
        for i in range(samples)
    ]
    sampled = rewards(
        [p for p, _, _ in pairs],
        [t for _, t, _ in pairs],
        [k for _, _, k in pairs],
        settings.temperature,
    )
    stride = 1 if greedy else samples
    return Evaluation(
        task=task.name,
        split=settings.split,
        seed=settings.seed,
        temperature=settings.temperature,
        max_completion_length=settings.max_completion_length,
        keys=tuple(problem.key for problem in problems),
        greedy_N=greedy_N,
        sampled_NS=sampled.reshape(len(problems), samples),
        texts=tuple(c.text for c in answered[: len(problems) * stride : stride]),
        mean_length=float(np.mean([len(c.completion_ids) for c in answered])),
        truncated=float(np.mean([c.truncated for c in answered])),
    )
