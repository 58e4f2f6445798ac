"""Reading a store: its steps, and blocks of columns of the base, the deltas, the weights and what
was logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from zarr.core.sync import sync

from relexkit.errors import StoreError
from relexkit.store.descriptions import verify_descriptions
from relexkit.store.encodings.bits import (
    BLOCK,
    Update,
    apply_update,
    block_checksums,
    content_checksum,
    decode_columns,
    factor_product,
    num_blocks,
)
from relexkit.store.fastpath.arrays import ReadableArrays
from relexkit.store.format import SAFE_FILE_NAME, metric_keys
from relexkit.store.kept import verify_kept
from relexkit.store.opening import layout_of, open_group, read_attributes
from relexkit.store.passes import READ_WINDOW, ProgressCallback, blocks, column_windows
from relexkit.weights.dtypes import round_bits, to_float32
from relexkit.weights.layout import Factors

_T = TypeVar("_T")

_ENTRY_BYTES = 8  # of a decoded entry of the log: column, difference, and slack while decoding


class TrajectoryStore:
    """A store opened for reading. ``TrajectoryStore(path)`` costs a few small reads, whatever the
    number of steps.

    What it reads are the steps that it was opened with. On a local disk every read looks whether
    the commit log was replaced since, and if so whether these steps still have the same content;
    of a store behind a URL only ``check_unchanged`` looks, which every pass calls at its end.

    Args:
        locked: the caller holds the writer's lock, so that nobody else changes the store.

    Attributes:
        layout: the flat parameter space.
        steps: recorded optimizer steps, ``int64 [T]``, ascending.
        attributes: ``source``, ``base`` (description, sha256), ``mantissa_bits``,
            ``relexkit_version``, ...

    Raises:
        StoreError: there is no store, its creation was interrupted, or its format version is
            unknown; or, of any read, a chunk is damaged, or other steps were recorded in place of
            these.
    """

    def __init__(self, path: str | Path, *, locked: bool = False):
        self.path, self._locked = str(path), locked
        self._lock = threading.RLock()
        self._indptr: dict[int, np.ndarray] = {}
        self._group = open_group(self.path)
        self._arrays = ReadableArrays(self._group, self.path)
        self.attributes = read_attributes(self._group, self.path)
        self.layout = layout_of(self.attributes, self.path)
        self.refresh()

    def refresh(self) -> None:
        """See the steps that a writer has committed since."""
        self._arrays.forget()
        self._indptr.clear()
        self._checksums: np.ndarray | None = None
        self._seen = self._arrays.version("steps")
        log = self._arrays.read_rows("the commit log", "steps", None)
        self.steps: np.ndarray = log[: int((log >= 0).sum())]
        if (log[len(self.steps) :] != -1).any() or (np.diff(self.steps, prepend=0) <= 0).any():
            raise StoreError(
                f"{self.path}: the commit log does not go upwards from 1 without a hole; restore"
                " the store from a copy"
            )

    def add_step(self, step: int) -> None:
        """Note a step that this process has just committed; ``refresh`` without reading
        anything.
        """
        self._indptr.clear()
        self._checksums = None
        self.steps = np.append(self.steps, step)

    @property
    def mantissa_bits(self) -> int | None:
        """Mantissa bits of float deltas; None if no part holds any."""
        return self.attributes["mantissa_bits"]

    @property
    def exact(self) -> bool:
        """True if every recorded step can be rebuilt bit for bit (of an adapter: its own
        tensors).
        """
        return all(part.encoding != "float" for part in self.layout.parts)

    @property
    def has_factors(self) -> bool:
        """True if the steps are low-rank adapters, kept as factors."""
        return any(part.encoding == "factors" for part in self.layout.parts)

    def row_of(self, step: int) -> int:
        """Row of a recorded step.

        Raises:
            StoreError: the step is not recorded.
        """
        found = np.flatnonzero(self.steps == step)
        if not len(found):
            raise StoreError(
                f"step {step} is not recorded in {self.path}; it holds {describe_steps(self.steps)}"
            )
        return int(found[0])

    # -- reading -----------------------------------------------------------------------------------

    def read_base(self, part: int, begin: int, end: int) -> np.ndarray:
        """Raw bits of the base weights in columns ``begin:end`` of a part (bytes, for a fixed
        part).
        """
        return self._content(
            lambda: f"the base, tensor {self._tensor_at(part, begin)!r}",
            lambda: self._arrays.read(f"base/{part}", None, begin, end),
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
        def read(row: int | slice) -> np.ndarray:
            return np.asarray(self._arrays.array(f"updates/{part}/indptr")[row])

        try:
            return self._content(f"the index of part {part}", lambda: read(slice(len(self.steps))))
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

    def row_chunk(self, part: int) -> int:
        """Columns of a dense part that are compressed together: reading fewer decodes as many."""
        if self.layout.parts[part].encoding == "factors":
            return READ_WINDOW["factors"]
        return self._content(
            f"the deltas of part {part}",
            lambda: int(self._arrays.array(f"deltas/{part}").chunks[-1]),
        )

    def read_row(
        self, part: int, row: int, begin: int, end: int, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """One step's dense row in columns ``begin:end``: float32 deltas, or integer differences
        against the base.

        From factors the float32 delta is computed. ``out``: an array of the row's dtype to decode
        into.
        """
        if self.layout.parts[part].encoding == "factors":
            left, right = self.read_factors(part, row)
            scale = np.float32(self._factors_of(part).scale)
            return np.multiply(factor_product(left, right, begin, end), scale, out=out)
        name = f"deltas/{part}"
        return self._content(
            partial(self._where, row, part, begin),
            lambda: self._arrays.read(name, row, begin, end, out),
        )

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
        """Float32 delta ``theta_s - theta_0`` of a dense part in columns ``begin:end``; ``base``
        are the bits there.

        ``out``: a float32 array ``[end - begin]`` to put it into.
        """
        if self.layout.parts[part].encoding in ("float", "factors"):
            return self.read_row(part, row, begin, end, out=out)
        values, dtype = self.read_row(part, row, begin, end), self.layout.parts[part].dtype
        return np.subtract(
            to_float32(base + values.view(base.dtype), dtype), to_float32(base, dtype), out=out
        )

    def read_factors(self, part: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """One step's factors as float32: ``left [rows, rank]`` and ``right [rank, columns]``,
        without the scale.
        """
        spec = self._factors_of(part)
        values = to_float32(self.read_factor_bits(part, row), spec.dtype)
        cut = spec.rows * spec.rank
        return values[:cut].reshape(spec.rows, spec.rank), values[cut:].reshape(
            spec.rank, spec.columns
        )

    def read_factor_bits(self, part: int, row: int) -> np.ndarray:
        """Raw bits of one step's factors, ``left`` before ``right``, flat."""
        numel = self._factors_of(part).numel
        return self._content(
            self._where(row, part, 0), lambda: self._arrays.read(f"factors/{part}", row, 0, numel)
        )

    def _factors_of(self, part: int) -> Factors:
        spec = self.layout.parts[part].factors
        if spec is None:
            raise StoreError(
                f"{self.path}: part {part} has factors without a description; restore the store"
                " from a copy"
            )
        return spec

    def read_state(self, part: int, row: int, begin: int, end: int) -> np.ndarray:
        """Bits of the recorded weights at ``row`` (-1 for the base), in columns ``begin:end`` as
        for ``read_update``.

        From a sparse part this replays the log up to the row. From float deltas it is the base plus
        the stored delta, rounded to nearest, which is exact only to the stated mantissa bits.
        """
        encoding, dtype = self.layout.parts[part].encoding, self.layout.parts[part].dtype
        state = self.read_base(part, begin, end)
        if row < 0 or encoding == "fixed":
            return state
        if encoding == "sparse":
            for earlier in range(row + 1):
                columns, differences = self.read_update(part, earlier, begin, end)
                apply_update(state, columns - begin, differences)
            return state
        values = self.read_row(part, row, begin, end)
        if encoding == "exact":
            return state + values.view(state.dtype)
        return round_bits(
            to_float32(state, dtype) + values, dtype, "nearest", tensor=self._tensor_at(part, begin)
        )

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

    def checksums(self) -> np.ndarray:
        """Content checksum of every step and part, ``uint32 [T, parts]``."""
        self._bind()
        assert self._checksums is not None
        return self._checksums

    def metrics(self) -> dict[str, np.ndarray]:
        """What was logged with the steps: name -> ``float64 [T]``, NaN where nothing was logged."""
        read = self._arrays.read_rows
        return {
            name: self._content(
                f"metric {name!r}",
                partial(read, f"metric {name!r}", f"metrics/{key}", len(self.steps)),
            )
            for name, key in self.metric_keys().items()
        }

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
        )
        self.sketches()
        checksums = self.checksums()
        digest = hashlib.sha256()
        for part, spec in enumerate(self.layout.parts):
            contents: list[list[int]] = [[] for _ in self.steps]
            for begin, end in blocks(spec.numel, READ_WINDOW[spec.encoding]):
                state = self.read_base(part, begin, end)
                digest.update(state.data.cast("B"))
                for row in range(
                    len(self.steps) if spec.encoding not in ("fixed", "factors") else 0
                ):
                    if spec.encoding == "sparse":
                        columns, differences = self.read_update(part, row, begin, end)
                        apply_update(state, columns - begin, differences)
                    else:
                        state = self.read_row(part, row, begin, end)
                    contents[row] += block_checksums(state)
            if spec.encoding == "factors":
                contents = [
                    block_checksums(self.read_factor_bits(part, row))
                    for row in range(len(self.steps))
                ]
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

    def check_unchanged(self) -> None:
        """Refuse results of a pass during which other steps were recorded in place of these, or the
        store was replaced; steps that were added do not matter.

        Raises:
            StoreError: these steps are gone or have another content.
        """
        self._confirm(always=True)

    def _content(self, where: str | Callable[[], str], read: Callable[[], _T]) -> _T:
        """What ``read`` gives, if it is of the steps that this reader was opened with.

        Raises:
            StoreError: ``read`` failed, or what it gave may be of other steps.
        """
        if not self._locked:
            self._bind()
        try:
            found = self._arrays.guard(where, read)
        except StoreError:
            self._confirm()  # a store that is being rewritten is not damaged
            raise
        self._confirm()
        return found

    def _bind(self) -> None:
        """Take the content checksums of these steps, before anything is read of them."""
        if self._checksums is not None:
            return
        with self._lock:
            if self._locked:
                self._checksums = self._read_checksums()
            while self._checksums is None:
                seen = self._arrays.version("steps")
                try:
                    found = self._read_checksums()
                except StoreError:
                    self._check_log()
                    raise
                if seen != self._seen:
                    self._check_log()
                if self._arrays.version("steps") == seen:  # else they may be of two states
                    self._checksums, self._seen = found, seen

    def _read_checksums(self) -> np.ndarray:
        return self._arrays.read_rows("the checksums", "checksums", len(self.steps))

    def _check_log(self) -> None:
        """Refuse a log that names other steps now."""
        if not self._is_prefix_of(self._reopened()):
            self._refuse()

    def _confirm(self, always: bool = False) -> None:
        """Refuse to go on if the commit log was replaced and these steps have another content
        now.
        """
        if self._locked:
            return
        now = self._arrays.version("steps")
        if now == self._seen and not always:
            return
        with self._lock:
            if now == self._seen and not always:
                return
            self._bind()
            other = self._reopened()
            if not self._is_prefix_of(other):
                self._refuse()
            if not np.array_equal(other.checksums()[: len(self.steps)], self.checksums()):
                self._refuse()
            self._seen = now

    def _reopened(self) -> TrajectoryStore:
        try:
            return TrajectoryStore(self.path)
        except StoreError as error:
            raise self._changed() from error

    def _is_prefix_of(self, other: TrajectoryStore) -> bool:
        return other.attributes == self.attributes and np.array_equal(
            other.steps[: len(self.steps)], self.steps
        )

    def _changed(self) -> StoreError:
        return StoreError(
            f"{self.path}: other steps were recorded in place of those that were read, or the store"
            " was replaced; run the command again when nothing writes it"
        )

    def _refuse(self) -> None:
        raise self._changed()

    def num_bytes(self) -> dict[str, int]:
        """Bytes by top-level group (``base``, ``updates``, ``deltas``, ``gram``, ...)."""
        sizes: dict[str, int] = {}
        if "://" in self.path:
            for name in self._group.keys():  # noqa: SIM118, a group is not a mapping
                sizes[name] = sync(
                    self._group.store.getsize_prefix((self._group.store_path / name).path)
                )
            return sizes
        for folder, _, names in os.walk(self.path):
            top = Path(folder).relative_to(self.path).parts[:1]
            key = top[0] if top else "."
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file
                    sizes[key] = sizes.get(key, 0) + os.path.getsize(os.path.join(folder, name))
        return sizes

    # -- helpers -----------------------------------------------------------------------------------

    def _tensor_at(self, part: int, column: int) -> str:
        segments = self.layout.segments_in(part, column)
        return segments[0].tensor.name if segments else f"part {part}"

    def _where(self, row: int, part: int, begin: int) -> str:
        return f"step {self.steps[row]}, tensor {self._tensor_at(part, begin)!r}"

    def _damaged(self, row: int, part: int, begin: int, reason: str) -> None:
        self._confirm()
        raise StoreError(
            f"{self.path}: {self._where(row, part, begin)}: {reason}; restore the store from a copy"
        )


def describe_steps(steps: np.ndarray) -> str:
    """Steps in words: ``40 steps from 1 to 40``."""
    if not len(steps):
        return "no steps"
    if len(steps) == 1:
        return f"only step {steps[0]}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
