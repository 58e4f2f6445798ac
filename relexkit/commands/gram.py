"""``relexkit gram``: the one pass, on its own, so that every later question is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relexkit.commands.console import print_json, show
from relexkit.commands.observer import OfGram, observer
from relexkit.errors import RelexkitError
from relexkit.options import option

if TYPE_CHECKING:
    from relexkit.store import TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class Options(OfGram):
    """Options of ``relexkit gram``."""

    until: int | None = option(default=None, metavar="STEP")
    """randomized: only steps up to this one"""


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


def run(options: Options) -> None:
    """Compute the Gram matrices, which keeps them in the store, and say what was done."""
    from relexkit.store import TrajectoryStore, describe_steps

    store = TrajectoryStore(options.store)
    with observer(options.compute) as observed:
        matrices = observed.observe(store, options.until).gram
    if observed.silent:
        return
    _refuse_unless_kept(store, len(matrices.steps))
    if options.json:
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
