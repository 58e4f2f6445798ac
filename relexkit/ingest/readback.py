"""Read steps back from the store and compare them with the checkpoints that they came from, before
these are deleted.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from relexkit.checkpoints.protocol import Checkpoint
from relexkit.ingest.columns import Columns, Replay
from relexkit.store import TrajectoryStore


class ReadBack:
    """Goes through a store from step to step and compares some of them with their checkpoints:
    every bit, of float deltas every rounded value, and the tensors that are not float.

    Memory: the weights of the sparse parts, since a step of the log is known only after those
    before it, and a few blocks.
    """

    def __init__(self, store: TrajectoryStore):
        self._checksums = store.checksums()
        self._spans = {part: list(store.windows(part)) for part in range(len(store.layout.parts))}
        self._replay = Replay(store, self._spans)

    @property
    def row(self) -> int:
        """Of the last step that was compared; -1 before."""
        return self._replay.row

    def follow(self, store: TrajectoryStore) -> bool:
        """The same store, opened again; False if a step that was passed has other content now."""
        passed = self.row + 1
        now = store.checksums()
        if len(now) < passed or not np.array_equal(now[:passed], self._checksums[:passed]):
            return False
        self._replay.store, self._checksums = store, now
        return True

    def difference(self, row: int, checkpoint: Checkpoint) -> str | None:
        """The tensor near which the step at ``row``, after those compared before, differs from a
        checkpoint with the store's tensors; None if it does not. Reads both once.

        Raises:
            StoreError: a chunk is damaged; the message names step and tensor.
            CheckpointError: the checkpoint cannot be read.
        """
        assert row > self.row, "steps are read back in order"
        store = self._replay.store
        self._replay.advance(row)
        columns = Columns(checkpoint, store.layout, f"step {store.steps[row]}")
        for part, spec in enumerate(store.layout.parts):
            for begin, end in self._spans[part] if spec.factors is None else [(0, spec.numel)]:
                if not self._replay.equals(part, (begin, end), columns):
                    return store.layout.segments_in(part, begin)[0].tensor.name
        return None


class DroppedFromMemory:
    """Makes later reads of a local store come from its disk: what was written was flushed before it
    was committed, so the system may forget its copies.
    """

    def __init__(self, path: str):
        self._path = path
        self._done: dict[str, int] = {}

    def drop(self) -> None:
        """Forget the copies of all files that are new or changed since the last call."""
        for inside, _, names in os.walk(self._path):
            for name in names:
                path = str(Path(inside, name))
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    changed = os.fstat(fd).st_mtime_ns
                    if self._done.get(path) != changed and hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                        self._done[path] = changed
                finally:
                    os.close(fd)
