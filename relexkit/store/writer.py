"""Appending steps to a store: everything of a step first, then its number in the commit log, which
makes it exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import zarr
from zarr.core.sync import sync

from relexkit.errors import StoreError
from relexkit.store.encodings.bits import encode_columns
from relexkit.store.fastpath.arrays import WritableArrays
from relexkit.store.fastpath.chunk_files import Encoded, RowWriter, ZarrRow
from relexkit.store.format import (
    LOG_CHUNK,
    METRIC_CHUNK,
    create_array,
    metric_key,
    metric_list,
)
from relexkit.store.lock import WriterLock
from relexkit.store.reader import TrajectoryStore


class StoreWriter:
    """Appends steps to a store. Use as a context manager: it holds the writer's lock.

    A step is ``begin``, one ``write_sparse``, ``write_row`` or ``write_factors`` for every moving
    part, then ``commit``. A large row may come in pieces: ``encode_row`` and ``append_row`` for
    each, then ``finish_row``. Several processes may write the parts of one step: the leader holds
    the lock and calls ``begin`` first and ``commit`` last, with the others' ``checksums``; the
    others are members, call ``begin`` after it and ``follow`` once it has committed.

    Args:
        member: another process holds the lock and commits.

    Raises:
        StoreError: another process is writing, or a step does not come after the recorded ones.
    """

    def __init__(self, path: str | Path, *, member: bool = False):
        self._member = member
        self._lock = None if member else WriterLock(str(path))
        try:
            self.store = TrajectoryStore(path)
            self._rows: dict[int, RowWriter] = {}
            self._group = zarr.open_group(str(path), mode="r+")
            self._arrays = WritableArrays(self._group)
            self._row = len(self.store.steps)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. A step that was begun and not committed does not exist."""
        for row in getattr(self, "_rows", {}).values():
            row.discard()
        if self._lock is not None:
            self._lock.close()

    def begin(self, step: int) -> None:
        """Start a step; it must be larger than every recorded one."""
        last = int(self.store.steps[-1]) if self._row else 0
        if step <= last:
            raise StoreError(
                f"step {step} cannot be recorded after step {last}: steps go upwards from 1; use a"
                " new store"
            )
        self._step = step
        self._checksums = np.zeros(len(self.store.layout.parts), np.uint32)
        self._missing = {
            p for p, part in enumerate(self.store.layout.parts) if part.encoding != "fixed"
        }
        for row in self._rows.values():
            row.discard()
        self._rows.clear()
        if self._member:
            self._arrays.forget()  # the leader may have made room for more rows
        else:
            self._discard_unfinished()
            self._reserve()

    @property
    def checksums(self) -> dict[int, int]:
        """Content checksums of the parts of the step that this process has written so far."""
        moving = {p for p, part in enumerate(self.store.layout.parts) if part.encoding != "fixed"}
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
                for derived in ("gram", "randomized"):  # from steps that may soon be others
                    sync((self._group.store_path / derived).delete_dir())
                log = np.full(self._arrays.array("steps").shape, -1, np.int64)
                log[:keep] = self.store.steps[:keep]
                self._arrays.array("steps")[:] = log
            self._arrays.forget()
        self.store.refresh()
        self._row = keep

    def write_sparse(
        self, part: int, columns: np.ndarray, differences: np.ndarray, checksum: int
    ) -> None:
        """Record a sparse part: ascending columns, non-zero bit differences, checksum of the bits
        after the update.
        """
        gaps, indptr = encode_columns(columns, self.store.layout.parts[part].numel)
        with self._writing():
            if len(gaps):
                self._arrays.array(f"updates/{part}/indices")[self._row, : len(gaps)] = gaps
                self._arrays.array(f"updates/{part}/data")[self._row, : len(gaps)] = differences
            self._arrays.array(f"updates/{part}/indptr")[self._row, :] = indptr
        self._written(part, checksum)

    def write_row(self, part: int, values: np.ndarray, checksum: int) -> None:
        """Record a dense part: float32 deltas or integer differences ``[numel]``, and the checksum
        of their bits.
        """
        self.append_row(part, self.encode_row(part, values))
        self.finish_row(part, checksum)

    def encode_row(self, part: int, values: np.ndarray) -> Encoded:
        """Encode the next values of a dense part, a multiple of ``store.row_chunk(part)`` or the
        last ones; on any thread.
        """
        found = self._arrays.direct(f"deltas/{part}")
        return [values.copy()] if found is None else found.encode(values)

    def append_row(self, part: int, chunks: Encoded) -> None:
        """Write values that ``encode_row`` has encoded, in order."""
        if part not in self._rows:
            name = f"deltas/{part}"
            found = self._arrays.direct(name)
            self._rows[part] = (
                ZarrRow(self._arrays.array(name), self._row)
                if found is None
                else found.open_row(self._row)
            )
        with self._writing():
            self._rows[part].append(chunks)

    def finish_row(self, part: int, checksum: int) -> None:
        """Complete a dense part, whose bits have this checksum."""
        with self._writing():
            self._rows[part].close()
        del self._rows[part]
        self._written(part, checksum)

    def write_sketch(self, row: np.ndarray) -> None:
        """Keep the sketch of the step, ``[width]``, so that a recorder that resumes goes on with
        it.
        """
        with self._writing():
            if "sketches" not in self._group:
                shape, nothing = (self._arrays.array("steps").shape[0], len(row)), float("nan")
                create_array(
                    self._group, "sketches", shape, np.float32, (1, len(row)), fill_value=nothing
                )
            self._arrays.set_row("sketches", self._row, row.astype(np.float32))

    def write_factors(self, part: int, bits: np.ndarray, checksum: int) -> None:
        """Record a part with factors: the raw bits of ``left`` and ``right``, flat, and their
        checksum.
        """
        with self._writing():
            self._arrays.array(f"factors/{part}")[self._row, :] = bits
        self._written(part, checksum)

    def _written(self, part: int, checksum: int) -> None:
        self._checksums[part] = checksum
        self._missing.discard(part)

    def commit(
        self, metrics: Mapping[str, float] | None = None, checksums: Mapping[int, int] | None = None
    ) -> None:
        """Make the step visible to readers: everything before was invisible, and this is one atomic
        replacement.

        Args:
            checksums: of the parts that members have written, from their ``checksums``.

        Raises:
            StoreError: a part of the step was not written, or the disk is full.
        """
        for part, checksum in (checksums or {}).items():
            self._written(part, checksum)
        if self._missing:
            raise StoreError(
                f"{self.store.path}: step {self._step} lacks parts {sorted(self._missing)}; write"
                " every part first"
            )
        with self._writing():
            self._arrays.set_row("checksums", self._row, self._checksums)
            self._write_metrics(metrics or {})
            self._arrays.set_entry("steps", self._row, self._step)
        self.store.add_step(self._step)
        self._row += 1

    def _write_metrics(self, metrics: Mapping[str, float]) -> None:
        """Every known metric gets a value or NaN: a killed writer may have left one in this row."""
        group, keys = self._group["metrics"], self.store.metric_keys()
        for name in metrics:
            if name in keys:
                continue
            keys[name] = metric_key(name, keys.values())
            array = create_array(
                self._group,
                f"metrics/{keys[name]}",
                self._arrays.array("steps").shape,
                "float64",
                (METRIC_CHUNK,),
                fill_value=float("nan"),
            )
            array[:] = float("nan")
            group.update_attributes(metric_list(keys))  # one write: a crash leaves either
        for name, key in keys.items():
            self._arrays.set_entry(f"metrics/{key}", self._row, metrics.get(name, float("nan")))

    def _per_step_arrays(self) -> list[str]:
        names = [f"metrics/{key}" for key in self.store.metric_keys().values()]
        for part, spec in enumerate(self.store.layout.parts):
            if spec.encoding == "sparse":
                names += [f"updates/{part}/{leaf}" for leaf in ("indices", "data", "indptr")]
            elif spec.encoding == "factors":
                names.append(f"factors/{part}")
            elif spec.encoding != "fixed":
                names.append(f"deltas/{part}")
        return [*names, *(["sketches"] if "sketches" in self._group else []), "checksums", "steps"]

    def _reserve(self) -> None:
        """Make room for one more row; ``steps`` grows last, so its length never exceeds the
        others'.
        """
        if self._row < self._arrays.array("steps").shape[0]:
            return
        if self._row >= LOG_CHUNK:
            raise StoreError(
                f"{self.store.path}: is full with {self._row} steps; import into a new store"
            )
        with self._writing():
            for name in self._per_step_arrays():
                array = self._arrays.array(name)
                array.resize((2 * self._row, *array.shape[1:]))
        self._arrays.forget()

    def _discard_unfinished(self) -> None:
        """Delete what a crash or ``truncate`` left in the first uncommitted row, so that a rewrite
        never merges with it.
        """
        with self._writing():
            for name in self._per_step_arrays():
                if name.startswith(("updates/", "deltas/", "factors/")):
                    sync((self._group.store_path / name / "c" / str(self._row)).delete_dir())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.store.path}: cannot be written ({error.strerror or error}); the"
                f" {len(self.store.steps)} recorded steps are intact: free space and run the"
                " command again"
            ) from error
