"""``relexkit gram``: the one pass, on its own, so that every later question is answered at once."""

from __future__ import annotations

import argparse

from relexkit.commands.console import print_json, show
from relexkit.commands.observer import add_pca, observer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="randomized: only steps up to this one"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )
    add_pca(parser)


def run(arguments: argparse.Namespace) -> None:
    """Compute the Gram matrices, which keeps them in the store, and say what was done."""
    from relexkit.store import TrajectoryStore, describe_steps

    store = TrajectoryStore(arguments.store)
    with observer(arguments) as observed:
        matrices = observed.observe(store, arguments.until).gram
    if observed.silent:
        return
    if arguments.json:
        steps, sizes = matrices.steps.tolist(), int(matrices.num_parameters.sum())
        print_json(
            {
                "path": store.path,
                "steps": steps,
                "num_tensors": len(matrices.names),
                "num_parameters": sizes,
            }
        )
    else:
        show(
            f"{store.path}: Gram matrices of {len(matrices.names)} tensors,"
            f" {describe_steps(matrices.steps)}"
        )
