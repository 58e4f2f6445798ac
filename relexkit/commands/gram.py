"""``relexkit gram``: the one pass, on its own, so that every later question is answered at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from relexkit.commands.console import print_json, show
from relexkit.commands.observer import add_pca, observer
from relexkit.errors import RelexkitError

if TYPE_CHECKING:
    from relexkit.store import TrajectoryStore


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


def _refuse_unless_kept(store: TrajectoryStore, num_steps: int) -> None:
    """The command has no other purpose than what it keeps.

    Raises:
        RelexkitError: the store does not hold results over ``num_steps`` steps.
    """
    from relexkit.gram_matrix.parts import moving_parts
    from relexkit.store.kept import common_prefix, kept_attributes

    for part in moving_parts(store):
        covered = [
            common_prefix(store, part, kept_attributes(store, f"{name}/{part}"))
            for name in ("gram", "randomized")
        ]
        if max(covered) < num_steps:
            raise RelexkitError(
                f"{store.path}: the Gram matrices were computed but cannot be kept there; expected"
                " a store that can be written, with free space, and no other process that keeps"
                " some: run the command again"
            )


def run(arguments: argparse.Namespace) -> None:
    """Compute the Gram matrices, which keeps them in the store, and say what was done."""
    from relexkit.store import TrajectoryStore, describe_steps

    store = TrajectoryStore(arguments.store)
    with observer(arguments) as observed:
        matrices = observed.observe(store, arguments.until).gram
    if observed.silent:
        return
    _refuse_unless_kept(store, len(matrices.steps))
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
