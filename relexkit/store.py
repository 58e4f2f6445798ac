"""The trajectory store: one self-contained Zarr v3 group per run. `docs/format.md` is its specification.

One writer at a time, any number of readers meanwhile. A step exists once its number stands in ``steps``, which is
written last; whatever a crash left beyond is ignored and overwritten.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.sync import sync

from relexkit.chunk_files import ChunkFiles, Encoded, RowWriter, ZarrRow, chunk_files
from relexkit.dtypes import bits_dtype, to_float32
from relexkit.encoding import (
    BLOCK,
    CHECKSUM_BLOCK,
    Update,
    apply_update,
    block_checksums,
    content_checksum,
    decode_columns,
    encode_columns,
    factor_product,
    num_blocks,
)
from relexkit.errors import StoreError
from relexkit.layout import Factors, Layout
from relexkit.shards import ShardReader, shard_reader

FORMAT_VERSION = 1
FACTORS_FORMAT_VERSION = 2
"""Of stores that keep factors, which readers of version 1 do not know."""

READ_WINDOW = {"sparse": 2**24, "exact": 2**22, "float": 2**22, "factors": 2**22, "fixed": 2**22}
"""Columns that a pass over a part takes at a time, by encoding: the log is thin, dense rows are not."""

_ROWS = 64  # rows that arrays are created with; doubled when they are full
_LOG_CHUNK = 2**17  # steps that a store can hold: the commit log is one chunk, replaced as a whole
_METRIC_CHUNK = 2**10  # steps of a chunk of a metric, which every step replaces
_BASE_CHUNK, _BASE_SHARD = 2**20, 2**24
_ENTRY_CHUNK = 2**17
_ROW_CHUNK = 2**15  # a pass holds all steps of a chunk at once: 128 MiB of float32 for 1000 steps
_SPARSE_CODECS = (BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
_DENSE_CODECS = (BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
_WRITE_ALL: Any = {"write_empty_chunks": True}  # so that a missing chunk is always damage, never a chunk of fill values
_ENTRY_BYTES = 8  # of a decoded entry of the log: column, difference, and slack while decoding
_UNWRITTEN_INDPTR = 0xFFFFFFFF
_UNWRITTEN_GAP = 0xFFFF
_UNWRITTEN_INTEGER = -1

SAFE_FILE_NAME = re.compile(r"(?!relexkit\.json|model|pytorch_model|adapter_model|README)[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Files that a store may hold and write beside weights: plain names that replace no weights and no record of ours."""

ProgressCallback = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``."""

_T = TypeVar("_T")


class TrajectoryStore:
    """A store opened for reading. ``TrajectoryStore(path)`` costs a few small reads, whatever the number of steps.

    Attributes:
        layout: the flat parameter space.
        steps: recorded optimizer steps, ``int64 [T]``, ascending.
        attributes: ``source``, ``base`` (description, sha256), ``mantissa_bits``, ``relexkit_version``, ...

    Raises:
        StoreError: there is no store, its creation was interrupted, or its format version is unknown.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._arrays: dict[str, zarr.Array] = {}
        self._readers: dict[str, ShardReader | None] = {}
        self._indptr: dict[int, np.ndarray] = {}
        self._group = _open_group(self.path)
        self.attributes = _relexkit_attributes(self._group, self.path)
        self.layout = Layout.from_json(self.attributes["layout"])
        self.refresh()

    def refresh(self) -> None:
        """See the steps that a writer has committed since."""
        self._arrays.clear()
        self._readers.clear()
        self._indptr.clear()
        log = self._read_small("the commit log", "steps", None)
        self.steps: np.ndarray = log[log >= 0]

    def add_step(self, step: int) -> None:
        """Note a step that this process has just committed; ``refresh`` without reading anything."""
        self._indptr.clear()
        self.steps = np.append(self.steps, step)

    @property
    def mantissa_bits(self) -> int | None:
        """Mantissa bits of float deltas; None if no part holds any."""
        return self.attributes["mantissa_bits"]

    @property
    def exact(self) -> bool:
        """True if every recorded step can be rebuilt bit for bit (of an adapter: its own tensors)."""
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
            raise StoreError(f"step {step} is not recorded in {self.path}; it holds {describe_steps(self.steps)}")
        return int(found[0])

    # -- reading ------------------------------------------------------------------------------------------------------

    def read_base(self, part: int, begin: int, end: int) -> np.ndarray:
        """Raw bits of the base weights in columns ``begin:end`` of a part (bytes, for a fixed part)."""
        return self._guard(
            lambda: f"the base, tensor {self._tensor_at(part, begin)!r}", lambda: self._read(f"base/{part}", None, begin, end)
        )

    def indptr(self, part: int) -> np.ndarray:
        """Entries of the sparse log before each block, ``uint32 [T, num_blocks + 1]``; cached."""
        if part not in self._indptr:
            table = self._read_indptr(part)
            for row in np.flatnonzero((table[:, 0] != 0) | (np.diff(table.astype(np.int64), axis=1) < 0).any(axis=1)):
                self._damaged(int(row), part, 0, "its index is missing or not ascending")
            self._indptr = {part: table}  # passes go part by part; all parts of a large run would take much
        return self._indptr[part]

    def _read_indptr(self, part: int) -> np.ndarray:
        def read(row: int | slice) -> np.ndarray:
            return np.asarray(self._array(f"updates/{part}/indptr")[row])

        try:
            return read(slice(len(self.steps)))
        except Exception:  # a damaged chunk belongs to one step: find and name it
            rows = [self._guard(self._where(row, part, 0), partial(read, row)) for row in range(len(self.steps))]
            return np.stack(rows)

    def read_update(self, part: int, row: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """One step's entries of the sparse log in columns ``begin:end`` of a part.

        ``begin`` is a multiple of ``BLOCK``, ``end`` too unless it is the end of the part. Returns ascending columns
        counted from the start of the part, ``int32 [n]``, and integer differences of bits, ``int16`` or ``int32 [n]``.
        """
        first, last = begin // BLOCK, num_blocks(end)
        indptr = self.indptr(part)[row, first : last + 1]
        low, high = int(indptr[0]), int(indptr[-1])
        name = f"updates/{part}"
        if low == high:
            return np.empty(0, np.int32), np.empty(0, self._array(f"{name}/data").dtype)
        where = partial(self._where, row, part, begin)
        gaps = self._guard(where, lambda: self._read(f"{name}/indices", row, low, high))
        differences = self._guard(where, lambda: self._read(f"{name}/data", row, low, high))
        if not differences.all():
            self._damaged(row, part, begin, "a chunk is missing")
        columns = decode_columns(gaps, indptr, first)
        if columns[0] < begin or columns[-1] >= end:
            self._damaged(row, part, begin, "columns lie outside their block")
        return columns, differences

    def read_log(
        self, part: int, num_rows: int, budget: int, pool: ThreadPoolExecutor, span: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, int, list[Update]]]:
        """The sparse log of a part for the first ``num_rows`` steps, in stretches of columns that fit ``budget`` bytes.

        Yields ``(begin, end, updates)`` with one update a step, columns counted from the start of the part. A chunk that
        lies in several stretches is read for each of them. ``span`` are the columns to read, as for ``read_update``; all
        if not given.
        """
        first, last = span or (0, self.layout.parts[part].numel)
        entries = self.entries(part, num_rows)[first // BLOCK : num_blocks(last)]
        for low, high in column_windows(entries, last - first, budget // _ENTRY_BYTES, last - first):
            begin, end = first + low, first + high
            yield begin, end, list(pool.map(lambda row, b=begin, e=end: self.read_update(part, row, b, e), range(num_rows)))

    def entries(self, part: int, num_rows: int) -> np.ndarray:
        """Entries of the sparse log in each block over the first ``num_rows`` steps, ``int64 [num_blocks]``."""
        return np.diff(self.indptr(part)[:num_rows].astype(np.int64), axis=1).sum(axis=0)

    def row_chunk(self, part: int) -> int:
        """Columns of a dense part that are compressed together: reading fewer decodes as many."""
        if self.layout.parts[part].encoding == "factors":
            return READ_WINDOW["factors"]
        return int(self._array(f"deltas/{part}").chunks[-1])

    def read_row(self, part: int, row: int, begin: int, end: int, *, out: np.ndarray | None = None) -> np.ndarray:
        """One step's dense row in columns ``begin:end``: float32 deltas, or integer differences against the base.

        From factors the float32 delta is computed. ``out``: an array of the row's dtype to decode into.
        """
        if self.layout.parts[part].encoding == "factors":
            left, right = self.read_factors(part, row)
            scale = np.float32(self._factors_of(part).scale)
            return np.multiply(factor_product(left, right, begin, end), scale, out=out)
        name = f"deltas/{part}"
        return self._guard(partial(self._where, row, part, begin), lambda: self._read(name, row, begin, end, out))

    def read_delta(
        self, part: int, row: int, begin: int, end: int, base: np.ndarray, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Float32 delta ``theta_s - theta_0`` of a dense part in columns ``begin:end``; ``base`` are the bits there.

        ``out``: a float32 array ``[end - begin]`` to put it into.
        """
        if self.layout.parts[part].encoding in ("float", "factors"):
            return self.read_row(part, row, begin, end, out=out)
        values, dtype = self.read_row(part, row, begin, end), self.layout.parts[part].dtype
        return np.subtract(to_float32(base + values.view(base.dtype), dtype), to_float32(base, dtype), out=out)

    def read_factors(self, part: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """One step's factors as float32: ``left [rows, rank]`` and ``right [rank, columns]``, without the scale."""
        spec = self._factors_of(part)
        values = to_float32(self.read_factor_bits(part, row), spec.dtype)
        cut = spec.rows * spec.rank
        return values[:cut].reshape(spec.rows, spec.rank), values[cut:].reshape(spec.rank, spec.columns)

    def read_factor_bits(self, part: int, row: int) -> np.ndarray:
        """Raw bits of one step's factors, ``left`` before ``right``, flat."""
        numel = self._factors_of(part).numel
        return self._guard(self._where(row, part, 0), lambda: self._read(f"factors/{part}", row, 0, numel))

    def _factors_of(self, part: int) -> Factors:
        spec = self.layout.parts[part].factors
        if spec is None:
            raise StoreError(f"{self.path}: part {part} has factors without a description; restore the store from a copy")
        return spec

    def read_state(self, part: int, row: int, begin: int, end: int) -> np.ndarray:
        """Bits of the recorded weights at ``row`` (-1 for the base), in columns ``begin:end`` as for ``read_update``.

        From a sparse part this replays the log up to the row. From float deltas it is the base plus the stored delta,
        rounded to nearest, which is exact only to the stated mantissa bits.
        """
        from relexkit.dtypes import round_bits

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
        return round_bits(to_float32(state, dtype) + values, dtype, "nearest", tensor=self._tensor_at(part, begin))

    def sketches(self) -> np.ndarray | None:
        """Sketches that a recorder kept, ``float32 [T, width]``, NaN for a step without one; None if there are none."""
        if "sketches" not in self._group:
            return None
        rows = [self._guard(f"the sketch of step {s}", partial(self._read_sketch, row)) for row, s in enumerate(self.steps)]
        return np.stack(rows) if rows else None

    def _read_sketch(self, row: int) -> np.ndarray:
        return np.asarray(self._array("sketches")[row])

    def checksums(self) -> np.ndarray:
        """Content checksum of every step and part, ``uint32 [T, parts]``."""
        return self._read_small("the checksums", "checksums", len(self.steps))

    def metrics(self) -> dict[str, np.ndarray]:
        """What was logged with the steps: name -> ``float64 [T]``, NaN where nothing was logged."""
        names = self.metric_names()
        return {name: self._read_small(f"metric {name!r}", f"metrics/{name}", len(self.steps)) for name in names}

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files by name."""
        names = self.attributes["files"]
        for name in names:
            if not SAFE_FILE_NAME.fullmatch(name):
                raise StoreError(f"{self.path}: holds a file named {name!r}; expected plain names such as tokenizer.json")
        return {name: self._read_small(f"file {name!r}", f"files/{name}", None).tobytes() for name in names}

    def metric_names(self) -> list[str]:
        """Names of the metrics that were logged."""
        attributes = self._guard("the list of metrics", lambda: dict(self._group["metrics"].attrs))
        names = attributes.get("names")
        if not isinstance(names, list) or attributes.get("checksum") != _json_checksum(names):
            raise StoreError(f"{self.path}: the list of metrics is damaged; restore the store from a copy")
        return [str(name) for name in names]

    def verify(self, progress: ProgressCallback | None = None) -> None:
        """Read every chunk and compare every step with the checksum of its content. One pass, flat memory.

        Raises:
            StoreError: the first damaged place, by step and tensor.
        """
        self.files()
        self.metrics()
        checksums = self.checksums()
        digest = hashlib.sha256()
        for part, spec in enumerate(self.layout.parts):
            contents: list[list[int]] = [[] for _ in self.steps]
            for begin, end in blocks(spec.numel, READ_WINDOW[spec.encoding]):
                state = self.read_base(part, begin, end)
                digest.update(state.data.cast("B"))
                for row in range(len(self.steps) if spec.encoding not in ("fixed", "factors") else 0):
                    if spec.encoding == "sparse":
                        columns, differences = self.read_update(part, row, begin, end)
                        apply_update(state, columns - begin, differences)
                    else:
                        state = self.read_row(part, row, begin, end)
                    contents[row] += block_checksums(state)
            if spec.encoding == "factors":
                contents = [block_checksums(self.read_factor_bits(part, row)) for row in range(len(self.steps))]
            for row, content in enumerate(contents):
                if content and content_checksum(content) != checksums[row, part]:
                    self._damaged(row, part, 0, "its content does not match its checksum")
            if progress:
                progress("verifying", part + 1, len(self.layout.parts))
        if digest.hexdigest() != self.attributes["base"]["sha256"]:
            raise StoreError(f"{self.path}: the base does not match its sha256; restore the store from a copy")

    def num_bytes(self) -> dict[str, int]:
        """Bytes by top-level group (``base``, ``updates``, ``deltas``, ``gram``, ...)."""
        sizes: dict[str, int] = {}
        if "://" in self.path:
            for name in self._group.keys():  # noqa: SIM118, a group is not a mapping
                sizes[name] = sync(self._group.store.getsize_prefix((self._group.store_path / name).path))
            return sizes
        for folder, _, names in os.walk(self.path):
            top = Path(folder).relative_to(self.path).parts[:1]
            key = top[0] if top else "."
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file
                    sizes[key] = sizes.get(key, 0) + os.path.getsize(os.path.join(folder, name))
        return sizes

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            found = self._group[name]
            if not isinstance(found, zarr.Array):
                raise StoreError(f"{self.path}: {name} is not an array")
            self._arrays[name] = found
        return self._arrays[name]

    def _read(self, name: str, row: int | None, begin: int, end: int, out: np.ndarray | None = None) -> np.ndarray:
        if name not in self._readers:
            self._readers[name] = shard_reader(self._array(name))
        reader = self._readers[name]
        if reader is not None:
            return reader.read(row, begin, end, out)
        array = self._array(name)  # other codecs: Zarr fills in for missing chunks, so look for the shard first
        shard = array.shards[-1] if array.shards else array.chunks[-1]
        for number in range(begin // shard, -(-end // shard)):
            key = self._group.store_path / name / "c" / (f"{number}" if row is None else f"{row}/{number}")
            if not sync(key.exists()):
                raise FileNotFoundError("a chunk is missing")
        values = np.asarray(array[begin:end] if row is None else array[row, begin:end])
        if out is None:
            return values
        out[:] = values
        return out

    def _read_small(self, where: str, name: str, rows: int | None) -> np.ndarray:
        def read() -> np.ndarray:
            array = self._array(name)
            if array.ndim == 1:  # rows of the others are known to be missing by their content
                for chunk in range(-(-(array.shape[0] if rows is None else rows) // array.chunks[0])):
                    if not sync((self._group.store_path / name / "c" / str(chunk)).exists()):
                        raise ValueError("a chunk is missing")
            return np.asarray(array[:rows])

        return self._guard(where, read)

    def _tensor_at(self, part: int, column: int) -> str:
        segments = self.layout.segments_in(part, column)
        return segments[0].tensor.name if segments else f"part {part}"

    def _where(self, row: int, part: int, begin: int) -> str:
        return f"step {self.steps[row]}, tensor {self._tensor_at(part, begin)!r}"

    def _damaged(self, row: int, part: int, begin: int, reason: str) -> None:
        raise StoreError(f"{self.path}: {self._where(row, part, begin)}: {reason}; restore the store from a copy")

    def _guard(self, where: str | Callable[[], str], read: Callable[[], _T]) -> _T:
        """What ``read`` gives; its failure is said with the place, which is only then put into words."""
        try:
            return read()
        except StoreError:
            raise
        except Exception as error:  # checksum, decompression, JSON and file errors all arrive here
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            place = where if isinstance(where, str) else where()
            raise StoreError(f"{self.path}: {place}: cannot be read ({reason}); restore the store from a copy") from error


class StoreWriter:
    """Appends steps to a store. Use as a context manager: it holds the writer's lock.

    A step is ``begin``, one ``write_sparse``, ``write_row`` or ``write_factors`` for every moving part, then ``commit``. A
    large row may come in pieces: ``encode_row`` and ``append_row`` for each, then ``finish_row``.
    Several processes may write the parts of one step: the leader holds the lock and calls ``begin`` first and ``commit`` last,
    with the others' ``checksums``; the others are members, call ``begin`` after it and ``follow`` once it has committed.

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
            self._arrays: dict[str, zarr.Array] = {}
            self._chunk_files: dict[str, ChunkFiles | None] = {}
            self._columns: dict[str, np.ndarray] = {}
            self._rows: dict[int, RowWriter] = {}
            self._group = zarr.open_group(str(path), mode="r+")
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
            raise StoreError(f"step {step} cannot be recorded after step {last}: steps go upwards from 1; use a new store")
        self._step = step
        self._checksums = np.zeros(len(self.store.layout.parts), np.uint32)
        self._missing = {p for p, part in enumerate(self.store.layout.parts) if part.encoding != "fixed"}
        for row in self._rows.values():
            row.discard()
        self._rows.clear()
        if self._member:
            self._forget_arrays()  # the leader may have made room for more rows
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
        """Remove every step after ``last`` (0: all). Killed half-way, the steps are either all there or gone.

        For a training run that goes back to an earlier state: what it records next may differ from what was there. A member
        only takes note, after the leader.
        """
        keep = int((self.store.steps <= last).sum())
        if keep == len(self.store.steps):
            return
        if not self._member:
            with self._writing():
                for derived in ("gram", "randomized"):  # from steps that may soon be others
                    sync((self._group.store_path / derived).delete_dir())
                log = np.full(self._array("steps").shape, -1, np.int64)
                log[:keep] = self.store.steps[:keep]
                self._array("steps")[:] = log
            self._forget_arrays()
        self.store.refresh()
        self._row = keep

    def write_sparse(self, part: int, columns: np.ndarray, differences: np.ndarray, checksum: int) -> None:
        """Record a sparse part: ascending columns, non-zero bit differences, checksum of the bits after the update."""
        gaps, indptr = encode_columns(columns, self.store.layout.parts[part].numel)
        with self._writing():
            if len(gaps):
                self._array(f"updates/{part}/indices")[self._row, : len(gaps)] = gaps
                self._array(f"updates/{part}/data")[self._row, : len(gaps)] = differences
            self._array(f"updates/{part}/indptr")[self._row, :] = indptr
        self._checksums[part] = checksum
        self._missing.discard(part)

    def write_row(self, part: int, values: np.ndarray, checksum: int) -> None:
        """Record a dense part: float32 deltas or integer differences ``[numel]``, and the checksum of their bits."""
        self.append_row(part, self.encode_row(part, values))
        self.finish_row(part, checksum)

    def encode_row(self, part: int, values: np.ndarray) -> Encoded:
        """Encode the next values of a dense part, a multiple of ``store.row_chunk(part)`` or the last ones; on any thread."""
        found = self._direct(f"deltas/{part}")
        return [values.copy()] if found is None else found.encode(values)

    def append_row(self, part: int, chunks: Encoded) -> None:
        """Write values that ``encode_row`` has encoded, in order."""
        if part not in self._rows:
            found = self._direct(f"deltas/{part}")
            self._rows[part] = ZarrRow(self._array(f"deltas/{part}"), self._row) if found is None else found.open_row(self._row)
        with self._writing():
            self._rows[part].append(chunks)

    def finish_row(self, part: int, checksum: int) -> None:
        """Complete a dense part, whose bits have this checksum."""
        with self._writing():
            self._rows[part].close()
        del self._rows[part]
        self._checksums[part] = checksum
        self._missing.discard(part)

    def write_sketch(self, row: np.ndarray) -> None:
        """Keep the sketch of the step, ``[width]``, so that a recorder that resumes goes on with it."""
        with self._writing():
            if "sketches" not in self._group:
                shape, nothing = (self._array("steps").shape[0], len(row)), float("nan")
                create_array(self._group, "sketches", shape, np.float32, (1, len(row)), fill_value=nothing)
            self._set_row("sketches", row.astype(np.float32))

    def write_factors(self, part: int, bits: np.ndarray, checksum: int) -> None:
        """Record a part with factors: the raw bits of ``left`` and ``right``, flat, and their checksum."""
        with self._writing():
            self._array(f"factors/{part}")[self._row, :] = bits
        self._checksums[part] = checksum
        self._missing.discard(part)

    def commit(self, metrics: Mapping[str, float] | None = None, checksums: Mapping[int, int] | None = None) -> None:
        """Make the step visible to readers: everything before was invisible, and this is one atomic replacement.

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
                f"{self.store.path}: step {self._step} lacks parts {sorted(self._missing)}; write every part first"
            )
        with self._writing():
            self._set_row("checksums", self._checksums)
            self._write_metrics(metrics or {})
            self._set_entry("steps", self._step)
        self.store.add_step(self._step)
        self._row += 1

    def _write_metrics(self, metrics: Mapping[str, float]) -> None:
        """Every known metric gets a value or NaN: a killed writer may have left one in this row."""
        group, names = self._group["metrics"], self.store.metric_names()
        given: dict[str, float] = {}
        for metric, value in metrics.items():
            name = re.sub(r"[^a-z0-9_.-]", ".", metric.lower()).strip(".") or "metric"
            given.setdefault(name, value)
        for name in given:
            if name not in names:
                rows = self._array("steps").shape[0]
                nothing = float("nan")
                create_array(self._group, f"metrics/{name}", (rows,), "float64", (_METRIC_CHUNK,), fill_value=nothing)[:] = (
                    nothing
                )
                names.append(name)
                group.attrs.update({"names": names, "checksum": _json_checksum(names)})
        for name in names:
            self._set_entry(f"metrics/{name}", given.get(name, float("nan")))

    def _set_row(self, name: str, values: np.ndarray) -> None:
        """The step's row of an array ``[T, n]`` whose rows are one chunk each."""
        found = self._direct(name)
        if found is None or found.chunk != len(values):
            self._array(name)[self._row, :] = values
        else:
            found.write((self._row, 0), values)

    def _set_entry(self, name: str, value: float) -> None:
        """The step's entry of an array ``[T]``."""
        found = self._direct(name)
        if found is None:
            self._array(name)[self._row] = value
            return
        if name not in self._columns:
            self._columns[name] = np.asarray(self._array(name)[:])
        column, number = self._columns[name], self._row // found.chunk
        column[self._row] = value
        found.write((number,), column[number * found.chunk : (number + 1) * found.chunk])

    def _direct(self, name: str) -> ChunkFiles | None:
        files = self._chunk_files
        if name not in files:  # workers come here while another thread may begin a step and forget
            files = self._chunk_files | {name: chunk_files(self._array(name))}
            self._chunk_files = files
        return files[name]

    def _forget_arrays(self) -> None:
        self._arrays, self._columns, self._chunk_files = {}, {}, {}

    def _array(self, name: str) -> zarr.Array:
        arrays = self._arrays
        if name not in arrays:
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            arrays[name] = array.with_config(_WRITE_ALL)
        return arrays[name]

    def _per_step_arrays(self) -> list[str]:
        names = [f"metrics/{name}" for name in self.store.metric_names()]
        for part, spec in enumerate(self.store.layout.parts):
            if spec.encoding == "sparse":
                names += [f"updates/{part}/{leaf}" for leaf in ("indices", "data", "indptr")]
            elif spec.encoding == "factors":
                names.append(f"factors/{part}")
            elif spec.encoding != "fixed":
                names.append(f"deltas/{part}")
        return [*names, *(["sketches"] if "sketches" in self._group else []), "checksums", "steps"]

    def _reserve(self) -> None:
        """Make room for one more row; ``steps`` grows last, so its length never exceeds the others'."""
        if self._row < self._array("steps").shape[0]:
            return
        if self._row >= _LOG_CHUNK:
            raise StoreError(f"{self.store.path}: is full with {self._row} steps; import into a new store")
        with self._writing():
            for name in self._per_step_arrays():
                array = self._array(name)
                array.resize((2 * self._row, *array.shape[1:]))
        self._forget_arrays()

    def _discard_unfinished(self) -> None:
        """Delete what a crash or ``truncate`` left in the first uncommitted row, so that a rewrite never merges with it."""
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
                f"{self.store.path}: cannot be written ({error.strerror or error}); the {len(self.store.steps)} recorded "
                "steps are intact: free space and run the command again"
            ) from error


def create_store(
    path: str | Path,
    layout: Layout,
    read_base: Callable[[int, int, int], np.ndarray],
    *,
    files: Mapping[str, bytes],
    source: str,
    base: str,
    mantissa_bits: int | None,
    version: str,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a store without steps: layout, base weights, files. Killed half-way, the next call starts over.

    Args:
        read_base: ``(part, begin, end) -> bits`` of the base weights.
        source, base: where the checkpoints and the base came from, in words.

    Raises:
        StoreError: something is at ``path`` already, another process writes it, or the disk is full.
    """
    path = str(path)
    with WriterLock(path):
        _clear_for_creation(path)
        attributes: dict[str, Any] = {
            "format_version": _format_version(layout),
            "state": "creating",
            "relexkit_version": version,
            "source": source,
            "mantissa_bits": mantissa_bits,
            "layout": layout.to_json(),
            "files": sorted(files),
        }
        try:
            group = zarr.create_group(path, attributes={"relexkit": attributes})
            digest = _write_base(group, layout, read_base, progress)
            _create_empty_arrays(group, layout)
            for name, content in files.items():
                data = np.frombuffer(content, np.uint8)
                create_array(group, f"files/{name}", data.shape, "uint8", (max(1, len(data)),), codecs=_DENSE_CODECS)[:] = data
            attributes |= {"state": "ready", "base": {"description": base, "sha256": digest}}
            group.attrs["relexkit"] = attributes | {"checksum": _json_checksum(attributes)}
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be written ({error.strerror or error}); free space and run the command again"
            ) from error


def _format_version(layout: Layout) -> int:
    return FACTORS_FORMAT_VERSION if any(part.encoding == "factors" for part in layout.parts) else FORMAT_VERSION


def _write_base(
    group: zarr.Group,
    layout: Layout,
    read_base: Callable[[int, int, int], np.ndarray],
    progress: ProgressCallback | None,
) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hasher:
        for part, spec in enumerate(layout.parts):
            chunk = min(_BASE_CHUNK, max(1, spec.numel))
            shard = -(-min(_BASE_SHARD, max(1, spec.numel)) // chunk) * chunk
            array = create_array(
                group, f"base/{part}", (spec.numel,), bits_dtype(spec.dtype), (chunk,), shards=(shard,), codecs=_DENSE_CODECS
            )
            for begin in range(0, spec.numel, shard):
                end = min(begin + shard, spec.numel)
                bits = read_base(part, begin, end)
                hashed = hasher.submit(digest.update, bits.data.cast("B"))
                array[begin:end] = bits
                hashed.result()
            if progress:
                progress("writing the base", part + 1, len(layout.parts))
    return digest.hexdigest()


def base_sha256(layout: Layout, read_base: Callable[[int, int, int], np.ndarray]) -> str:
    """Content hash of base weights: sha256 of the raw little-endian bits of all parts in order. One pass."""
    digest = hashlib.sha256()
    for part, spec in enumerate(layout.parts):
        for begin, end in blocks(spec.numel):
            digest.update(read_base(part, begin, end).data.cast("B"))
    return digest.hexdigest()


def _create_empty_arrays(group: zarr.Group, layout: Layout) -> None:
    for part, spec in enumerate(layout.parts):
        bits = bits_dtype(spec.dtype)
        signed = np.dtype(f"int{bits.itemsize * 8}")
        if spec.encoding == "sparse":
            entries = min(_ENTRY_CHUNK, max(1, spec.numel))
            shards = (1, -(-max(1, spec.numel) // entries) * entries)
            shape = (_ROWS, spec.numel)
            for leaf, dtype, fill in (("indices", np.uint16, _UNWRITTEN_GAP), ("data", signed, 0)):
                name = f"updates/{part}/{leaf}"
                create_array(group, name, shape, dtype, (1, entries), shards=shards, codecs=_SPARSE_CODECS, fill_value=fill)
            shape = (_ROWS, num_blocks(spec.numel) + 1)
            create_array(group, f"updates/{part}/indptr", shape, "uint32", (1, shape[1]), fill_value=_UNWRITTEN_INDPTR)
        elif spec.factors is not None:
            numel, bits = spec.factors.numel, bits_dtype(spec.factors.dtype)
            chunk = min(_ROW_CHUNK, max(1, numel))
            create_array(
                group, f"factors/{part}", (_ROWS, numel), bits, (1, chunk), shards=(1, -(-max(1, numel) // chunk) * chunk),
                codecs=_DENSE_CODECS, fill_value=int(np.iinfo(bits).max),
            )  # fmt: skip
        elif spec.encoding != "fixed":
            chunk = min(_ROW_CHUNK, max(1, spec.numel))
            is_float = spec.encoding == "float"
            create_array(
                group, f"deltas/{part}", (_ROWS, spec.numel), np.float32 if is_float else signed, (1, chunk),
                shards=(1, -(-max(1, spec.numel) // chunk) * chunk), codecs=_DENSE_CODECS,
                fill_value=float("nan") if is_float else _UNWRITTEN_INTEGER,
            )  # fmt: skip
    group.create_group("metrics", attributes={"names": [], "checksum": _json_checksum([])})
    create_array(group, "checksums", (_ROWS, max(1, len(layout.parts))), "uint32", (1, max(1, len(layout.parts))))
    create_array(group, "steps", (_ROWS,), "int64", (_LOG_CHUNK,), fill_value=-1)[:] = -1


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    chunks: tuple[int, ...],
    *,
    shards: tuple[int, ...] | None = None,
    codecs: Iterable[Any] = _SPARSE_CODECS,
    fill_value: float = 0,
) -> zarr.Array:
    """Create an array whose every chunk is written and carries a checksum; replaces what is there."""
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=list(codecs),
        fill_value=fill_value,
        config=_WRITE_ALL,
        overwrite=True,
    )


def blocks(numel: int, size: int = CHECKSUM_BLOCK) -> Iterator[tuple[int, int]]:
    """Consecutive ``(begin, end)`` that cover ``numel`` columns in pieces of ``size`` (a multiple of ``BLOCK``)."""
    return stretches((0, numel), size)


def stretches(span: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ``(begin, end)`` that cover ``span`` in pieces of ``size``."""
    for begin in range(*span, size):
        yield begin, min(begin + size, span[1])


def column_windows(entries: np.ndarray, numel: int, most_entries: int, most_columns: int) -> Iterator[tuple[int, int]]:
    """Cut ``numel`` columns between blocks so that no window has more entries or columns (but at least one block).

    ``entries`` counts the entries of each block over all steps.
    """
    first, filled = 0, 0
    for block, count in enumerate(entries):
        if block > first and (filled + count > most_entries or (block + 1 - first) * BLOCK > most_columns):
            yield first * BLOCK, block * BLOCK
            first, filled = block, 0
        filled += int(count)
    if numel:
        yield first * BLOCK, numel


def describe_steps(steps: np.ndarray) -> str:
    """Steps in words: ``40 steps from 1 to 40``."""
    if not len(steps):
        return "no steps"
    if len(steps) == 1:
        return f"only step {steps[0]}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


class NotAStoreError(StoreError):
    """Something else is there, or nothing."""


class _CreationInterrupted(NotAStoreError):
    """A store that a killed writer has not finished creating."""


def _open_group(path: str) -> zarr.Group:
    if "://" not in path and not os.path.isdir(path):
        raise NotAStoreError(f"{path}: no such store; expected a folder written by `relexkit import`")
    try:
        return zarr.open_group(path, mode="r")
    except ImportError as error:
        raise StoreError(f"{path}: cannot be opened ({error}); install the fsspec package for it, such as s3fs") from error
    except FileNotFoundError:
        raise NotAStoreError(f"{path}: is not a trajectory store; expected a folder written by `relexkit import`") from None
    except Exception as error:
        raise StoreError(f"{path}: is not a readable Zarr group ({error}); restore the store from a copy") from error


def _relexkit_attributes(group: zarr.Group, path: str) -> dict[str, Any]:
    attributes = dict(group.attrs).get("relexkit")
    if not isinstance(attributes, dict) or "format_version" not in attributes:
        raise NotAStoreError(f"{path}: is a Zarr group but not a trajectory store; expected one written by `relexkit import`")
    if attributes["format_version"] not in (FORMAT_VERSION, FACTORS_FORMAT_VERSION):
        raise StoreError(
            f"{path}: has format version {attributes['format_version']!r}; this relexkit reads versions {FORMAT_VERSION} "
            f"and {FACTORS_FORMAT_VERSION}: install the release that wrote it"
        )
    if attributes.get("state") != "ready":
        raise _CreationInterrupted(f"{path}: its creation was interrupted; run the same `relexkit import` again")
    content = {key: value for key, value in attributes.items() if key != "checksum"}
    if attributes.get("checksum") != _json_checksum(content):
        raise StoreError(f"{path}: its description (zarr.json) is damaged; restore the store from a copy")
    return content


def _json_checksum(document: Any) -> int:
    return google_crc32c.value(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def _clear_for_creation(path: str) -> None:
    """Remove an interrupted creation; refuse anything else that is there."""
    if "://" in path:
        _clear_remote(path)
        return
    if not os.path.lexists(path):
        return
    folder = Path(path)
    if not folder.is_dir():
        raise StoreError(f"{path}: exists and is not a folder; choose another -o")
    if all(p.name.endswith(".partial") for p in folder.iterdir()):
        return  # empty, or killed while the very first file was written
    try:
        _relexkit_attributes(_open_group(path), path)
    except _CreationInterrupted:
        for child in folder.iterdir():  # zarr.json goes last: it says what this is
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != "zarr.json":
                child.unlink()
        (folder / "zarr.json").unlink()
        return
    except NotAStoreError:
        raise StoreError(f"{path}: exists and is not a trajectory store; choose another -o") from None
    raise StoreError(f"{path}: a store exists there; choose another -o")


def _clear_remote(path: str) -> None:
    """``_clear_for_creation`` of a URL. What an object store cannot do at once is done in the same order."""
    try:
        found = _open_group(path)
    except NotAStoreError:
        return
    try:
        _relexkit_attributes(found, path)
    except _CreationInterrupted:
        writable = zarr.open_group(path, mode="r+")
        for name in list(writable.keys()):
            sync((writable.store_path / name).delete_dir())
        sync((writable.store_path / "zarr.json").delete())  # last: it says what this is
        return
    except NotAStoreError:
        raise StoreError(f"{path}: exists and is not a trajectory store; choose another -o") from None
    raise StoreError(f"{path}: a store exists there; choose another -o")


class WriterLock(contextlib.AbstractContextManager):
    """The writer's lock: ``flock`` on a file beside the store, which names its owner and vanishes with the process."""

    def __init__(self, path: str):
        self._file = None
        if "://" in path:
            return  # object stores have no locks; one writer is then the user's promise
        lock_path = os.path.realpath(path) + ".lock"  # one lock, whatever the spelling of the path
        try:
            Path(lock_path).parent.mkdir(parents=True, exist_ok=True)
            while True:
                fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
                file = os.fdopen(fd, "r+")  # held until close()
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    owner = file.read().strip() or "another process"
                    file.close()
                    raise StoreError(f"{path}: is being written by {owner}; wait until it ends") from None
                if os.path.exists(lock_path) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                    break
                file.close()  # its owner removed it between our open and our lock
            file.truncate(0)
            user = os.environ.get("USER") or f"user {os.getuid()}"
            file.write(f"process {os.getpid()} of {user} on {socket.gethostname()}")
            file.flush()
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be locked for writing ({error.strerror or error}); expected a writable place on a file "
                "system with locks: choose another -o"
            ) from error
        self._file, self._path = file, lock_path

    def close(self) -> None:
        """Release the lock and remove its file."""
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._file.close()
            self._file = None

    def __exit__(self, *_: object) -> None:
        self.close()
