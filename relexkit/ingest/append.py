"""One step into a store: weights read in blocks, checked, differenced, encoded and committed in the
background.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from relexkit.checkpoints import ChangingCheckpoint, Checkpoint
from relexkit.checkpoints.formats.peft import AdaptedCheckpoint
from relexkit.checkpoints.same_tensors import check_factors, check_tensors, factors_in
from relexkit.checkpoints.tied import equal_tensors
from relexkit.errors import CheckpointError, StoreError
from relexkit.geometry.sketch import Sketch
from relexkit.ingest.write_queue import WriteQueue
from relexkit.store import Encoded, StoreWriter, blocks, stretches
from relexkit.store.encodings.bits import (
    CHECKSUM_BLOCK,
    block_checksums,
    changed_columns,
    content_checksum,
    encode_update,
    extend_checksum,
)
from relexkit.weights.dtypes import (
    bits_dtype,
    nonfinite_index,
    round_to_mantissa_bits,
    to_float32,
    widen_bits,
)
from relexkit.weights.layout import Layout, Part

_S = TypeVar("_S")
_T = TypeVar("_T")

_WORKERS = min(4, os.cpu_count() or 1)
_STRETCH = (
    2**20
)  # elements of a dense part that are read and differenced at a time: a chunk of the base
_LARGE = np.float32(2.0**127)  # rounding takes no smaller number beyond the largest
_QUEUE_BYTES = 2**24  # encoded but not yet written; a larger array waits until the queue is empty


def base_reader(base: Checkpoint, layout: Layout) -> Callable[[int, int, int], np.ndarray]:
    """``(part, begin, end) -> bits`` of the base, widened to the dtype of the steps and checked to
    be finite.
    """

    def read(part: int, begin: int, end: int) -> np.ndarray:
        bits = read_columns(base, layout, part, begin, end, "the base")
        if layout.parts[part].encoding != "fixed":
            bad = nonfinite_index(bits, layout.parts[part].dtype)
            if bad is not None:
                segment = layout.segments_in(part, begin + bad)[0]
                raise CheckpointError(
                    nonfinite_message("the base", segment.tensor.name, segment.start)
                )
        return bits

    return read


def read_columns(
    checkpoint: Checkpoint,
    layout: Layout,
    part: int,
    begin: int,
    end: int,
    where: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Bits of columns ``begin:end`` of a part, from a checkpoint, widened to the part's dtype; into
    ``out`` if given.
    """
    if out is None:
        out = np.empty(end - begin, bits_dtype(layout.parts[part].dtype))
    for segment in layout.segments_in(part, begin, end):
        name, stored = segment.tensor.name, checkpoint.tensors[segment.tensor.name].dtype
        target = out[segment.offset - begin : segment.offset - begin + segment.numel]
        if stored == segment.tensor.dtype:
            _read(checkpoint, name, segment.start, target, where)
        else:
            raw = np.empty(segment.numel, bits_dtype(stored))
            _read(checkpoint, name, segment.start, raw, where)
            target[:] = widen_bits(raw, stored, segment.tensor.dtype)
    return out


def _read(checkpoint: Checkpoint, name: str, start: int, out: np.ndarray, where: str) -> None:
    try:
        checkpoint.read_into(name, start, out)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except OSError as error:
        raise CheckpointError(
            f"{where}: tensor {name!r} cannot be read ({error.strerror or error})"
        ) from None


def nonfinite_message(where: str, name: str, index: int) -> str:
    """What to say of a weight that is not finite."""
    return (
        f"{where}: tensor {name!r} is NaN or infinite at element {index}; expected finite weights: "
        "the run diverged or the file is damaged; leave the step out with --steps"
    )


class Appender:
    """Encodes checkpoints against the previous step (sparse parts) or the base (dense parts) and
    commits them.

    Reference weights stay in memory up to the budget, whole parts at a time; beyond it they are
    read again: the previous step from its checkpoint (or replayed from the store, after a restart),
    the base from its folder.

    Writing goes on in the background, in order, so a step is committed while the next one is read.

    Args:
        base: the base checkpoint, or None to read the base from the store.
        owned: the parts that this process writes; all if not given. Of several processes that write
            one step, one commits.
        still: tensors that no step of this run moves; parts of nothing else are not read.
        sketch: also sketch the deltas of parts with float deltas, into ``sketch_row``.
        changing: the checkpoints know what changed, so sparse parts need no reference weights.
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
        changing: bool = False,
    ):
        self._sketch = sketch
        self.sketch_row = np.empty(0)
        self._writer, self._store, self._base = writer, writer.store, base
        self._owned = range(len(self._store.layout.parts)) if owned is None else sorted(owned)
        self._layout = writer.store.layout
        self._still: dict[int, int | None] = {
            part: None for part in self._owned if self._all_in(part, still)
        }
        self._previous: Checkpoint | None = None
        self._last_step = int(self._store.steps[-1]) if len(self._store.steps) else 0
        self._kept: dict[int, np.ndarray] = {}
        remaining = memory_budget_bytes
        for part in self._owned:
            spec = self._layout.parts[part]
            size = spec.numel * bits_dtype(spec.dtype).itemsize
            if (
                spec.encoding not in ("fixed", "factors", *(("sparse",) if changing else ()))
                and part not in self._still
                and size <= remaining
            ):
                remaining -= size
                self._kept[part] = self._initial_reference(part, 0, spec.numel)
        self._pool = ThreadPoolExecutor(_WORKERS)
        self._queue = WriteQueue(_QUEUE_BYTES)
        self._failed = False
        self._scratch = threading.local()

    def close(self) -> None:
        """Finish what is being written, stop the workers and close the last checkpoint.

        Raises:
            StoreError: the last writes failed.
        """
        try:
            self._queue.close()
        finally:
            self._pool.shutdown()
            if self._previous is not None:
                self._previous.close()

    def finish(self) -> None:
        """Wait until all that was appended is written.

        Raises:
            StoreError: a write failed.
        """
        self._queue.finish()

    def append(self, step: int, checkpoint: Checkpoint) -> None:
        """Record one checkpoint; it is closed when the next one is done. After a failure nothing is
        recorded any more.
        """
        if isinstance(checkpoint, AdaptedCheckpoint):
            try:
                checkpoint.refuse_zero()
            except CheckpointError as error:
                raise CheckpointError(f"step {step}: {error}") from None
        self._queue.put(self._writer.begin, step)
        self.write_parts(step, checkpoint)
        self._queue.put(self._writer.commit, checkpoint.metrics())
        if self._previous is not None:
            self._previous.close()
        self._previous, self._last_step = checkpoint, step

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
        self._write_parts(step, checkpoint)
        self._failed = False

    def _write_parts(self, step: int, checkpoint: Checkpoint) -> None:
        where = f"step {step}"
        expected = {t.name: (t.shape, t.dtype) for t in self._layout.tensors}
        check_tensors(expected, checkpoint, f"the store {self._store.path}", where)
        if self._sketch is not None:
            self.sketch_row = np.zeros(self._sketch.width)
        check_factors(factors_in(self._layout), checkpoint, where)
        for tensor in self._layout.tensors:
            if tensor.tied_to and not equal_tensors(checkpoint, tensor.name, tensor.tied_to):
                raise CheckpointError(
                    f"{where}: tensors {tensor.name!r} and {tensor.tied_to!r} differ but were tied"
                    " so far; import into a new store"
                )
        for part in self._owned:
            spec = self._layout.parts[part]
            if part in self._still:
                self._append_still(part)
            elif spec.encoding == "factors":
                self._append_factors(part, checkpoint)
            elif spec.encoding == "sparse":
                if isinstance(checkpoint, ChangingCheckpoint) and (
                    checkpoint.since == self._last_step and part not in self._kept
                ):
                    self._append_changes(part, checkpoint, where)
                else:
                    self._append_sparse(part, checkpoint, where)
            elif spec.encoding == "fixed":
                self._check_fixed(part, checkpoint, where)
            else:
                self._append_row(part, spec, checkpoint, where)

    def _initial_reference(self, part: int, begin: int, end: int) -> np.ndarray:
        if self._layout.parts[part].encoding == "sparse" and len(self._store.steps):
            return self._store.read_state(part, len(self._store.steps) - 1, begin, end)
        return self._base_columns(part, begin, end)

    def _base_columns(self, part: int, begin: int, end: int) -> np.ndarray:
        if self._base is None:
            return self._store.read_base(part, begin, end)
        return read_columns(self._base, self._layout, part, begin, end, "the base")

    def _reference(self, part: int, begin: int, end: int) -> np.ndarray:
        if part in self._kept:
            return self._kept[part][begin:end]
        if self._layout.parts[part].encoding == "sparse" and self._previous is not None:
            return read_columns(self._previous, self._layout, part, begin, end, "the previous step")
        return self._initial_reference(part, begin, end)

    def _read(
        self, checkpoint: Checkpoint, part: int, begin: int, end: int, where: str
    ) -> np.ndarray:
        """Columns of a checkpoint in the thread's own buffer, good until its next call: fresh pages
        cost as much as reading.
        """
        bits = bits_dtype(self._layout.parts[part].dtype)
        buffers: dict[np.dtype, np.ndarray] = self._scratch.__dict__.setdefault("buffers", {})
        if bits not in buffers:
            buffers[bits] = np.empty(CHECKSUM_BLOCK, bits)
        return read_columns(
            checkpoint, self._layout, part, begin, end, where, buffers[bits][: end - begin]
        )

    def _append_sparse(self, part: int, checkpoint: Checkpoint, where: str) -> None:
        spec = self._layout.parts[part]
        signed = np.dtype(f"int{bits_dtype(spec.dtype).itemsize * 8}")

        def encode(span: tuple[int, int]) -> tuple[tuple[np.ndarray, ...], list[int]]:
            begin, end = span
            current = self._read(checkpoint, part, begin, end, where)
            reference = self._reference(part, begin, end)
            columns = changed_columns(reference, current)
            after = current[columns]
            self._refuse_nonfinite(part, after, begin + columns, where, spec.dtype)
            differences = (after - reference[columns]).view(signed)
            if part in self._kept:
                reference[columns] = after
            return encode_update(columns, differences, end - begin), block_checksums(current)

        checksums: list[int] = []
        for update, checksum in self._in_order(encode, blocks(spec.numel)):
            self._queue.put(self._writer.append_update, part, *update)
            checksums += checksum
        self._queue.put(self._writer.finish_update, part, content_checksum(checksums))

    def _append_changes(self, part: int, checkpoint: ChangingCheckpoint, where: str) -> None:
        """The update of a sparse part from what the checkpoint knows; its content is read for the
        checksum only.
        """
        columns, differences = [], []
        for segment in self._layout.segments_in(part):
            elements, before, after = checkpoint.changed(segment.tensor.name)
            low, high = np.searchsorted(elements, (segment.start, segment.start + segment.numel))
            at = elements[low:high] + (segment.offset - segment.start)
            self._refuse_nonfinite(part, after[low:high], at, where, self._layout.parts[part].dtype)
            columns.append(at.astype(np.int32))
            differences.append(after[low:high] - before[low:high])

        def content(span: tuple[int, int]) -> list[int]:
            return block_checksums(self._read(checkpoint, part, *span, where))

        spans = blocks(self._layout.parts[part].numel)
        checksums = [value for found in self._pool.map(content, spans) for value in found]
        bits = bits_dtype(self._layout.parts[part].dtype)
        self._queue.put(
            self._writer.write_sparse,
            part,
            np.concatenate([np.empty(0, np.int32), *columns]),
            np.concatenate([np.empty(0, bits), *differences]).view(f"int{bits.itemsize * 8}"),
            content_checksum(checksums),
        )

    def _all_in(self, part: int, names: Collection[str]) -> bool:
        inside = self._layout.segments_in(part)
        return (
            bool(inside)
            and self._layout.parts[part].encoding == "sparse"
            and all(s.tensor.name in names for s in inside)
        )

    def _append_still(self, part: int) -> None:
        """An empty update; the content is that of the base, whose checksum is taken once."""
        spec = self._layout.parts[part]
        checksum = self._still[part]
        if checksum is None:
            contents = [
                v
                for begin, end in blocks(spec.numel)
                for v in block_checksums(self._base_columns(part, begin, end))
            ]
            checksum = self._still[part] = content_checksum(contents)
        nothing = np.empty(0, f"int{bits_dtype(spec.dtype).itemsize * 8}")
        self._queue.put(self._writer.write_sparse, part, np.empty(0, np.int32), nothing, checksum)

    def _append_factors(self, part: int, checkpoint: Any) -> None:
        bits = checkpoint.factor_bits(self._layout.segments_in(part)[0].tensor.name)
        self._queue.put(
            self._writer.write_factors, part, bits, content_checksum(block_checksums(bits))
        )

    def _append_row(self, part: int, spec: Part, checkpoint: Checkpoint, where: str) -> None:
        """A dense part, in stretches that are read, differenced, checked and encoded by the workers
        and written in order.
        """
        is_float = spec.encoding == "float"

        def encode(span: tuple[int, int]) -> tuple[Encoded, int, np.ndarray | None]:
            chunks: Encoded = []
            checksum, sketch = 0, None
            for begin, end in stretches(span, _STRETCH):
                current = self._read(checkpoint, part, begin, end, where)
                reference = self._reference(part, begin, end)
                if is_float:
                    row = self._float_delta(part, current, reference, begin, where)
                    if self._sketch is not None:
                        found = self._sketch.row(self._segments(part, begin, row))
                        sketch = found if sketch is None else sketch + found
                else:
                    self._refuse_nonfinite(part, current, range(begin, end), where, spec.dtype)
                    row = (current - reference).view(f"int{current.itemsize * 8}")
                for low, high in stretches((0, end - begin), self._store.row_chunk(part)):
                    piece = row[low:high]
                    if is_float:
                        self._round(part, piece, begin + low, where)
                    checksum = extend_checksum(checksum, piece)
                    chunks += self._writer.encode_row(part, piece)
            return chunks, checksum, sketch

        checksums = []
        for chunks, checksum, sketch in self._in_order(encode, blocks(spec.numel)):
            self._queue.put(self._writer.append_row, part, chunks)
            checksums.append(checksum)
            if sketch is not None:
                self.sketch_row += sketch
        self._queue.put(self._writer.finish_row, part, content_checksum(checksums))

    def _in_order(self, encode: Callable[[_S], _T], spans: Iterable[_S]) -> Iterator[_T]:
        """Results of the workers, who are never ahead by more than one piece of work each."""
        ahead: deque[Future[_T]] = deque()
        for span in spans:
            ahead.append(self._pool.submit(encode, span))
            if len(ahead) > _WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _float_delta(
        self, part: int, current: np.ndarray, reference: np.ndarray, begin: int, where: str
    ) -> np.ndarray:
        """Float32 delta of two arrays of bits, in place of ``current`` if that has room, checked to
        be finite.
        """
        dtype = self._layout.parts[part].dtype
        room = current.view(np.float32) if dtype == "float32" else None
        with np.errstate(over="ignore", invalid="ignore"):
            delta = np.subtract(to_float32(current, dtype), to_float32(reference, dtype), out=room)
        if not (delta.min() > -_LARGE and delta.max() < _LARGE):  # also if one is NaN
            self._refuse_nonfinite(
                part, delta.view(np.uint32), range(begin, begin + len(delta)), where, "float32"
            )
        return delta

    def _round(self, part: int, piece: np.ndarray, begin: int, where: str) -> None:
        """Round finite deltas in place to the store's mantissa bits."""
        large = not (piece.min() > -_LARGE and piece.max() < _LARGE)
        round_to_mantissa_bits(piece, self._store.mantissa_bits or 23)
        if large:
            self._refuse_nonfinite(
                part, piece.view(np.uint32), range(begin, begin + len(piece)), where, "float32"
            )

    def _segments(
        self, part: int, begin: int, row: np.ndarray
    ) -> Iterator[tuple[str, int, np.ndarray]]:
        """Pieces of tensors in ``row``, the columns from ``begin`` on, as a sketch takes them."""
        for segment in self._layout.segments_in(part, begin, begin + len(row)):
            low = segment.offset - begin
            yield segment.tensor.name, segment.start, row[low : low + segment.numel]

    def _check_fixed(self, part: int, checkpoint: Checkpoint, where: str) -> None:
        for begin, end in blocks(self._layout.parts[part].numel):
            current = read_columns(checkpoint, self._layout, part, begin, end, where)
            base = self._base_columns(part, begin, end)
            if not np.array_equal(current, base):
                at = begin + int((current != base).argmax())
                name = self._layout.segments_in(part, at)[0].tensor.name
                raise CheckpointError(
                    f"{where}: tensor {name!r} is not float and differs from the base; "
                    "expected integer and boolean tensors to stay the same in all steps: --exclude"
                    " keeps the base's values"
                )

    def _refuse_nonfinite(
        self,
        part: int,
        bits: np.ndarray,
        columns: Sequence[int] | np.ndarray,
        where: str,
        dtype: str,
    ) -> None:
        """Refuse a weight, or a delta, that is not finite; ``columns`` say where ``bits`` lie in
        the part.
        """
        bad = nonfinite_index(bits, dtype)
        if bad is not None:
            column = int(columns[bad])
            segment = self._layout.segments_in(part, column)[0]
            raise CheckpointError(nonfinite_message(where, segment.tensor.name, segment.start))
