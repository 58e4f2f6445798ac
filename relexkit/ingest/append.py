"""One step into a store: weights read in blocks, checked, differenced, encoded and committed in the
background.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from relexkit.checkpoints import ChangingCheckpoint, Checkpoint
from relexkit.checkpoints.same_tensors import check_factors, check_tensors, factors_in
from relexkit.checkpoints.tied import equal_tensors
from relexkit.errors import CheckpointError, StoreError
from relexkit.geometry.sketch import Sketch
from relexkit.ingest.columns import Columns
from relexkit.ingest.write_queue import WriteQueue
from relexkit.processes import cores
from relexkit.store import StoreWriter, blocks
from relexkit.store.encodings.bits import (
    CHECKSUM_BLOCK,
    Update,
    block_checksums,
    content_checksum,
)
from relexkit.store.passes import in_order
from relexkit.weights.dtypes import bits_dtype, nonfinite_index

_S = TypeVar("_S")
_T = TypeVar("_T")

_WORKER_BYTES = 2**25  # at least what a worker holds of a step in which every weight changes
_QUEUE_BYTES = 2**24  # encoded but not yet written; a larger array waits until the queue is empty


class Appender:
    """Encodes checkpoints against the previous step (parts that are a log) or the base (the others)
    and commits them.

    Reference weights stay in memory up to the budget, whole parts at a time; beyond it they are
    read again: the previous step from its checkpoint (or replayed from the store, after a restart),
    the base from its folder. Checkpoints that know what changed need none for a log.

    Writing goes on in the background, in order, so a step is committed while the next one is read.

    Args:
        base: the base checkpoint, or None to read the base from the store.
        owned: the parts that this process writes; all if not given. Of several processes that write
            one step, one commits.
        still: tensors that no step of this run moves; parts of nothing else are not read.
        sketch: also sketch the deltas of parts that are encoded as such, into ``sketch_row``.

    Attributes:
        sketched: the parts that ``sketch_row`` has.
        still: parts of nothing that moves -> the checksum of their content, once it is known.
    """

    def __init__(
        self,
        writer: StoreWriter,
        base: Checkpoint | None,
        memory_budget_bytes: int,
        *,
        owned: Collection[int] | None = None,
        still: Collection[str] = (),
        sketch: Sketch | None = None,
    ):
        self.writer, self._store, self._budget = writer, writer.store, memory_budget_bytes
        self._layout = writer.store.layout
        self._base = None if base is None else Columns(base, self._layout, "the base")
        self.sketch, self.sketch_row = sketch, np.empty(0)
        self.sketched: set[int] = set()
        self._owned = range(len(self._layout.parts)) if owned is None else sorted(owned)
        self.still: dict[int, int | None] = {
            part: None for part in self._owned if self._all_in(part, still)
        }
        self._previous: Columns | None = None
        self._last_step = int(self._store.steps[-1]) if len(self._store.steps) else 0
        self._kept: dict[int, np.ndarray] | None = None
        self._workers = max(1, min(cores(), memory_budget_bytes // _WORKER_BYTES))
        self._pool = ThreadPoolExecutor(self._workers)
        self.queue = WriteQueue(_QUEUE_BYTES)
        self._failed = False
        self._scratch = threading.local()

    def close(self) -> None:
        """Finish what is being written, stop the workers and close the last checkpoint.

        Raises:
            StoreError: the last writes failed.
        """
        try:
            self.queue.close()
        finally:
            self._pool.shutdown()
            if self._previous is not None:
                self._previous.checkpoint.close()

    def finish(self) -> None:
        """Wait until all that was appended is written.

        Raises:
            StoreError: a write failed.
        """
        self.queue.finish()

    def append(self, step: int, checkpoint: Checkpoint) -> None:
        """Record one checkpoint; it is closed when the next one is done. After a failure nothing is
        recorded any more.
        """
        try:
            checkpoint.check_trained()
        except CheckpointError as error:
            raise CheckpointError(f"step {step}: {error}") from None
        self.queue.put(self.writer.begin, step)
        self.write_parts(step, checkpoint)
        self.queue.put(self.writer.commit, checkpoint.metrics())
        if self._previous is not None:
            self._previous.checkpoint.close()
        self._previous = Columns(checkpoint, self._layout, "the previous step")
        self._last_step = step

    def write_parts(self, step: int, checkpoint: Checkpoint) -> None:
        """Encode the owned parts of a checkpoint and let the background write them, between
        ``begin`` and ``commit``.
        """
        if self._failed:  # the reference may hold some of the weights of the step that failed
            raise StoreError(
                f"{self._store.path}: takes no step {step} since the one before could not be"
                " recorded; run the command again"
            )
        self._failed = True
        self._check(checkpoint, f"step {step}")
        if self._kept is None:
            self._kept = self._references(isinstance(checkpoint, ChangingCheckpoint))
        if self.sketch is not None:
            self.sketch_row = np.zeros(self.sketch.width)
        columns = Columns(checkpoint, self._layout, f"step {step}")
        for part in self._owned:
            self._store.encoding(part).append(_PartOfStep(self, part, columns))
        self._failed = False

    def _check(self, checkpoint: Checkpoint, where: str) -> None:
        expected = {t.name: (t.shape, t.dtype) for t in self._layout.tensors}
        check_tensors(expected, checkpoint, f"the store {self._store.path}", where)
        check_factors(factors_in(self._layout), checkpoint, where)
        owners = {t.name: t.part for t in self._layout.tensors}
        for tensor in self._layout.tensors:
            if not tensor.tied_to or owners[tensor.tied_to] not in self._owned:
                continue
            if not equal_tensors(checkpoint, tensor.name, tensor.tied_to):
                raise CheckpointError(
                    f"{where}: tensors {tensor.name!r} and {tensor.tied_to!r} differ but were tied"
                    " so far; import into a new store"
                )

    # -- references --------------------------------------------------------------------------------

    def _references(self, changing: bool) -> dict[int, np.ndarray]:
        """Those that are kept in memory, by part."""
        kept, remaining = {}, self._budget
        for part in self._owned:
            spec = self._layout.parts[part]
            size = spec.numel * bits_dtype(spec.dtype).itemsize
            compared = spec.moves and spec.factors is None and part not in self.still
            if compared and not (changing and self._is_log(part)) and size <= remaining:
                remaining -= size
                kept[part] = self._initial_reference(part, 0, spec.numel)
        return kept

    def _initial_reference(self, part: int, begin: int, end: int) -> np.ndarray:
        if self._is_log(part) and len(self._store.steps):
            return self._store.read_state(part, len(self._store.steps) - 1, begin, end)
        return self.base(part, begin, end)

    def base(self, part: int, begin: int, end: int) -> np.ndarray:
        """Bits of the base."""
        source = self._store.read_base if self._base is None else self._base.read
        return source(part, begin, end)

    def reference(self, part: int, begin: int, end: int) -> np.ndarray:
        """Bits that a part of the next step is compared with."""
        assert self._kept is not None
        if part in self._kept:
            return self._kept[part][begin:end]
        if self._is_log(part) and self._previous is not None:
            return self._previous.read(part, begin, end)
        return self._initial_reference(part, begin, end)

    def note(self, part: int, columns: np.ndarray, after: np.ndarray) -> None:
        """Of a log: what the step after the next one is compared with."""
        assert self._kept is not None
        if part in self._kept:
            self._kept[part][columns] = after

    def knows(self, since: int | None, part: int) -> bool:
        """Whether changes since a step are those since the last one, and nothing is compared."""
        return since == self._last_step and part not in (self._kept or ())

    def _is_log(self, part: int) -> bool:
        return self._store.encoding(part).is_log

    def _all_in(self, part: int, names: Collection[str]) -> bool:
        inside = self._layout.segments_in(part)
        return bool(inside) and self._is_log(part) and all(s.tensor.name in names for s in inside)

    # -- work --------------------------------------------------------------------------------------

    def buffer(self, part: int, numel: int) -> np.ndarray:
        """The thread's own: fresh pages cost as much as reading."""
        bits = bits_dtype(self._layout.parts[part].dtype)
        buffers: dict[np.dtype, np.ndarray] = self._scratch.__dict__.setdefault("buffers", {})
        if bits not in buffers:
            buffers[bits] = np.empty(CHECKSUM_BLOCK, bits)
        return buffers[bits][:numel]

    def in_order(self, work: Callable[[_S], _T], spans: Iterable[_S]) -> Iterator[_T]:
        """Results of the workers, who are each at most one piece of work ahead."""
        return in_order(self._pool, work, spans, self._workers)


class _PartOfStep:
    """See ``relexkit.store.encodings.protocol.PartOfStep``."""

    def __init__(self, appender: Appender, part: int, columns: Columns):
        self._appender, self._columns = appender, columns
        self._writer, self._queue = appender.writer, appender.queue
        self.part, self.spec = part, columns.layout.parts[part]
        self.arrays = self._writer.arrays
        self.mantissa_bits = self._writer.store.mantissa_bits
        self.in_order = appender.in_order

    def weights(self, begin: int, end: int) -> np.ndarray:
        buffer = self._appender.buffer(self.part, end - begin)
        return self._columns.read(self.part, begin, end, buffer)

    def reference(self, begin: int, end: int) -> np.ndarray:
        return self._appender.reference(self.part, begin, end)

    def note(self, begin: int, columns: np.ndarray, after: np.ndarray) -> None:
        self._appender.note(self.part, begin + columns, after)

    def changes(self) -> Update | None:
        """Nothing where no step moves anything; else what the checkpoint knows."""
        bits = bits_dtype(self.spec.dtype)
        at, differences = [np.empty(0, np.int32)], [np.empty(0, bits)]
        if self.part not in self._appender.still:
            checkpoint = self._columns.checkpoint
            if not isinstance(checkpoint, ChangingCheckpoint):
                return None
            if not self._appender.knows(checkpoint.since, self.part):
                return None
            for segment in self._columns.layout.segments_in(self.part):
                elements, before, after = checkpoint.changed(segment.tensor.name)
                end = segment.start + segment.numel
                low, high = np.searchsorted(elements, (segment.start, end))
                inside = elements[low:high] + (segment.offset - segment.start)
                self.refuse_nonfinite(after[low:high], inside, self.spec.dtype)
                at.append(inside.astype(np.int32))
                differences.append(after[low:high] - before[low:high])
        signed = f"int{bits.itemsize * 8}"
        return np.concatenate(at), np.concatenate(differences).view(signed)

    def checksum(self) -> int:
        """Of a part that does not move it is taken once, from the base."""
        still = self._appender.still
        known = still.get(self.part)
        if known is not None:
            return known

        def content(span: tuple[int, int]) -> list[int]:
            base = self.part in still
            return block_checksums(
                self._appender.base(self.part, *span) if base else self.weights(*span)
            )

        pieces = self.in_order(content, blocks(self.spec.numel))
        checksum = content_checksum([value for piece in pieces for value in piece])
        if self.part in still:
            still[self.part] = checksum
        return checksum

    def factor_bits(self) -> np.ndarray:
        return self._columns.content(self.part, 0, self.spec.numel)

    def refuse_nonfinite(
        self, bits: np.ndarray, columns: Sequence[int] | np.ndarray, dtype: str
    ) -> None:
        bad = nonfinite_index(bits, dtype)
        if bad is not None:
            self._columns.refuse_nonfinite(self.part, int(columns[bad]))

    def name(self, column: int) -> str:
        return self._columns.name(self.part, column)

    def sketch(self, begin: int, delta: np.ndarray) -> np.ndarray | None:
        sketch = self._appender.sketch
        if sketch is None:
            return None
        self._appender.sketched.add(self.part)
        return sketch.row(
            (s.tensor.name, s.start, delta[s.offset - begin : s.offset - begin + s.numel])
            for s in self._columns.layout.segments_in(self.part, begin, begin + len(delta))
        )

    def add_sketch(self, sketch: np.ndarray | None) -> None:
        if sketch is not None:
            self._appender.sketch_row += sketch

    def put(self, *piece: Any) -> None:
        self._queue.put(self._writer.append, self.part, *piece)

    def finish(self, checksum: int) -> None:
        self._queue.put(self._writer.finish, self.part, checksum)
