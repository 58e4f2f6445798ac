"""The ``relexkit probe`` command."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from relexkit import RelexkitError, TrajectoryStore
from relexkit.extension import number, print_json, print_pairs, progress_bar, show
from relexkit.trainer.commands.trust import add_trust
from relexkit.trainer.evaluation.settings import as_asked, chosen_length, chosen_task
from relexkit.trainer.experiments.outputs import logit_extrapolation, output_linearity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit probe``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="probe texts, one a line: how linear their tokens are (default: answers of the task)",
    )
    parser.add_argument(
        "--task",
        help="a name, FILE.py:FUNCTION, or a mapping as in a configuration, in quotes: how linear"
        " the tokens of its validation answers are (default: the task of the run)",
    )
    parser.add_argument(
        "--num-problems", type=int, default=64, metavar="N", help="of the task (default: 64)"
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
    parser.add_argument(
        "--max-completion-length",
        type=int,
        metavar="L",
        help="tokens (default: as in the run, else 64)",
    )
    add_trust(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print how linear the tokens are, or an extrapolated completion."""
    store = TrajectoryStore(arguments.store)
    if arguments.generate is not None:
        if arguments.steps is None or arguments.at is None:
            raise RelexkitError(
                "--generate needs --steps I J and --at STEP: which logits to continue, and how far"
            )
        [text] = logit_extrapolation(
            store,
            [as_asked(arguments.generate, arguments.store)],
            steps=tuple(arguments.steps),
            target=arguments.at,
            max_completion_length=chosen_length(
                arguments.max_completion_length, arguments.store, 64
            ),
            trust_remote_code=arguments.trust_remote_code,
        )
        if arguments.json:
            print_json({"prompt": arguments.generate, "completion": text})
        else:
            show(text)
        return
    texts = (
        chosen_task(arguments.task, arguments.store, "validation")
        if arguments.texts is None
        else arguments.texts.read_text().splitlines()
    )
    with progress_bar() as progress:
        found = output_linearity(
            store,
            texts,
            num_problems=arguments.num_problems,
            targets=arguments.to,
            method=arguments.method,
            until=arguments.until,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    moved = found.r2[np.isfinite(found.r2)]
    errors = np.abs(found.continued - found.predicted).mean(axis=1)
    if arguments.json:
        print_json(
            {
                "steps": found.steps.tolist(),
                "num_tokens": len(found.r2),
                "r2": found.r2.tolist(),
                "targets": found.targets.tolist(),
                "mean_absolute_difference": errors.tolist(),
            }
        )
        return
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
            f"tokens' lines are {error:.3f} nats from what {arguments.method} predicts, on average",
        )
        for target, error in zip(found.targets, errors, strict=True)
    ]
    print_pairs(
        f"Token log-probabilities over {len(found.steps)} steps, {found.steps[0]} to"
        f" {found.steps[-1]}",
        rows,
    )
