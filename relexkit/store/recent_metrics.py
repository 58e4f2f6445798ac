"""The metrics of the latest steps, together in one small array, until there are enough of them to
write each metric's own array.

A metric is an array over the steps, which is what is wanted of it later. To write about twenty such
arrays after every step costs a small model as much as writing its weights, each of them being
flushed and renamed. So a step writes one array of ``MOST`` entries, and every ``MOST``-th step, and
the end of the writer, move them to where they belong. Until they are there, and on the disk, they
stay in this array: a reader looks here first and there second, so it misses none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zarr

from relexkit.store.codecs import Grid, create_array
from relexkit.store.fastpath.arrays import ReadableArrays, WritableArrays

NAME = "recent-metrics"
MOST = 64
"""Steps that it holds."""

WIDTH = 128
"""Numbers of a step: row, step, then metrics."""

_FIRST = 2  # the place of the first metric
NUM_RECENT = WIDTH - _FIRST
"""Metrics of a step that it holds; those beyond are written at once."""


def create_recent(group: zarr.Group) -> None:
    """Create it, without an entry."""
    grid = Grid((MOST * WIDTH,), (MOST * WIDTH,))
    create_array(group, NAME, grid, "float64", fill_value=float("nan"))[:] = float("nan")


class RecentMetrics:
    """What a writer keeps there.

    Args:
        steps: those that are committed; entries of others are void.
    """

    def __init__(self, arrays: WritableArrays, steps: np.ndarray):
        self._arrays = arrays
        self._entries = {
            int(entry[0]): entry
            for entry in _entries(np.asarray(arrays.array(NAME)[:]))
            if _is_of(entry, steps)
        }

    @property
    def any(self) -> bool:
        """Whether there is an entry to move."""
        return bool(self._entries)

    @property
    def full(self) -> bool:
        """Whether the entries must be moved before there is room for another one."""
        return len(self._entries) >= MOST

    def forget_after(self, num_rows: int) -> None:
        """The log was cut to ``num_rows`` steps."""
        self._entries = {row: entry for row, entry in self._entries.items() if row < num_rows}

    def write(self, row: int, step: int, values: Sequence[float]) -> None:
        """Add the metrics of a step, in the order of their list."""
        entry = np.full(WIDTH, np.nan)
        entry[:_FIRST] = row, step
        kept = values[:NUM_RECENT]
        entry[_FIRST : _FIRST + len(kept)] = kept
        self._entries[row] = entry
        self._store()

    def move(self, keys: Sequence[str]) -> None:
        """Write the entries into the arrays of the metrics ``keys``, in the order of their list.
        They are on the disk only after a flush; ``clear`` comes after it.
        """
        rows = np.array(sorted(self._entries), np.int64)
        if not len(rows):
            return
        table = np.stack([self._entries[row] for row in rows])
        for place, key in enumerate(keys[:NUM_RECENT], _FIRST):
            self._arrays.set_entries(f"metrics/{key}", rows, table[:, place])

    def clear(self) -> None:
        """Forget what was moved; the array itself follows with the next ``write`` or ``empty``."""
        self._entries.clear()

    def empty(self) -> None:
        """Leave the array without an entry."""
        self._store()

    def _store(self) -> None:
        table = np.full((MOST, WIDTH), np.nan)
        if self._entries:
            table[: len(self._entries)] = [self._entries[row] for row in sorted(self._entries)]
        self._arrays.set_chunk(NAME, table.ravel())


def read_recent(arrays: ReadableArrays, steps: np.ndarray) -> dict[int, np.ndarray]:
    """Metrics of the latest of ``steps`` by row, in the order of their list, NaN where there are
    none.

    Raises:
        StoreError: it is damaged.
    """
    rows = arrays.read_rows("the metrics of the latest steps", NAME, None)
    return {int(e[0]): e[_FIRST:] for e in _entries(rows) if _is_of(e, steps)}


def _entries(content: np.ndarray) -> np.ndarray:
    table = content.reshape(MOST, WIDTH)
    return table[np.isfinite(table[:, :_FIRST]).all(axis=1)]


def _is_of(entry: np.ndarray, steps: np.ndarray) -> bool:
    """Whether it is the entry of a step that the log names."""
    row = int(entry[0])
    return 0 <= row < len(steps) and steps[row] == entry[1]
