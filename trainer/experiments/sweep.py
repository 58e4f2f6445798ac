"""``relexkit sweep``: predicted checkpoints on a validation task, in memory, and a recommendation.

Weight-space skill is necessary, not sufficient. Candidates are predictions for several steps by
several methods, options and scales; each is put in place into one loaded model and raced against
the last observed step (``trainer.experiments.race``) on problems that training never saw, every
model with the same noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from relexkit import (
    METHODS,
    Gram,
    Options,
    Prediction,
    RelexkitError,
    TrajectoryStore,
    gram,
    predict_weights,
)
from relexkit.extension import FitName, ProgressCallback, step_text
from relexkit.trainer.evaluation.settings import EvaluationSettings
from relexkit.trainer.experiments.race import BASELINE, Race, race
from relexkit.trainer.policy.loading import IN_FLOAT32, Loading
from relexkit.trainer.tasks import Task

_FEWEST_PROBLEMS = 16
_PLAIN = Options()
DEFAULT_METHODS = ("drift", "two-point", "relex", "average")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A prediction to be tried: what ``relexkit extrapolate`` would write with these options."""

    method: str
    target: float
    scale: float = 1.0
    options: Options = _PLAIN

    @property
    def name(self) -> str:
        """Short and unique among the candidates of a sweep."""
        plain = Options()
        extra = [
            f"{n.replace('_', '-')} {getattr(self.options, n)}"
            for n in ("rank", "fit", "window")
            if getattr(self.options, n) != getattr(plain, n)
        ]
        extra += [f"scale {self.scale:g}"] if self.scale != 1 else []
        return f"{self.method} at {step_text(self.target)}" + (
            f" ({', '.join(extra)})" if extra else ""
        )

    def prediction(self, until: int | None) -> Prediction:
        """What it is, from the recorded steps up to ``until``."""
        return Prediction(until=until, method=self.method, options=self.options, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep tries: every combination of methods, steps and scales, and of the options that a
    method has. Prediction and baseline are those of the steps up to ``until``.
    """

    to: tuple[float, ...]
    """steps to predict"""
    until: int | None = None
    """predict from the steps up to this one"""
    method: tuple[str, ...] = DEFAULT_METHODS
    """as for extrapolate"""
    scale: tuple[float, ...] = (1.0,)
    """multiples of the predicted displacement"""
    rank: tuple[int, ...] = (1,)
    """of RELEX: the ablation grid on the task"""
    fit: tuple[FitName, ...] = ("linear",)
    """of RELEX: how a coefficient is continued"""
    window: tuple[int, ...] = ()
    """of RELEX and the average: use only the last so many recorded steps (default: as for
    extrapolate)"""
    full: bool = False
    """evaluate every candidate on every problem"""

    def candidates(self, last_step: float) -> list[Candidate]:
        """The predictions, each once. What does not depend on the step is one for ``last_step``."""
        varied: dict[str, tuple[Any, ...]] = {
            "rank": self.rank,
            "fit": self.fit,
            "window": self.window or (None,),
        }
        candidates = []
        for name, target, scale in itertools.product(self.method, self.to, self.scale):
            method = METHODS[name]
            used = [option for option in varied if option in method.options]
            for values in itertools.product(*(varied[option] for option in used)):
                options = Options(**dict(zip(used, values, strict=True)))
                step = float(target if method.moves else last_step)
                candidates.append(Candidate(method=name, target=step, scale=scale, options=options))
        return list(dict.fromkeys(candidates))


def sweep(
    store: TrajectoryStore,
    task: Task,
    grid: Grid,
    settings: EvaluationSettings,
    loading: Loading = IN_FLOAT32,
    *,
    progress: ProgressCallback | None = None,
) -> Sweep:
    """Race the candidates of a grid against the last observed step on a task's validation problems.

    Memory: the model in float32. One pass over the deltas for each candidate and rung.

    Raises:
        RelexkitError: too few problems, no candidate, or a prediction that cannot be made (the
            candidate is named).
    """
    from relexkit.trainer.evaluation.evaluate import evaluate
    from relexkit.trainer.policy.stored_model import StoredModel

    problems = list(task.problems(settings.split))[: settings.num_problems]
    if len(problems) < _FEWEST_PROBLEMS:
        raise RelexkitError(
            f"task {task.name!r}: {len(problems)} validation problems are too few to compare"
            f" predictions; expected at least {_FEWEST_PROBLEMS}"
        )
    observed = gram(store, progress=progress).until(grid.until)
    last_step = int(observed.steps[-1])
    candidates = grid.candidates(last_step)
    if not candidates:
        raise RelexkitError("there is no candidate; give --to STEP and --method")
    weights = _weights(observed, candidates)
    stored = StoredModel(store, loading)
    asked = replace(settings, num_problems=None, greedy=settings.samples == 0)

    def answer(index: int, begin: int, end: int) -> np.ndarray:
        if index == BASELINE:
            stored.put_step(last_step)
        else:
            stored.put(weights[index])
        slice_of_task = _Slice(task, problems[begin:end])
        answers = evaluate(stored.model, stored.tokenizer, slice_of_task, asked)
        if progress:
            progress("evaluating", 100 * end // len(problems), 100)
        return answers.values()

    outcome = race(len(candidates), len(problems), answer, halving=not grid.full)
    return Sweep(task.name, last_step, tuple(candidates), outcome)


def _weights(observed: Gram, candidates: Sequence[Candidate]) -> list[np.ndarray]:
    weights: dict[Candidate, np.ndarray] = {}
    # one fit for all targets and scales
    for method, options in dict.fromkeys((c.method, c.options) for c in candidates):
        group = [c for c in candidates if (c.method, c.options) == (method, options)]
        targets = sorted({c.target for c in group})
        try:
            rows = predict_weights(observed, targets, Prediction(method=method, options=options))
        except RelexkitError as error:
            raise RelexkitError(f"{group[0].name}: {error}") from None
        weights |= {c: c.scale * rows[targets.index(c.target)] for c in group}
    return [weights[c] for c in candidates]


class _Slice:
    """Some of a task's validation problems."""

    def __init__(self, task: Any, problems: list[Any]):
        self.name, self.reward, self._problems = task.name, task.reward, problems

    def problems(self, split: str) -> list[Any]:
        return self._problems


@dataclass(frozen=True)
class Sweep:
    """The outcome: what was tried, against which recorded step, and how it went."""

    task: str
    last_step: int
    candidates: tuple[Candidate, ...]
    race: Race

    @property
    def winner(self) -> Candidate:
        """The best candidate, surely better than the last step only if ``beats_it``."""
        return self.candidates[self.race.winner]

    @property
    def beats_it(self) -> bool:
        """Whether the winner is surely better than the last observed step, on fresh problems."""
        return self.race.fresh.verdict == "above"

    def recommendation(self) -> str:
        """One sentence: what to use, on what evidence."""
        fresh, best, last_step = self.race.fresh, self.winner.name, self.last_step
        low, high = fresh.interval
        evidence = (
            f"({fresh.difference:+.3f}, 95 % {low:+.3f} to {high:+.3f}, {fresh.num_problems} fresh"
            " problems)"
        )
        if fresh.verdict == "above":
            return f"Use {best}: it beats step {last_step} {evidence}."
        if fresh.verdict == "below":
            return f"Keep step {last_step}: the best prediction, {best}, is worse {evidence}."
        return (
            f"Keep step {last_step}: the best prediction, {best}, cannot be told from it"
            f" {evidence}."
        )

    def document(self) -> dict[str, Any]:
        """The outcome as a JSON document, which the figures read too."""
        outcome = self.race
        return {
            "task": self.task,
            "last_step": self.last_step,
            "num_problems": len(outcome.baseline.values),
            "baseline": {
                "accuracy": outcome.baseline.accuracy,
                "interval": list(outcome.baseline.interval),
            },
            "candidates": [
                {
                    "name": c.name,
                    "method": c.method,
                    "target": c.target,
                    "scale": c.scale,
                    "rank": c.options.rank,
                    "fit": c.options.fit,
                    "window": c.options.window,
                    "num_problems": len(s.values),
                    "stopped": len(s.values) < len(outcome.baseline.values),
                    "tied": s.tied,
                    "accuracy": s.accuracy,
                    "interval": list(s.interval),
                    "difference": s.against.difference,
                    "difference_interval": list(s.against.interval),
                }
                for c, s in zip(self.candidates, outcome.standings, strict=True)
            ],
            "winner": self.winner.name,
            "fresh": {
                "difference": outcome.fresh.difference,
                "interval": list(outcome.fresh.interval),
                "num_problems": outcome.fresh.num_problems,
                "verdict": outcome.fresh.verdict,
            },
            "answers": outcome.num_answers,
            "answers_of_full_grid": outcome.full_answers,
            "recommendation": self.recommendation(),
        }
