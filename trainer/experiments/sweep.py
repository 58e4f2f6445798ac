"""``relexkit sweep``: predicted checkpoints on a validation task, in memory, and a recommendation.

Weight-space skill is necessary, not sufficient. Candidates are predictions for several steps by
several methods, options and scales; each is put in place into one loaded model and raced against
the last observed step (``trainer.experiments.race``) on problems that training never saw, every
model with the same noise.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relexkit import Options, RelexkitError, TrajectoryStore, extrapolate, gram, predict_weights
from relexkit.assess.metrics import learning_rates
from relexkit.commands.console import console, number, print_json, progress_bar, say, show
from relexkit.predict.extrapolators import METHODS, step_text
from relexkit.store import ProgressCallback
from trainer.commands.trust import add_trust
from trainer.experiments.race import BASELINE, Race, race

if TYPE_CHECKING:
    from trainer.policy.stored_model import Dtype

_FEWEST_PROBLEMS = 16
_PLAIN = Options()
_DEFAULT_METHODS = ("drift", "two-point", "relex", "average")


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
    methods: Sequence[str] = _DEFAULT_METHODS,
    scales: Sequence[float] = (1.0,),
    ranks: Sequence[int] = (1,),
    fits: Sequence[str] = ("linear",),
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
            ]  # type: ignore[arg-type]
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

    from trainer.evaluation.evaluate import evaluate
    from trainer.policy.stored_model import StoredModel, recorded_weights

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
    hold = recorded_weights(store, int(observed.steps[-1]))
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
        stored.put(hold if index == BASELINE else weights[index])
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
    rates = learning_rates(store.steps, store.metrics())
    found: dict[Candidate, np.ndarray] = {}
    for method, options in dict.fromkeys(
        (c.method, c.options) for c in candidates
    ):  # one fit for all targets and scales
        group = [c for c in candidates if (c.method, c.options) == (method, options)]
        targets = sorted({c.target for c in group})
        try:
            rows = predict_weights(observed, targets, method=method, options=options, rates=rates)
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


# -- command ---------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit sweep``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--task",
        required=True,
        help="a name, FILE.py:FUNCTION, or a mapping as in a configuration, in quotes",
    )
    parser.add_argument(
        "--to", type=float, nargs="+", required=True, metavar="STEP", help="steps to predict"
    )
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="predict from the steps up to this one"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(_DEFAULT_METHODS),
        choices=[m for m in METHODS if m != "reconstruct"],
    )
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="multiples of the predicted displacement",
    )
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[1], help="of RELEX: the ablation grid on the task"
    )
    parser.add_argument(
        "--fit", nargs="+", default=["linear"], choices=("linear", "polynomial", "sinusoid")
    )
    parser.add_argument(
        "--window",
        type=int,
        nargs="+",
        default=[None],
        metavar="W",
        help="of RELEX and the average",
    )
    parser.add_argument(
        "--num-problems", type=int, metavar="N", help="validation problems (default: all)"
    )
    parser.add_argument("--max-completion-length", type=int, default=256, metavar="TOKENS")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        help="sampled answers of each problem (default: greedy ones)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="round weights as a written checkpoint would be (default: float32)",
    )
    parser.add_argument("--rounding", choices=("stochastic", "nearest"), default="stochastic")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the samples, and of stochastic rounding (default: 0)",
    )
    add_trust(parser)
    parser.add_argument(
        "--full", action="store_true", help="evaluate every candidate on every problem"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="OUT",
        help="write the winner to OUT/step-STEP if it beats the last step",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document, which relexkit report --sweep reads",
    )


def run(arguments: argparse.Namespace) -> None:
    """Race, print, and write what was asked for."""
    found, best = race_candidates(arguments)
    if arguments.json:
        print_json(found)
    else:
        print_table(found)
    if arguments.write is None:
        return
    if best is None:
        say(f"nothing was written: {found['recommendation']}")
        return
    written = extrapolate(
        TrajectoryStore(arguments.store),
        [best.target],
        arguments.write,
        until=arguments.until,
        method=best.method,
        options=best.options,
        scale=best.scale,
        dtype=None if arguments.dtype == "float32" else arguments.dtype,
        rounding=arguments.rounding,
        seed=arguments.seed,
    )
    say(f"wrote {written[0].folder}")


def race_candidates(arguments: argparse.Namespace) -> tuple[dict[str, Any], Candidate | None]:
    """What ``--json`` prints, and the winner if it is surely better than the last observed step."""
    import yaml

    from trainer.tasks import load_task

    task = load_task(yaml.safe_load(arguments.task))
    store = TrajectoryStore(arguments.store)
    seen = store.steps[
        : (
            None
            if arguments.until is None
            else np.searchsorted(store.steps, arguments.until, side="right")
        )
    ]
    last_step = int(seen[-1]) if len(seen) else 0  # without any, the sweep says what is wrong
    candidates = grid(
        arguments.to,
        methods=arguments.method,
        scales=arguments.scale,
        ranks=arguments.rank,
        fits=arguments.fit,
        windows=arguments.window,
        last_step=last_step,
    )
    with progress_bar() as progress:
        result = sweep(
            store,
            task,
            candidates,
            max_completion_length=arguments.max_completion_length,
            until=arguments.until,
            num_problems=arguments.num_problems,
            samples=arguments.samples,
            seed=arguments.seed,
            halving=not arguments.full,
            dtype=arguments.dtype,
            rounding=arguments.rounding,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    found = document(candidates, result, task=task.name, last_step=last_step)
    found |= {
        "dtype": arguments.dtype,
        "rounding": arguments.rounding,
        "command": _command(arguments),
    }
    return found, candidates[result.winner] if result.fresh.verdict == "above" else None


def _command(arguments: argparse.Namespace) -> str:
    """The command that gives this sweep, every option spelt out."""
    words = ["relexkit", "sweep", str(arguments.store)]
    for name in (
        "task",
        "to",
        "until",
        "method",
        "scale",
        "rank",
        "fit",
        "window",
        "num_problems",
        "max_completion_length",
        "samples",
        "dtype",
        "rounding",
        "seed",
    ):
        value = getattr(arguments, name)
        if value not in (None, [None]):
            shown = [
                f"{v:g}" if isinstance(v, float) else str(v)
                for v in (value if isinstance(value, list) else [value])
            ]
            words += [f"--{name.replace('_', '-')}", *shown]
    return shlex.join([*words, *(["--full"] if arguments.full else []), "--json"])


def print_table(found: dict[str, Any]) -> None:
    """The candidates against the last observed step, and the recommendation."""
    from rich.table import Table

    title = f"Accuracy on {found['task']} against step {found['last_step']}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("candidate", no_wrap=True)
    for heading in ("problems", "accuracy", "95 %", "difference", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = found["baseline"]
    rows = sorted(found["candidates"], key=lambda c: (-c["num_problems"], -c["accuracy"]))
    table.add_row(
        f"step {found['last_step']} (observed)",
        str(found["num_problems"]),
        number(base["accuracy"]),
        _span(base["interval"]),
        "",
        "",
    )
    for c in rows:
        table.add_row(
            c["name"],
            str(c["num_problems"]),
            number(c["accuracy"]),
            _span(c["interval"]),
            f"{c['difference']:+.3f}",
            _span(c["difference_interval"]),
        )
    console().print(table)
    share = found["answers"] / found["answers_of_full_grid"]
    show(
        f"{found['answers']} answers, {100 * share:.0f} % of the {found['answers_of_full_grid']} of"
        " the full grid."
    )
    show(found["recommendation"])


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"
