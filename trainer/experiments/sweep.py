"""``relexkit sweep``: predicted checkpoints on a validation task, in memory, and a recommendation.

Weight-space skill is necessary, not sufficient. Candidates are predictions for several steps by
several methods, options and scales; each is put in place into one loaded model and raced against
the last observed step (``trainer.experiments.race``) on problems that training never saw, every
model with the same noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relexkit import Options, Prediction, RelexkitError, TrajectoryStore, gram, predict_weights
from relexkit.extension import (
    ProgressCallback,
    step_text,
)
from relexkit.trainer.experiments.race import BASELINE, Race, race

if TYPE_CHECKING:
    from relexkit.trainer.policy.stored_model import Dtype

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


def grid(
    targets: Sequence[float],
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    scales: Sequence[float] = (1.0,),
    ranks: Sequence[int] = (1,),
    fits: Sequence[Literal["linear", "polynomial", "sinusoid"]] = ("linear",),
    windows: Sequence[int | None] = (None,),
    last_step: float | None = None,
) -> list[Candidate]:
    """All combinations; rank, fit and window multiply RELEX only, its ablation grid on the task,
    and window the average.

    What does not depend on the target, hold and average, is one candidate for ``last_step`` (by
    default the first target).
    """
    candidates = []
    for method, target, scale in itertools.product(methods, targets, scales):
        variants = [Options()]
        if method == "relex":
            variants = [
                Options(rank=r, fit=f, window=w)
                for r, f, w in itertools.product(ranks, fits, windows)
            ]
        elif method == "average":
            variants = [Options(window=w) for w in windows]
        if method in ("hold", "average"):
            target = targets[0] if last_step is None else last_step
        candidates += [
            Candidate(method=method, target=float(target), scale=scale, options=options)
            for options in variants
        ]
    return list(dict.fromkeys(candidates))


def sweep(
    store: TrajectoryStore,
    task: Any,
    candidates: Sequence[Candidate],
    *,
    max_completion_length: int,
    until: int | None = None,
    num_problems: int | None = None,
    samples: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    halving: bool = True,
    dtype: Dtype = "float32",
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
) -> Race:
    """Race the candidates against the last observed step on a task's validation problems.

    Args:
        task: see ``trainer.tasks``.
        until: predict from the steps up to this one; the baseline is the last of them.
        num_problems: the first so many of the validation split; None for all.
        samples: 0 for greedy answers, else so many sampled ones of each problem.
        dtype, rounding: of the weights, as a written checkpoint would have them; computed with in
            float32.
        device: of PyTorch; None for a GPU if there is one.
        trust_remote_code: run the code that the store carries for its model, if it needs any.

    Memory: the model in float32. One pass over the deltas for each candidate and rung.

    Raises:
        RelexkitError: too few problems, no candidate, or a prediction that cannot be made (the
            candidate is named).
    """
    import torch

    from relexkit.trainer.evaluation.evaluate import evaluate
    from relexkit.trainer.policy.stored_model import StoredModel

    problems = list(task.problems("validation"))[:num_problems]
    if len(problems) < _FEWEST_PROBLEMS:
        raise RelexkitError(
            f"task {task.name!r}: {len(problems)} validation problems tell nothing apart; expected"
            f" at least {_FEWEST_PROBLEMS}"
        )
    if not candidates:
        raise RelexkitError("there is no candidate; give --to STEP and --method")
    observed = gram(store, progress=progress).until(until)
    weights = _weights(store, observed, candidates)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stored = StoredModel(
        store,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        device=where,
        trust_remote_code=trust_remote_code,
    )

    def answer(index: int, begin: int, end: int) -> np.ndarray:
        if index == BASELINE:
            stored.put_step(int(observed.steps[-1]))
        else:
            stored.put(weights[index])
        found = evaluate(
            stored.model,
            stored.tokenizer,
            _Slice(task, problems[begin:end]),
            samples=samples,
            greedy=samples == 0,
            max_completion_length=max_completion_length,
            seed=seed,
            batch_size=batch_size,
        )
        if progress:
            progress("evaluating", 100 * end // len(problems), 100)
        return found.values()

    return race(len(candidates), len(problems), answer, halving=halving)


def _weights(
    store: TrajectoryStore, observed: Any, candidates: Sequence[Candidate]
) -> list[np.ndarray]:
    found: dict[Candidate, np.ndarray] = {}
    for method, options in dict.fromkeys(
        (c.method, c.options) for c in candidates
    ):  # one fit for all targets and scales
        group = [c for c in candidates if (c.method, c.options) == (method, options)]
        targets = sorted({c.target for c in group})
        try:
            rows = predict_weights(observed, targets, Prediction(method=method, options=options))
        except RelexkitError as error:
            raise RelexkitError(f"{group[0].name}: {error}") from None
        found |= {c: c.scale * rows[targets.index(c.target)] for c in group}
    return [found[c] for c in candidates]


class _Slice:
    """Some of a task's validation problems."""

    def __init__(self, task: Any, problems: list[Any]):
        self.name, self.reward, self._problems = task.name, task.reward, problems

    def problems(self, split: str) -> list[Any]:
        return self._problems


def recommendation(candidates: Sequence[Candidate], result: Race, last_step: int) -> str:
    """One sentence: what to use, on what evidence."""
    fresh, best = result.fresh, candidates[result.winner]
    low, high = fresh.interval
    told = (
        f"({fresh.difference:+.3f}, 95 % {low:+.3f} to {high:+.3f}, {fresh.num_problems} fresh"
        " problems)"
    )
    if fresh.verdict == "above":
        return f"Use {best.name}: it beats step {last_step} {told}."
    if fresh.verdict == "below":
        return f"Keep step {last_step}: the best prediction, {best.name}, is worse {told}."
    return (
        f"Keep step {last_step}: the best prediction, {best.name}, cannot be told from it {told}."
    )


def document(
    candidates: Sequence[Candidate], result: Race, *, task: str, last_step: int
) -> dict[str, Any]:
    """The outcome as a JSON document, which the figures read too."""
    return {
        "task": task,
        "last_step": last_step,
        "num_problems": len(result.baseline.values),
        "baseline": {
            "accuracy": result.baseline.accuracy,
            "interval": list(result.baseline.interval),
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
                "stopped": len(s.values) < len(result.baseline.values),
                "tied": s.tied,
                "accuracy": s.accuracy,
                "interval": list(s.interval),
                "difference": s.against.difference,
                "difference_interval": list(s.against.interval),
            }
            for c, s in zip(candidates, result.standings, strict=True)
        ],
        "winner": candidates[result.winner].name,
        "fresh": {
            "difference": result.fresh.difference,
            "interval": list(result.fresh.interval),
            "num_problems": result.fresh.num_problems,
            "verdict": result.fresh.verdict,
        },
        "answers": result.num_answers,
        "answers_of_full_grid": result.full_answers,
        "recommendation": recommendation(candidates, result, last_step),
    }
