"""How a command comes to its Gram matrices: which PCA, where, and by how many processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from relexkit.commands.console import progress_bar, say
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.options import OfStore, group

if TYPE_CHECKING:
    from relexkit.assess.observed import Observed
    from relexkit.gram_matrix.compute.distributed import Team
    from relexkit.store import ProgressCallback, TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class OfGram(OfStore):
    """Options of a command that needs Gram matrices."""

    compute: Compute = group(Compute, "pca", "components", "device", heading="computing")


class Observer:
    """How Gram matrices are computed, in this process among those that torchrun started.

    Attributes:
        compute: where, by whom and how.
        silent: whether another process prints the results.
    """

    def __init__(self, compute: Compute):
        self.silent = compute.team.rank > 0
        self.compute = compute

    def decided(self, store: TrajectoryStore, until: int | None) -> Compute:
        """``compute`` with the PCA that ``auto`` means; a reason worth reading goes to standard
        error.
        """
        from relexkit.gram_matrix.pca import choose

        c = self.compute
        choice = c.team.share(
            lambda: choose(store, pca=c.pca, until=until, components=c.components, device=c.device)
        )
        if choice.notable and not self.silent:
            say(choice.reason)
        return replace(c, pca=choice.method)

    def observe(
        self, store: TrajectoryStore, until: int | None = None, since: int | None = None
    ) -> Observed:
        """``observe``; if a jump ends the steps that are used, standard error says so."""
        from relexkit.assess.observed import observe
        from relexkit.gram_matrix.jumps import jumps
        from relexkit.predict.asked import past_the_end

        for line in past_the_end(store.steps, until):
            if not self.silent:
                say(line)
        if since is not None:
            return observe(store, until=until, since=since)
        led_to = jumps(store)
        if (
            len(led_to)
            and led_to[0] > store.steps[0]
            and (until is None or until >= led_to[0])
            and not self.silent
        ):
            say(f"step {led_to[0]} is a jump: only the steps of training before it are looked at")
        return observe(store, until=until, compute=self.decided(store, until))


@contextmanager
def working_together(device: str = "cpu") -> Iterator[tuple[Team, ProgressCallback | None]]:
    """The processes that torchrun started, or this one alone, and a progress bar in the first of
    them.
    """
    from relexkit.gram_matrix.compute.distributed import team

    with team(device) as together, progress_bar() as progress:
        yield together, None if together.rank else progress


@contextmanager
def observer(compute: Compute) -> Iterator[Observer]:
    """Opens the group of processes, and a progress bar in the first of them."""
    from relexkit.gram_matrix.compute.distributed import local_device

    device = local_device(compute.device)
    with working_together(device) as (team, progress):
        yield Observer(replace(compute, device=device, team=team, progress=progress))
