"""A writer made of several processes: each writes the parts that it owns, the first one commits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from relexkit.gram_matrix.compute.distributed import Team
from relexkit.store import Shared, StoreWriter, owned_parts
from relexkit.weights.layout import Layout


def creation(layout: Layout, team: Team) -> Shared:
    """How this process takes part in creating a store."""
    return Shared(
        owned=owned_parts(layout, team.rank, team.size),
        leads=team.rank == 0,
        wait=lambda: team.gather(lambda: None),
    )


class SharedWriter(StoreWriter):
    """A ``StoreWriter`` whose ``begin`` and ``commit`` all processes of a team call.

    The first one opens it before the others do. A step is committed once all have put their parts
    on the disk; one that dies before leaves the store with the steps before.

    Attributes:
        owned: the parts that this process writes.
    """

    def __init__(self, path: str | Path, team: Team):
        super().__init__(path, member=team.rank > 0)
        self._team = team
        self.owned = owned_parts(self.store.layout, team.rank, team.size)

    def begin(self, step: int) -> None:
        """See ``StoreWriter``; the first process makes room before the others open what is there.

        Raises:
            StoreError: the step does not come after the recorded ones, or a write failed.
        """
        start = super().begin
        self._team.share(lambda: start(step))
        if self._member:
            start(step)

    def commit(
        self, metrics: Mapping[str, float] | None = None, checksums: Mapping[int, int] | None = None
    ) -> None:
        """See ``StoreWriter``; ``metrics`` are those of the first process.

        Raises:
            StoreError: some process could not write its parts.
        """
        written = dict(checksums or {})
        for other in self._team.gather(self._written):
            written |= other
        finish = super().commit
        self._team.share(lambda: finish(metrics, written))
        if self._member:
            self.follow()

    def _written(self) -> dict[int, int]:
        if self._member:
            self.flush()
        return self.checksums
