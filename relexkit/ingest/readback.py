"""Read steps back from the store and compare them with the checkpoints that they came from, before
these are deleted.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from relexkit.checkpoints.formats.peft import AdaptedCheckpoint
from relexkit.checkpoints.protocol import Checkpoint
from relexkit.ingest.append import read_columns
from relexkit.store import READ_WINDOW, TrajectoryStore, blocks
from relexkit.store.encodings.bits import apply_update, float_row


class ReadBack:
    """Goes through a store from step to step and compares some of them with their checkpoints:
    every bit, of float deltas every rounded value, and the tensors that are not float.

    Memory: the weights of the sparse parts, since a step of the log is known only after those
    before it, and a few blocks.
    """

    def __init__(self, store: TrajectoryStore):
        self._store = store
        self.row = -1  # of the last step that was compared
        self._checksums = store.checksums()
        parts = enumerate(store.layout.parts)
        self._states = {
            p: store.read_base(p, 0, spec.numel) for p, spec in parts if spec.encoding == "sparse"
        }

    def follow(self, store: TrajectoryStore) -> bool:
        """The same store, opened again; False if a step that was passed has other content now."""
        passed = self.row + 1
        now = store.checksums()
        if len(now) < passed or not np.array_equal(now[:passed], self._checksums[:passed]):
            return False
        self._store, self._checksums = store, now
        return True

    def difference(self, row: int, checkpoint: Checkpoint) -> str | None:
        """The tensor near which the step at ``row``, after those compared before, differs from a
        checkpoint with the store's tensors; None if it does not. Reads both once.

        Raises:
            StoreError: a chunk is damaged; the message names step and tensor.
            CheckpointError: the checkpoint cannot be read.
        """
        assert row > self.row, "steps are read back in order"
        for between in range(self.row + 1, row):
            for part in self._states:
                self._advance(part, between)
        self.row = row
        where = f"step {self._store.steps[row]}"
        found: str | None = None
        for part, spec in enumerate(self._store.layout.parts):
            if spec.encoding == "sparse":
                self._advance(part, row)
            if found is not None:
                continue
            if spec.encoding == "factors":
                assert isinstance(checkpoint, AdaptedCheckpoint)
                name = self._tensor(part, 0)
                kept = self._store.read_factor_bits(part, row)
                found = None if np.array_equal(checkpoint.factor_bits(name), kept) else name
                continue
            for begin, end in blocks(spec.numel, READ_WINDOW[spec.encoding]):
                current = read_columns(checkpoint, self._store.layout, part, begin, end, where)
                if not self._same(part, row, begin, end, current):
                    found = self._tensor(part, begin)
                    break
        return found

    def _advance(self, part: int, row: int) -> None:
        spec = self._store.layout.parts[part]
        for begin, end in blocks(spec.numel, READ_WINDOW[spec.encoding]):
            columns, differences = self._store.read_update(part, row, begin, end)
            apply_update(self._states[part][begin:end], columns - begin, differences)

    def _same(self, part: int, row: int, begin: int, end: int, current: np.ndarray) -> bool:
        store, spec = self._store, self._store.layout.parts[part]
        if spec.encoding == "sparse":
            return np.array_equal(self._states[part][begin:end], current)
        base = store.read_base(part, begin, end)
        if spec.encoding == "fixed":
            return np.array_equal(base, current)
        kept = store.read_row(part, row, begin, end)
        if spec.encoding == "exact":
            return np.array_equal(base + kept.view(base.dtype), current)
        return np.array_equal(float_row(base, current, spec.dtype, store.mantissa_bits or 23), kept)

    def _tensor(self, part: int, begin: int) -> str:
        return self._store.layout.segments_in(part, begin)[0].tensor.name


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
