"""The ``relexkit probe`` command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from relexkit import RelexkitError, Table, TrajectoryStore
from relexkit.extension import number, print_json, print_pairs, progress_bar, show
from relexkit.trainer.commands.trust import add_trust
from relexkit.trainer.experiments.outputs import (
    OutputLinearity,
    logit_extrapolation,
    output_linearity,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit probe``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="probe texts, one a line: how linear their tokens are",
    )
    parser.add_argument(
        "--to", type=float, nargs="+", default=[], metavar="STEP", help="also predicted checkpoints"
    )
    parser.add_argument("--method", default="model", help="of the predictions (default: model)")
    parser.add_argument("--until", type=int, metavar="STEP", help="use only steps up to this one")
    parser.add_argument(
        "--generate",
        metavar="PROMPT",
        help="complete it from extrapolated logits, with --steps and --at",
    )
    parser.add_argument("--steps", type=int, nargs=2, metavar=("I", "J"), help="two recorded steps")
    parser.add_argument(
        "--at", type=float, metavar="STEP", help="the step that their logits are continued to"
    )
    parser.add_argument("--max-completion-length", type=int, default=64, metavar="TOKENS")
    add_trust(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def answer(arguments: argparse.Namespace) -> str | Table:
    """The completion that was asked for, or a row for each target: how far the tokens' own lines
    are from what the method predicts, in nats; the document has R² of every token.
    """
    if arguments.generate is not None:
        return _completion(arguments)
    found = _linearity(arguments)
    rows = [
        {"target": float(target), "mean_absolute_difference": float(error)}
        for target, error in zip(found.targets, _errors(found), strict=True)
    ]
    return Table(_document(found), rows)


def run(arguments: argparse.Namespace) -> None:
    """Print how linear the tokens are, or an extrapolated completion."""
    if arguments.generate is not None:
        text = _completion(arguments)
        if arguments.json:
            print_json({"prompt": arguments.generate, "completion": text})
        else:
            show(text)
        return
    found = _linearity(arguments)
    if arguments.json:
        print_json(_document(found))
    else:
        _print(found, arguments.method)


def _completion(arguments: argparse.Namespace) -> str:
    if arguments.steps is None or arguments.at is None:
        raise RelexkitError(
            "--generate needs --steps I J and --at STEP: which logits to continue, and how far"
        )
    [text] = logit_extrapolation(
        TrajectoryStore(arguments.store),
        [arguments.generate],
        steps=tuple(arguments.steps),
        target=arguments.at,
        max_completion_length=arguments.max_completion_length,
        trust_remote_code=arguments.trust_remote_code,
    )
    return text


def _linearity(arguments: argparse.Namespace) -> OutputLinearity:
    if arguments.texts is None:
        raise RelexkitError(
            "nothing was asked for; give --texts FILE, or --generate PROMPT with --steps and --at"
        )
    with progress_bar() as progress:
        return output_linearity(
            TrajectoryStore(arguments.store),
            arguments.texts.read_text().splitlines(),
            targets=arguments.to,
            method=arguments.method,
            until=arguments.until,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )


def _errors(found: OutputLinearity) -> np.ndarray:
    return np.abs(found.continued - found.predicted).mean(axis=1)


def _document(found: OutputLinearity) -> dict[str, Any]:
    return {
        "steps": found.steps.tolist(),
        "num_tokens": len(found.r2),
        "r2": found.r2.tolist(),
        "targets": found.targets.tolist(),
        "mean_absolute_difference": _errors(found).tolist(),
    }


def _print(found: OutputLinearity, method: str) -> None:
    moved = found.r2[np.isfinite(found.r2)]
    shares = np.quantile(moved, [0.1, 0.5, 0.9]) if len(moved) else np.full(3, np.nan)
    rows = [
        (
            "tokens",
            f"{len(found.r2)}, of which {len(moved)} moved by a thousandth of a nat or more",
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
        for target, error in zip(found.targets, _errors(found), strict=True)
    ]
    print_pairs(
        f"Token log-probabilities over {len(found.steps)} steps, {found.steps[0]} to"
        f" {found.steps[-1]}",
        rows,
    )
