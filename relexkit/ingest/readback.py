"""Read a step back from the store and compare it with the checkpoint that it came from, before the
checkpoint is deleted.
"""

from __future__ import annotations

import numpy as np

from relexkit.checkpoints.formats.peft import AdaptedCheckpoint
from relexkit.checkpoints.protocol import Checkpoint
from relexkit.errors import StoreError
from relexkit.ingest.append import read_columns
from relexkit.store import READ_WINDOW, TrajectoryStore, blocks
from relexkit.store.encodings.bits import apply_update, float_row


class ReadBack:
    """Follows a store from step to step and compares each with its checkpoint: every bit, of float
    deltas every rounded value.

    Memory: the weights of the sparse parts, since a step of the log is known only after those
    before it, and a few blocks.
    """

    def __init__(self, store: TrajectoryStore, row: int):
        """``row`` is the last one that is known, -1 for the base."""
        self._store, self._row = store, row
        parts = enumerate(store.layout.parts)
        self._states = {
            p: store.read_state(p, row, 0, spec.numel)
            for p, spec in parts
            if spec.encoding == "sparse"
        }

    def follow(self, store: TrajectoryStore) -> None:
        """The same store, opened again since steps were added."""
        self._store = store

    def check(self, row: int, checkpoint: Checkpoint) -> None:
        """Compare the step at ``row``, the next one, with its checkpoint. Reads both once.

        Raises:
            StoreError: they differ, or a chunk is damaged; the message names step and tensor.
        """
        assert row == self._row + 1, "steps are read back one after the other"
        self._row = row
        where = f"step {self._store.steps[row]}"
        for part, spec in enumerate(self._store.layout.parts):
            if spec.encoding == "fixed":
                continue  # the import has compared them with the base
            if spec.encoding == "factors":
                assert isinstance(checkpoint, AdaptedCheckpoint)
                name = self._store.layout.segments_in(part)[0].tensor.name
                if not np.array_equal(
                    checkpoint.factor_bits(name), self._store.read_factor_bits(part, row)
                ):
                    self._differs(row, part, 0)
                continue
            for begin, end in blocks(spec.numel, READ_WINDOW[spec.encoding]):
                current = read_columns(checkpoint, self._store.layout, part, begin, end, where)
                if not self._same(part, row, begin, end, current):
                    self._differs(row, part, begin)

    def _same(self, part: int, row: int, begin: int, end: int, current: np.ndarray) -> bool:
        store, spec = self._store, self._store.layout.parts[part]
        if spec.encoding == "sparse":
            state = self._states[part][begin:end]
            columns, differences = store.read_update(part, row, begin, end)
            apply_update(state, columns - begin, differences)
            return np.array_equal(state, current)
        base, kept = store.read_base(part, begin, end), store.read_row(part, row, begin, end)
        if spec.encoding == "exact":
            return np.array_equal(base + kept.view(base.dtype), current)
        return np.array_equal(float_row(base, current, spec.dtype, store.mantissa_bits or 23), kept)

    def _differs(self, row: int, part: int, begin: int) -> None:
        name = self._store.layout.segments_in(part, begin)[0].tensor.name
        raise StoreError(
            f"{self._store.path}: step {self._store.steps[row]} reads back differently from its"
            f" checkpoint, near tensor {name!r}; nothing was deleted: run `relexkit verify`"
        )
