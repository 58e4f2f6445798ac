"""The ``relexkit probe`` command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relexkit import Prediction, RelexkitError, Table, TrajectoryStore
from relexkit.extension import (
    less_than_asked,
    number,
    print_json,
    print_pairs,
    progress_bar,
    say,
    show,
)
from relexkit.options import group, option
from relexkit.trainer.commands.evaluate import OnTask
from relexkit.trainer.evaluation.settings import as_asked, chosen_length, chosen_task
from relexkit.trainer.experiments.outputs import (
    MODEL,
    OutputLinearity,
    logit_extrapolation,
    output_linearity,
)
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.tasks import Problem


@dataclass(frozen=True, kw_only=True)
class Options(OnTask):
    """Options of ``relexkit probe``."""

    store: str = option("store", metavar="RUN.zarr")
    """the trajectory store, a folder or a URL"""
    texts: Path | None = option(default=None, metavar="FILE")
    """probe texts, one a line: how linear their tokens are (default: answers of the task)"""
    num_problems: int = 64
    """of the task, validation ones"""
    to: tuple[float, ...] = option(default=(), metavar="STEP")
    """also predicted checkpoints"""
    method: str = option(default=MODEL.method, metavar="M")
    """how to predict, as for extrapolate"""
    until: int | None = option(default=None, metavar="STEP")
    """use only steps up to this one"""
    generate: str | None = option(default=None, metavar="PROMPT")
    """complete it from extrapolated logits, with --steps and --at"""
    steps: tuple[int, int] | None = option(default=None, nargs=2, metavar=("I", "J"))
    """two recorded steps"""
    at: float | None = option(default=None, metavar="STEP")
    """the step that their logits are continued to"""
    max_completion_length: int | None = None
    """tokens of the completion (default: as in the run, else 64)"""
    loading: Loading = group(Loading, "trust_remote_code")


def answer(options: Options) -> str | Table:
    """The completion that was asked for, or a row for each target: how far the tokens' own lines
    are from what the method predicts, in nats; the document has R² of every token.
    """
    if options.generate is not None:
        return _completion(options)
    linearity = _linearity(options)
    rows = [
        {"target": float(target), "mean_absolute_difference": float(error)}
        for target, error in zip(linearity.targets, _errors(linearity), strict=True)
    ]
    return Table(_document(linearity), rows)


def run(options: Options) -> None:
    """Print how linear the tokens are, or an extrapolated completion."""
    if options.generate is not None:
        text = _completion(options)
        if options.json:
            print_json({"prompt": options.generate, "completion": text})
        else:
            show(text)
        return
    linearity = _linearity(options)
    if options.json:
        print_json(_document(linearity))
    else:
        _print(linearity, options.method)


def _completion(options: Options) -> str:
    assert options.generate is not None
    if options.steps is None or options.at is None:
        raise RelexkitError(
            "--generate needs --steps I J and --at STEP: which logits to continue, and how far"
        )
    [text] = logit_extrapolation(
        TrajectoryStore(options.store),
        [as_asked(options.generate, options.store)],
        steps=options.steps,
        target=options.at,
        max_completion_length=chosen_length(options.max_completion_length, options.store, 64),
        loading=options.loading,
    )
    return text


def _linearity(options: Options) -> OutputLinearity:
    texts: Sequence[str] | Sequence[Problem]
    if options.texts is None:
        task = chosen_task(options.task, options.store, "validation")
        texts = task.problems("validation")[: options.num_problems]
    else:
        texts = options.texts.read_text().splitlines()
    store = TrajectoryStore(options.store)
    prediction = Prediction(method=options.method, until=options.until)
    for line in less_than_asked(store, [prediction], options.to):
        say(line)
    with progress_bar() as progress:
        return output_linearity(
            store,
            texts,
            targets=options.to,
            prediction=prediction,
            loading=options.loading,
            progress=progress,
        )


def _errors(linearity: OutputLinearity) -> np.ndarray:
    return np.abs(linearity.continued - linearity.predicted).mean(axis=1)


def _document(linearity: OutputLinearity) -> dict[str, Any]:
    return {
        "steps": linearity.steps.tolist(),
        "num_tokens": len(linearity.r2),
        "r2": linearity.r2.tolist(),
        "targets": linearity.targets.tolist(),
        "mean_absolute_difference": _errors(linearity).tolist(),
    }


def _print(linearity: OutputLinearity, method: str) -> None:
    moved = linearity.r2[np.isfinite(linearity.r2)]
    shares = np.quantile(moved, [0.1, 0.5, 0.9]) if len(moved) else np.full(3, np.nan)
    rows = [
        (
            "tokens",
            f"{len(linearity.r2)}, of which {len(moved)} moved by a thousandth of a nat or more",
        ),
        (
            "R² on the step",
            (
                f"median {number(shares[1])}, 80 % of the tokens {number(shares[0])} to"
                f" {number(shares[2])}"
            ),
        ),
    ]
    rows += [
        (
            f"step {target:g}",
            f"tokens' lines are {error:.3f} nats from what {method} predicts, on average",
        )
        for target, error in zip(linearity.targets, _errors(linearity), strict=True)
    ]
    print_pairs(
        f"Token log-probabilities over {len(linearity.steps)} steps, {linearity.steps[0]} to"
        f" {linearity.steps[-1]}",
        rows,
    )
