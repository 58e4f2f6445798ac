"""Appending steps to a store: everything of a step first, then its number in the commit log, which
makes it exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr

from relexkit.errors import StoreError
from relexkit.store.encodings.bits import encode_update
from relexkit.store.encodings.protocol import PartRow
from relexkit.store.encodings.table import ENCODINGS
from relexkit.store.fastpath.arrays import WritableArrays
from relexkit.store.fastpath.keys import delete_below
from relexkit.store.fastpath.local import for_writing, unflushed_of
from relexkit.store.format import (
    LOG_CHUNK,
    create_metric,
    create_sketches,
    metric_key,
    metric_list,
)
from relexkit.store.lock import WriterLock, leading
from relexkit.store.reader import TrajectoryStore
from relexkit.store.recent_metrics import NAME as RECENT
from relexkit.store.recent_metrics import NUM_RECENT, RecentMetrics


class StoreWriter:
    """Appends steps to a store. Use as a context manager: it holds the writer's lock.

    A step is ``begin``, for every moving part pieces as its encoding makes them (``append``) and
    ``finish``, then ``commit``; ``write_sparse`` and ``write_row`` take a part in one piece.
    Several processes may write the parts of one step: the leader holds the lock and calls ``begin``
    first and ``commit`` last, with the others' ``checksums``; the others are members, call
    ``begin`` after it, ``flush`` before they give their checksums and ``follow`` once it has
    committed.

    A step is on the disk before the commit log names it. After a failed write the writer takes no
    more: what would be committed later may have been differenced against what was lost.

    Args:
        member: another process holds the lock and commits.

    Attributes:
        store: as it was when the last step was committed.
        arrays: of the store, to be written.

    Raises:
        StoreError: another process is writing, or a step does not come after the recorded ones.
    """

    def __init__(self, path: str | Path, *, member: bool = False):
        self._member = member
        self._lock = WriterLock(str(path), member=True) if member else leading(str(path))
        try:
            self.store = TrajectoryStore(path, locked=True)
            self._rows: dict[int, PartRow] = {}
            self._failure: BaseException | None = None
            self._group = zarr.open_group(for_writing(str(path)), mode="r+")
            self._unflushed = unflushed_of(self._group.store)
            self.arrays = WritableArrays(self._group)
            self._row = len(self.store.steps)
            self._keys = self.store.metric_keys()
            self._recent: RecentMetrics | None = None
            if not member and RECENT in self._group:  # not in a store of an earlier release
                self._recent = RecentMetrics(self.arrays, self.store.steps)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. A step that was begun and not committed does not exist."""
        self._give_up_rows()
        with contextlib.suppress(StoreError):  # readers find them there as well
            self._move_recent(last=True)
        unflushed = getattr(self, "_unflushed", None)
        if unflushed is not None:
            unflushed.close()
        self._lock.close()

    def _give_up_rows(self) -> None:
        rows = getattr(self, "_rows", {})
        for row in rows.values():
            row.discard()
        rows.clear()

    def begin(self, step: int) -> None:
        """Start a step; it must be larger than every recorded one.

        Raises:
            StoreError: it is not, or an earlier write failed.
        """
        self._refuse_after_failure()
        last = int(self.store.steps[-1]) if self._row else 0
        if step <= last:
            raise StoreError(
                f"step {step} cannot be recorded after step {last}: steps go upwards from 1; use a"
                " new store"
            )
        self._step = step
        self._checksums = np.zeros(len(self.store.layout.parts), np.uint32)
        self._missing = {p for p, part in enumerate(self.store.layout.parts) if part.moves}
        self._give_up_rows()
        if self._member:
            self.arrays.forget()  # the leader may have made room for more rows
            self.store.forget_shapes()
        else:
            self._discard_unfinished()
            self._reserve()

    @property
    def checksums(self) -> dict[int, int]:
        """Content checksums of the parts of the step that this process has written so far."""
        moving = {p for p, part in enumerate(self.store.layout.parts) if part.moves}
        return {part: int(self._checksums[part]) for part in sorted(moving - self._missing)}

    def follow(self) -> None:
        """Note, as a member, that the leader has committed the step."""
        self.store.add_step(self._step)
        self._row += 1

    def truncate(self, last: int) -> None:
        """Remove every step after ``last`` (0: all). Killed half-way, the steps are either all
        there or gone.

        For a training run that goes back to an earlier state: what it records next may differ from
        what was there. A member only takes note, after the leader.
        """
        keep = int((self.store.steps <= last).sum())
        if keep == len(self.store.steps):
            return
        if not self._member:
            with self._writing():
                log = np.full(self.arrays.array("steps").shape, -1, np.int64)
                log[:keep] = self.store.steps[:keep]
                self._lock.check()
                self.arrays.array("steps")[:] = log
                self._flush()  # before anything is written over what the log named
            self.arrays.forget()
        self.store.refresh()
        self._row = keep
        if self._recent is not None:
            self._recent.forget_after(keep)

    def write_sparse(
        self, part: int, columns: np.ndarray, differences: np.ndarray, checksum: int
    ) -> None:
        """Record a sparse part: ascending columns, non-zero bit differences, checksum of the bits
        after the update.
        """
        numel = self.store.layout.parts[part].numel
        self.append(part, *encode_update(columns, differences, numel))
        self.finish(part, checksum)

    def write_row(self, part: int, values: np.ndarray, checksum: int) -> None:
        """Record a dense part: float32 deltas or integer differences ``[numel]``, and the checksum
        of their bits.
        """
        self.append(part, self.arrays.encode(f"deltas/{part}", values))
        self.finish(part, checksum)

    def append(self, part: int, *piece: Any) -> None:
        """Write the next piece of a part, as its encoding takes them."""
        with self._writing():
            self._open(part).append(*piece)

    def finish(self, part: int, checksum: int) -> None:
        """Complete a part, whose content has this checksum."""
        with self._writing():
            self._open(part).close()
        del self._rows[part]
        self._checksums[part] = checksum
        self._missing.discard(part)

    def _open(self, part: int) -> PartRow:
        if part not in self._rows:
            encoding = ENCODINGS[self.store.layout.parts[part].encoding]
            self._rows[part] = encoding.open(self.arrays, part, self._row)
        return self._rows[part]

    def write_sketch(self, row: np.ndarray) -> None:
        """Keep the sketch of the step, ``[width]``, so that a recorder that resumes goes on with
        it.
        """
        with self._writing():
            if "sketches" not in self._group:
                create_sketches(self._group, self.arrays.array("steps").shape[0], len(row))
                self._flush()  # readers of the committed steps look at it
            self.arrays.set_row("sketches", self._row, row.astype(np.float32))

    def flush(self) -> None:
        """Put what was written on the disk, as a member does before the leader commits."""
        with self._writing():
            self._flush()

    def _flush(self) -> None:
        if self._unflushed is not None:
            self._unflushed.flush()

    def commit(
        self, metrics: Mapping[str, float] | None = None, checksums: Mapping[int, int] | None = None
    ) -> None:
        """Make the step visible to readers: everything before was invisible, and this is one atomic
        replacement, made when everything before is on the disk.

        Args:
            checksums: of the parts that members have written, from their ``checksums``.

        Raises:
            StoreError: a part of the step was not written, or the disk is full.
        """
        for part, checksum in (checksums or {}).items():
            self._checksums[part] = checksum
            self._missing.discard(part)
        if self._missing:
            raise StoreError(
                f"{self.store.path}: step {self._step} lacks parts {sorted(self._missing)}; write"
                " every part first"
            )
        with self._writing():
            self.arrays.set_row("checksums", self._row, self._checksums)
            self._write_metrics(metrics or {})
            self._flush()
            self._lock.check()
            self.arrays.set_entry("steps", self._row, self._step)
            self._flush()
        self.store.add_step(self._step)
        self._row += 1

    def _write_metrics(self, metrics: Mapping[str, float]) -> None:
        """Every known metric gets a value or NaN: a killed writer may have left one in this row."""
        keys = self._keys
        new = [name for name in metrics if name not in keys]
        for name in new:
            keys[name] = metric_key(name, keys.values())
            array = create_metric(self._group, keys[name], self.arrays.array("steps").shape[0])
            array[:] = float("nan")
        if new:
            self._flush()  # before the list names them
            self._group["metrics"].update_attributes(metric_list(keys))
        if not keys:
            return
        values = [metrics.get(name, float("nan")) for name in keys]
        at_once = list(zip(keys.values(), values, strict=True))
        if self._recent is not None:
            if self._recent.full:
                self._move_recent()
            self._recent.write(self._row, self._step, values)
            at_once = at_once[NUM_RECENT:]
        for key, value in at_once:
            self.arrays.set_entry(f"metrics/{key}", self._row, value)

    def _move_recent(self, last: bool = False) -> None:
        """Move the metrics of the latest steps into the arrays of the metrics."""
        recent = getattr(self, "_recent", None)
        if recent is None or self._failure is not None or not recent.any:
            return
        with self._writing():
            self._lock.check()
            recent.move(list(self._keys.values()))
            self._flush()  # before they are taken away
            recent.clear()
            if last:
                recent.empty()
                self._flush()

    def _arrays_of_parts(self) -> list[str]:
        parts = enumerate(self.store.layout.parts)
        names = [name for p, part in parts for name in ENCODINGS[part.encoding].arrays(p)]
        return [*names, *(["sketches"] if "sketches" in self._group else [])]

    def _reserve(self) -> None:
        """Make room for one more row; ``steps`` grows last, so its length never exceeds the
        others'.
        """
        if self._row < self.arrays.array("steps").shape[0]:
            return
        if self._row >= LOG_CHUNK:
            raise StoreError(
                f"{self.store.path}: is full with {self._row} steps; import into a new store"
            )
        with self._writing():
            metrics = [f"metrics/{key}" for key in self._keys.values()]
            for name in [*metrics, *self._arrays_of_parts(), "checksums", "steps"]:
                if name == "steps":
                    self._flush()
                array = self.arrays.array(name)
                array.resize((2 * self._row, *array.shape[1:]))
        self.arrays.forget()
        self.store.forget_shapes()

    def _discard_unfinished(self) -> None:
        """Delete what a crash or ``truncate`` left in the first uncommitted row, so that a rewrite
        never merges with it.
        """
        with self._writing():
            for name in self._arrays_of_parts():
                delete_below(self._group, f"{name}/c/{self._row}")

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            raise StoreError(
                f"{self.store.path}: takes no more steps since one could not be written"
                f" ({self._failure}); free space and run the command again"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._refuse_after_failure()
        try:
            yield
        except BaseException as error:
            self._failure = error
            if not isinstance(error, OSError):
                raise
            raise StoreError(
                f"{self.store.path}: cannot be written ({error.strerror or error}); the"
                f" {self._num_committed()} recorded steps are intact: free space and run the"
                " command again"
            ) from error

    def _num_committed(self) -> int:
        """Steps that the log names; a failed flush may have come after its replacement."""
        try:
            return len(TrajectoryStore(self.store.path).steps)
        except StoreError:
            return len(self.store.steps)
