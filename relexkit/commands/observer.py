"""How a command comes to its Gram matrices: which PCA, where, and by how many processes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from relexkit.commands.console import progress_bar, say

if TYPE_CHECKING:
    from relexkit.gram_matrix import Gram
    from relexkit.gram_matrix.pca import Choice
    from relexkit.store import TrajectoryStore


def add_pca(parser: argparse.ArgumentParser) -> None:
    """``--pca``, ``--components`` and ``--device``."""
    parser.add_argument(
        "--pca",
        choices=("auto", "exact", "randomized"),
        default="auto",
        help="exact, or randomized for very long runs (default: what is cheaper)",
    )
    parser.add_argument(
        "--components", type=int, metavar="R", help="directions that a randomized PCA resolves (8)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="cpu|cuda|cuda:N", help="where products are computed"
    )


class Observer:
    """What the options of ``add_pca`` come to, in this process among those that torchrun started."""

    def __init__(self, parsed: argparse.Namespace, team: Any, progress: Any):
        from relexkit.gram_matrix.compute.distributed import local_device

        self._parsed, self.team = parsed, team
        self.device = local_device(parsed.device)
        self.progress = None if team.rank else progress

    @property
    def silent(self) -> bool:
        """Whether another process prints the results."""
        return self.team.rank > 0

    def choose(self, store: TrajectoryStore, until: int | None) -> Choice:
        """Which PCA; a reason worth reading goes to standard error."""
        from relexkit.gram_matrix.pca import choose

        given = self._parsed
        more = {} if given.components is None else {"components": given.components}
        choice = self.team.share(
            lambda: choose(store, pca=given.pca, until=until, device=given.device, **more)
        )
        if choice.notable and not self.silent:
            say(choice.reason)
        return choice

    def gram(self, store: TrajectoryStore, until: int | None) -> Gram:
        """The Gram matrices over the steps to ``until``; that a jump ends them goes to standard
        error.
        """
        from relexkit.gram_matrix.jumps import jumps
        from relexkit.gram_matrix.pca import pca_gram

        found = jumps(store)
        if (
            len(found)
            and found[0] > store.steps[0]
            and (until is None or until >= found[0])
            and not self.silent
        ):
            say(f"step {found[0]} is a jump: only the steps of training before it are looked at")
        return pca_gram(store, until=until, **self.arguments(store, until), progress=self.progress)

    def arguments(self, store: TrajectoryStore, until: int | None) -> dict[str, Any]:
        """Arguments for ``pca_gram`` and the calls that pass them on."""
        found = {"pca": self.choose(store, until).method, "device": self.device, "team": self.team}
        return (
            found
            if self._parsed.components is None
            else {**found, "components": self._parsed.components}
        )


@contextmanager
def observer(parsed: argparse.Namespace) -> Iterator[Observer]:
    """Opens the group of processes, and a progress bar in the first of them."""
    from relexkit.gram_matrix.compute.distributed import local_device, team

    with team(local_device(parsed.device)) as found, progress_bar() as progress:
        yield Observer(parsed, found, progress)
