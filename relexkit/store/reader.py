"""Reading a store: its steps, and blocks of columns of the base, the deltas, the weights and what
was logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from relexkit.errors import StoreError
from relexkit.store.descriptions import verify_descriptions
from relexkit.store.encodings.bits import (
    BLOCK,
    Update,
    block_checksums,
    content_checksum,
    decode_columns,
    num_blocks,
)
from relexkit.store.encodings.protocol import Place
from relexkit.store.encodings.table import FACTORS
from relexkit.store.fastpath.keys import bytes_below
from relexkit.store.format import SAFE_FILE_NAME, metric_keys
from relexkit.store.kept import verify_kept
from relexkit.store.opened import OpenedStore
from relexkit.store.passes import ProgressCallback, blocks, column_windows
from relexkit.store.recent_metrics import NAME as RECENT
from relexkit.store.recent_metrics import read_recent

_ENTRY_BYTES = 8  # of a decoded entry of the log: column, difference, and slack while decoding


class TrajectoryStore(OpenedStore):
    """A store opened for reading. ``TrajectoryStore(path)`` costs a few small reads, whatever the
    number of steps.

    What it reads are the steps that it was opened with. On a local disk every read looks whether
    the commit log was replaced since, and if so whether these steps still have the same content;
    of a store behind a URL only ``check_unchanged`` looks, which every pass calls at its end.

    Args:
        locked: the caller holds the writer's lock, so that nobody else changes the store.

    Attributes:
        layout: the flat parameter space.
        reference: where the base is, if the store does not hold it.
        steps: recorded optimizer steps, ``int64 [T]``, ascending.
        attributes: ``source``, ``base`` (description, sha256), ``mantissa_bits``,
            ``relexkit_version``, ...

    Raises:
        StoreError: there is no store, its creation was interrupted, or its format version is
            unknown; or, of any read, a chunk is damaged, or other steps were recorded in place of
            these.
    """

    # -- reading -----------------------------------------------------------------------------------

    def read_base(self, part: int, begin: int, end: int) -> np.ndarray:
        """Raw bits of the base weights in columns ``begin:end`` of a part (bytes, for a fixed
        part).
        """
        base = self._base
        return self._content(
            lambda: f"the base, tensor {self._tensor_at(part, begin)!r}",
            lambda: (
                self._arrays.read(f"base/{part}", None, begin, end)
                if base is None
                else base.read(part, begin, end)
            ),
        )

    def indptr(self, part: int) -> np.ndarray:
        """Entries of the sparse log before each block, ``uint32 [T, num_blocks + 1]``; cached."""
        if part not in self._indptr:
            table = self._read_indptr(part)
            for row in np.flatnonzero(
                (table[:, 0] != 0) | (np.diff(table.astype(np.int64), axis=1) < 0).any(axis=1)
            ):
                self._damaged(int(row), part, 0, "its index is missing or not ascending")
            self._indptr = {
                part: table
            }  # passes go part by part; all parts of a large run would take much
        return self._indptr[part]

    def _read_indptr(self, part: int) -> np.ndarray:
        name, count = f"updates/{part}/indptr", len(self.steps)

        def read(row: int) -> np.ndarray:
            return np.asarray(self._arrays.array(name)[row])

        try:
            return self._content(
                f"the index of part {part}", lambda: self._arrays.first_rows(name, count)
            )
        except StoreError:  # a damaged chunk belongs to one step: find and name it
            rows = [
                self._content(partial(self._where, row, part, 0), partial(read, row))
                for row in range(len(self.steps))
            ]
            return np.stack(rows)

    def read_update(
        self, part: int, row: int, begin: int, end: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """One step's entries of the sparse log in columns ``begin:end`` of a part.

        ``begin`` is a multiple of ``BLOCK``, ``end`` too unless it is the end of the part. Returns
        ascending columns counted from the start of the part, ``int32 [n]``, and integer differences
        of bits, ``int16`` or ``int32 [n]``.
        """
        first, last = begin // BLOCK, num_blocks(end)
        indptr = self.indptr(part)[row, first : last + 1]
        low, high = int(indptr[0]), int(indptr[-1])
        name = f"updates/{part}"
        where = partial(self._where, row, part, begin)
        if low == high:
            return np.empty(0, np.int32), np.empty(
                0, self._content(where, lambda: self._arrays.array(f"{name}/data").dtype)
            )
        gaps = self._content(where, lambda: self._arrays.read(f"{name}/indices", row, low, high))
        differences = self._content(
            where, lambda: self._arrays.read(f"{name}/data", row, low, high)
        )
        if not differences.all():
            self._damaged(row, part, begin, "a chunk is missing")
        columns = self._content(where, lambda: decode_columns(gaps, indptr, first))
        if columns[0] < begin or columns[-1] >= end:
            self._damaged(row, part, begin, "columns lie outside their block")
        return columns, differences

    def read_log(
        self,
        part: int,
        num_rows: int,
        budget: int,
        pool: ThreadPoolExecutor,
        span: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, int, list[Update]]]:
        """The sparse log of a part for the first ``num_rows`` steps, in stretches of columns that
        fit ``budget`` bytes.

        Yields ``(begin, end, updates)`` with one update a step, columns counted from the start of
        the part. A chunk that lies in several stretches is read for each of them. ``span`` are the
        columns to read, as for ``read_update``; all if not given.
        """
        first, last = span or (0, self.layout.parts[part].numel)
        entries = self.entries(part, num_rows)[first // BLOCK : num_blocks(last)]
        for low, high in column_windows(
            entries, last - first, budget // _ENTRY_BYTES, last - first
        ):
            begin, end = first + low, first + high
            yield (
                begin,
                end,
                list(
                    pool.map(
                        lambda row, b=begin, e=end: self.read_update(part, row, b, e),
                        range(num_rows),
                    )
                ),
            )

    def entries(self, part: int, num_rows: int) -> np.ndarray:
        """Entries of the sparse log in each block over the first ``num_rows`` steps, ``int64
        [num_blocks]``.
        """
        return np.diff(self.indptr(part)[:num_rows].astype(np.int64), axis=1).sum(axis=0)

    def windows(self, part: int) -> Iterator[tuple[int, int]]:
        """Consecutive ``(begin, end)`` over a part, as many columns as a pass takes at a time."""
        return blocks(self.layout.parts[part].numel, self.encoding(part).window)

    def row_chunk(self, part: int) -> int:
        """Columns of a part that are compressed together: reading fewer decodes as many."""
        return self.encoding(part).chunk(self.layout.parts[part])

    def read_array(self, name: str, place: Place, out: np.ndarray | None = None) -> np.ndarray:
        """Columns of the row of a step in an array ``[T, n]``, in ``out`` if given."""
        part, row, begin, end = place
        return self._content(
            partial(self._where, row, part, begin),
            lambda: self._arrays.read(name, row, begin, end, out),
        )

    def read_row(
        self, part: int, row: int, begin: int, end: int, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """One step's dense row in columns ``begin:end``: float32 deltas, or integer differences
        against the base. ``out``: an array of the row's dtype to decode into.
        """
        return self.read_array(f"deltas/{part}", Place(part, row, begin, end), out)

    def read_delta(
        self,
        part: int,
        row: int,
        begin: int,
        end: int,
        base: np.ndarray,
        *,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Float32 delta ``theta_s - theta_0`` in columns ``begin:end``, with ``base`` the bits
        there. From factors it is computed; of a sparse log all steps up to the row are replayed.

        ``out``: a float32 array ``[end - begin]`` to put it into.
        """
        return self.encoding(part).read_delta(self, Place(part, row, begin, end), base, out)

    def read_factors(self, part: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """One step's factors as float32: ``left [rows, rank]`` and ``right [rank, columns]``,
        without the scale.
        """
        return FACTORS.read(self, part, row)

    def read_factor_bits(self, part: int, row: int) -> np.ndarray:
        """Raw bits of one step's factors, ``left`` before ``right``, flat."""
        return FACTORS.bits(self, part, row)

    def read_state(self, part: int, row: int, begin: int, end: int) -> np.ndarray:
        """Bits of the recorded weights at ``row`` (-1 for the base), in columns ``begin:end`` as
        for ``read_update``.

        From a sparse part this replays the log up to the row. From float deltas it is the base plus
        the stored delta, rounded to nearest, which is exact only to the stated mantissa bits; from
        factors the merged weights, rounded stochastically (seed 0) to the base's dtype.
        """
        return self.encoding(part).read_state(self, Place(part, row, begin, end))

    def sketches(self) -> np.ndarray | None:
        """Sketches that a recorder kept, ``float32 [T, width]``, NaN for a step without one; None
        if there are none.
        """
        if not self._content("the sketches", lambda: "sketches" in self._group):
            return None
        rows = [
            self._content(f"the sketch of step {s}", partial(self._read_sketch, row))
            for row, s in enumerate(self.steps)
        ]
        return np.stack(rows) if rows else None

    def _read_sketch(self, row: int) -> np.ndarray:
        return np.asarray(self._arrays.array("sketches")[row])

    def metrics(self) -> dict[str, np.ndarray]:
        """What was logged with the steps: name -> ``float64 [T]``, NaN where nothing was logged."""
        read = self._arrays.read_rows
        recent = self._content("the metrics of the latest steps", self._read_recent)  # first: a
        # writer moves them to the arrays below, and then takes them away
        metrics = {
            name: self._content(
                f"metric {name!r}",
                partial(read, f"metric {name!r}", f"metrics/{key}", len(self.steps)),
            )
            for name, key in self.metric_keys().items()
        }
        for row, values in recent.items():
            for column, value in zip(metrics.values(), values, strict=False):
                column[row] = value
        return metrics

    def _read_recent(self) -> dict[int, np.ndarray]:
        return read_recent(self._arrays, self.steps) if RECENT in self._group else {}

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files by name."""
        names = self.attributes["files"]
        for name in names:
            if not SAFE_FILE_NAME.fullmatch(name):
                raise StoreError(
                    f"{self.path}: holds a file named {name!r}; expected plain names such as"
                    " tokenizer.json"
                )
        return {
            name: self._arrays.read_rows(f"file {name!r}", f"files/{name}", None).tobytes()
            for name in names
        }

    def metric_names(self) -> list[str]:
        """Names of the metrics that were logged, exactly as they were."""
        return list(self.metric_keys())

    def metric_keys(self) -> dict[str, str]:
        """Name of every metric -> name of its array below ``metrics``."""
        attributes = self._arrays.guard(
            "the list of metrics", lambda: dict(self._group["metrics"].attrs)
        )
        keys = metric_keys(attributes)
        if keys is None:
            raise StoreError(
                f"{self.path}: the list of metrics is damaged; restore the store from a copy"
            )
        return keys

    def verify(self, progress: ProgressCallback | None = None) -> None:
        """Read every chunk of the steps, of the base and of what is derived from them, and compare
        it with its checksum, and every description with what it must be. One pass, flat memory.

        Raises:
            StoreError: the first damaged place, by step and tensor.
        """
        self.files()
        self.metrics()
        verify_descriptions(
            self._group,
            self.layout,
            self.attributes["files"],
            list(self.metric_keys().values()),
            self.path,
            by_reference=self.reference is not None,
        )
        self.sketches()
        checksums = self.checksums()
        digest = hashlib.sha256()
        for part in range(len(self.layout.parts)):
            contents: list[list[int]] = [[] for _ in self.steps]
            for begin, end in self.windows(part):
                digest.update(self.read_base(part, begin, end).data.cast("B"))
                kept = self.encoding(part).contents(self, part, begin, end)
                for content, values in zip(contents, kept, strict=False):
                    content += block_checksums(values)
            for row, content in enumerate(contents):
                if content and content_checksum(content) != checksums[row, part]:
                    self._damaged(row, part, 0, "its content does not match its checksum")
            if progress:
                progress("verifying", part + 1, len(self.layout.parts))
        if digest.hexdigest() != self.attributes["base"]["sha256"]:
            self.check_unchanged()
            raise StoreError(
                f"{self.path}: the base does not match its sha256; restore the store from a copy"
            )
        verify_kept(self)

    def num_bytes(self) -> dict[str, int]:
        """Bytes by top-level group (``base``, ``updates``, ``deltas``, ``gram``, ...)."""
        sizes: dict[str, int] = {}
        if "://" in self.path:
            for name in self._group.keys():  # noqa: SIM118, a group is not a mapping
                sizes[name] = bytes_below(self._group, name)
            return sizes
        for folder, _, names in os.walk(self.path):
            top = Path(folder).relative_to(self.path).parts[:1]
            key = top[0] if top else "."
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file
                    sizes[key] = sizes.get(key, 0) + os.path.getsize(os.path.join(folder, name))
        return sizes
