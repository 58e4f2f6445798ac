"""Checkpoints of an existing run into a trajectory store: each checkpoint is read once, in blocks, and differenced."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from relexkit.checkpoints import Checkpoint, Run, open_checkpoint, open_run
from relexkit.dtypes import FLOAT_DTYPES, bits_dtype, nonfinite_index, widen_bits
from relexkit.encoding import (
    BLOCK,
    CHECKSUM_BLOCK,
    block_checksums,
    changed_columns,
    content_checksum,
    float_row,
)
from relexkit.errors import CheckpointError, RelexkitError
from relexkit.layout import Encoding, Layout, Part, build_layout
from relexkit.store import (
    NotAStoreError,
    ProgressCallback,
    StoreWriter,
    TrajectoryStore,
    base_sha256,
    blocks,
    create_store,
    describe_steps,
)
from relexkit.version import __version__

DEFAULT_MANTISSA_BITS = 10
SPARSE_BELOW = 1 / 8
"""A dtype whose neighbouring checkpoints differ in a smaller share of the weights is stored as a sparse log."""

_SAMPLE_ELEMENTS = 2**14
_WIDENED = {"float32": ("bfloat16", "float16")}  # what may stand for a dtype in the base
_WORKERS = min(4, os.cpu_count() or 1)
_QUEUE_BYTES = 2**26  # encoded but not yet written; a larger array waits until the queue is empty


@dataclass(frozen=True)
class ImportResult:
    """What an import did: the open store, the steps it added, and the steps that were already there."""

    store: TrajectoryStore
    added: list[int]
    already: list[int]


def import_checkpoints(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    steps: str | None = None,
    encoding: Literal["auto", "exact", "float"] = "auto",
    mantissa_bits: int | None = None,
    memory_budget_bytes: int = 5 * 2**26,
    progress: ProgressCallback | None = None,
) -> ImportResult:
    """Import a folder of checkpoints into the store ``out``; run again, it adds what is new or was interrupted.

    Args:
        source: folder with one sub-folder for each step.
        base: folder of the base model; without it the run's step 0 is the base.
        steps: ``"A:B"`` or ``"A:B:C"``: only steps from A to B, both included, whose number is A plus a multiple of C.
        encoding: ``exact`` keeps every bit, ``float`` rounded float deltas; ``auto`` is exact for 16-bit checkpoints
            and for float32 ones that hardly change, else float.
        mantissa_bits: explicit mantissa bits of float deltas, 1 to 23 (10 if not given): a relative error of at most
            ``2 ** -(mantissa_bits + 1)`` of each delta.
        memory_budget_bytes: bound on the weights of the previous step (or base) kept in memory; what does not fit is
            read again from its file.

    Reads every checkpoint once, and the base twice; a head and an embedding that may be tied are read once more, and so
    is what does not fit the budget. Memory: the budget, a few blocks of 2**22 elements, the changes of one step, and for
    dense encodings two rows of a part.

    Raises:
        CheckpointError: a checkpoint is damaged, not finite, or does not have the base's tensors.
        StoreError: ``out`` is something else, belongs to another run, is being written, or the disk is full.
    """
    _check_encoding(encoding, mantissa_bits)
    run = open_run(Path(source))
    wanted = select_steps(run.steps, steps)
    base_checkpoint, base_words, wanted = _open_base(run, base, wanted, source)
    with closing(base_checkpoint):
        created = not _is_store(out)
        if created:
            _create(out, run, wanted, base_checkpoint, base_words, encoding, mantissa_bits, progress)
        with StoreWriter(out) as writer:
            store = writer.store
            if not created:
                _check_same_run(store, run, base_checkpoint, encoding, mantissa_bits)
            recorded = {int(s) for s in store.steps}
            new = [s for s in wanted if s not in recorded]
            if new and recorded and new[0] < max(recorded):
                raise CheckpointError(
                    f"step {new[0]} of {source} lies before step {max(recorded)}, the last one recorded in {out}; "
                    "steps are recorded in order: import into a new store"
                )
            if new:
                _append_all(run, new, writer, base_checkpoint, memory_budget_bytes, progress)
    return ImportResult(TrajectoryStore(out), new, [s for s in wanted if s in recorded])


def select_steps(available: Sequence[int], selection: str | None) -> list[int]:
    """The steps that ``"A:B:C"`` names (both ends included, any may be empty), in order.

    Raises:
        RelexkitError: the selection is not of that form or selects nothing.
    """
    if selection is None:
        return list(available)
    pieces = selection.split(":")
    try:
        if not 2 <= len(pieces) <= 3:
            raise ValueError
        low = int(pieces[0]) if pieces[0] else min(available)
        high = int(pieces[1]) if pieces[1] else max(available)
        every = int(pieces[2]) if len(pieces) == 3 and pieces[2] else 1
        if every < 1:
            raise ValueError
    except ValueError:
        raise RelexkitError(f"--steps {selection!r} is not a range; expected A:B or A:B:C with whole numbers") from None
    chosen = [s for s in available if low <= s <= high and (s - low) % every == 0]
    if not chosen:
        raise RelexkitError(f"--steps {selection} selects no step; the run holds {describe_steps(np.asarray(available))}")
    return chosen


def _check_encoding(encoding: str, mantissa_bits: int | None) -> None:
    if encoding not in ("auto", "exact", "float"):
        raise RelexkitError(f"--encoding {encoding} is unknown; choose auto, exact or float")
    if mantissa_bits is not None and not 1 <= mantissa_bits <= 23:
        raise RelexkitError(f"--mantissa-bits {mantissa_bits} is out of range; expected 1 to 23")
    if mantissa_bits is not None and encoding == "exact":
        raise RelexkitError("--mantissa-bits has no effect with --encoding exact; leave one of them out")


def _open_base(run: Run, base: str | Path | None, wanted: list[int], source: str | Path) -> tuple[Checkpoint, str, list[int]]:
    after_base = [s for s in wanted if s > 0]
    if not after_base:
        raise CheckpointError(f"{source}: holds no step after the base; expected at least one step from 1 upwards")
    if base is not None:
        return open_checkpoint(Path(base)), str(base), after_base
    if 0 in run.steps:
        return run.checkpoint(0), f"step 0 of {source}", after_base
    raise CheckpointError(f"{source}: has no step 0, so the base is unknown; give the base model with --base DIR")


def _is_store(path: str | Path) -> bool:
    """True if a finished store is at ``path``, False if one may be created there.

    Raises:
        StoreError: a store of an unknown version, or a damaged one.
    """
    try:
        TrajectoryStore(path)
    except NotAStoreError:
        return False
    return True


# -- creating ---------------------------------------------------------------------------------------------------------


def _create(
    out: str | Path,
    run: Run,
    steps: list[int],
    base: Checkpoint,
    base_words: str,
    encoding: str,
    mantissa_bits: int | None,
    progress: ProgressCallback | None,
) -> None:
    with closing(run.checkpoint(steps[0])) as first:
        names = {n: (i.shape, i.dtype) for n, i in first.tensors.items()}
        _check_tensors(names, base, f"step {steps[0]}", base_words, widen=True)
        files = {**base.files(), **first.files()}
        order = [(name, *names[name]) for name in first.tensors]
    tied = _tied_tensors(order, run, steps, base)
    encodings = _choose_encodings(order, run, steps, base, encoding)
    layout = build_layout(order, encodings, tied)
    bits = (mantissa_bits or DEFAULT_MANTISSA_BITS) if "float" in encodings.values() else None
    create_store(
        out, layout, _base_reader(base, layout),
        files=files, source=run.description, base=base_words, mantissa_bits=bits, version=__version__, progress=progress,
    )  # fmt: skip


def _choose_encodings(
    order: list[tuple[str, tuple[int, ...], str]], run: Run, steps: list[int], base: Checkpoint, encoding: str
) -> dict[str, Encoding]:
    """Encoding of each float dtype, from a sample of what changed between the last two checkpoints."""
    dtypes = sorted({dtype for _, _, dtype in order if dtype in FLOAT_DTYPES})
    if encoding == "float":
        return dict.fromkeys(dtypes, "float")
    try:
        with ExitStack() as stack:
            last = stack.enter_context(closing(run.checkpoint(steps[-1])))
            earlier = stack.enter_context(closing(run.checkpoint(steps[-2]))) if len(steps) > 1 else base
            density = _sampled_density(order, earlier, last)
    except CheckpointError:  # damaged: the import reports it when it comes to that step
        with closing(run.checkpoint(steps[0])) as first:
            density = _sampled_density(order, base, first)
    chosen: dict[str, Encoding] = {}
    for dtype in dtypes:
        if density.get(dtype, 0.0) < SPARSE_BELOW:
            chosen[dtype] = "sparse"
        else:
            chosen[dtype] = "exact" if encoding == "exact" or dtype != "float32" else "float"
    return chosen


def _sampled_density(order: list[tuple[str, tuple[int, ...], str]], earlier: Checkpoint, later: Checkpoint) -> dict[str, float]:
    changed: dict[str, int] = {}
    seen: dict[str, int] = {}
    for name, shape, dtype in order:
        shapes = [c.tensors[name].shape for c in (earlier, later) if name in c.tensors]
        dtypes = {c.tensors[name].dtype for c in (earlier, later) if name in c.tensors}
        if dtype not in FLOAT_DTYPES or shapes != [shape, shape] or not dtypes <= {dtype, *_WIDENED.get(dtype, ())}:
            continue  # not float, or not as in the first step, which the import reports
        count = min(_SAMPLE_ELEMENTS, later.tensors[name].numel)
        start = (later.tensors[name].numel - count) // 2
        pair = []
        for checkpoint in (earlier, later):
            raw = np.empty(count, bits_dtype(checkpoint.tensors[name].dtype))
            checkpoint.read_into(name, start, raw)
            pair.append(widen_bits(raw, checkpoint.tensors[name].dtype, dtype))
        changed[dtype] = changed.get(dtype, 0) + int(np.count_nonzero(pair[0] != pair[1]))
        seen[dtype] = seen.get(dtype, 0) + count
    return {dtype: count / max(1, seen[dtype]) for dtype, count in changed.items()}


_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
_OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


def _tied_tensors(
    order: list[tuple[str, tuple[int, ...], str]], run: Run, steps: list[int], base: Checkpoint
) -> dict[str, str]:
    """Output head -> input embedding, if both are present and equal bit for bit in the base and in every step."""
    embeddings = [t for t in order if t[0].endswith(_INPUT_EMBEDDINGS)]
    heads = [t for t in order if t[0].endswith(_OUTPUT_HEADS)]
    tied = {}
    for head in heads:
        for embedding in embeddings:
            if head[1:] != embedding[1:] or head[0] == embedding[0] or not _equal(base, head[0], embedding[0]):
                continue
            if all(_equal_at(run, step, head[0], embedding[0]) for step in steps):
                tied[head[0]] = embedding[0]
    return tied


def _equal_at(run: Run, step: int, first: str, second: str) -> bool:
    with closing(run.checkpoint(step)) as checkpoint:
        if checkpoint.tensors.get(first) != checkpoint.tensors.get(second) or first not in checkpoint.tensors:
            return False  # the import itself reports it
        return _equal(checkpoint, first, second)


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    info = checkpoint.tensors[first]
    for begin, end in blocks(info.numel):
        pair = [np.empty(end - begin, bits_dtype(info.dtype)) for _ in range(2)]
        checkpoint.read_into(first, begin, pair[0])
        checkpoint.read_into(second, begin, pair[1])
        if not np.array_equal(pair[0], pair[1]):
            return False
    return True


def _base_reader(base: Checkpoint, layout: Layout) -> Callable[[int, int, int], np.ndarray]:
    """``(part, begin, end) -> bits`` of the base, widened to the dtype of the steps and checked to be finite."""

    def read(part: int, begin: int, end: int) -> np.ndarray:
        bits = _read_columns(base, layout, part, begin, end, "the base")
        if layout.parts[part].encoding != "fixed":
            bad = nonfinite_index(bits, layout.parts[part].dtype)
            if bad is not None:
                segment = layout.segments_in(part, begin + bad)[0]
                raise CheckpointError(_nonfinite("the base", segment.tensor.name, segment.start))
        return bits

    return read


def _read_columns(
    checkpoint: Checkpoint, layout: Layout, part: int, begin: int, end: int, where: str, out: np.ndarray | None = None
) -> np.ndarray:
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
        raise CheckpointError(f"{where}: tensor {name!r} cannot be read ({error.strerror or error})") from None


def _nonfinite(where: str, name: str, index: int) -> str:
    return (
        f"{where}: tensor {name!r} is NaN or infinite at element {index}; expected finite weights: "
        "the run diverged or the file is damaged; leave the step out with --steps"
    )


# -- checking ---------------------------------------------------------------------------------------------------------


def _check_tensors(
    expected: dict[str, tuple[tuple[int, ...], str]], found: Checkpoint, reference: str, where: str, *, widen: bool = False
) -> None:
    """Same names, shapes and dtypes; with ``widen`` a 16-bit tensor may stand for a float32 one."""
    missing = [n for n in expected if n not in found.tensors]
    extra = [n for n in found.tensors if n not in expected]
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has the unexpected {_some(extra)}"] * bool(extra)
        raise CheckpointError(
            f"{where} {' and '.join(parts)}, compared with {reference}; expected the same tensors everywhere: "
            "convert them alike (a tied output head is either in all of them or in none)"
        )
    for name, (shape, dtype) in expected.items():
        info = found.tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}; expected {list(shape)} as in {reference}"
            )
        allowed = (dtype, *(_WIDENED.get(dtype, ()) if widen else ()))
        if info.dtype not in allowed:
            hint = ""
            if widen and dtype in FLOAT_DTYPES and info.dtype == "float32":
                hint = f": round the base first with `relexkit round --dtype {dtype} --rounding nearest`"
            raise CheckpointError(f"{where}: tensor {name!r} has dtype {info.dtype}; expected {dtype} as in {reference}{hint}")
        if dtype not in FLOAT_DTYPES and dtype.startswith("float"):
            raise CheckpointError(
                f"{where}: tensor {name!r} has dtype {dtype}; expected float32, bfloat16 or float16: convert the checkpoints"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:3])
    return f"tensor{'s' * (len(names) > 1)} {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_same_run(store: TrajectoryStore, run: Run, base: Checkpoint, encoding: str, mantissa_bits: int | None) -> None:
    """The store belongs to this run, base and options (it may have been created by an earlier, interrupted call)."""
    expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
    _check_tensors(expected, base, f"the store {store.path}", "the base", widen=True)
    if base_sha256(store.layout, _base_reader(base, store.layout)) != store.attributes["base"]["sha256"]:
        raise CheckpointError(
            f"the base differs from the one in {store.path} ({store.attributes['base']['description']}); "
            "give the same --base, or another -o"
        )
    if mantissa_bits is not None and mantissa_bits != store.mantissa_bits:
        raise CheckpointError(
            f"{store.path} holds deltas with {store.mantissa_bits} mantissa bits, not {mantissa_bits}; "
            "leave --mantissa-bits out, or choose another -o"
        )
    kinds = {p.encoding for p in store.layout.parts} - {"fixed"}
    if (encoding == "exact" and "float" in kinds) or (encoding == "float" and kinds - {"float"}):
        raise CheckpointError(
            f"{store.path} is encoded as {', '.join(sorted(kinds))}; leave --encoding out, or choose another -o"
        )
    _check_last_step(store, run, base)


def _check_last_step(store: TrajectoryStore, run: Run, base: Checkpoint) -> None:
    """The last recorded step, if the run still has it, holds what the store holds, in the first block of every part."""
    last = int(store.steps[-1]) if len(store.steps) else 0
    if last not in run.steps or not last:
        return
    with closing(run.checkpoint(last)) as checkpoint:
        expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
        _check_tensors(expected, checkpoint, f"the store {store.path}", f"step {last}")
        for part, spec in enumerate(store.layout.parts):
            end = min(spec.numel, BLOCK)
            current = _read_columns(checkpoint, store.layout, part, 0, end, f"step {last}")
            if spec.encoding == "float":
                reference = _read_columns(base, store.layout, part, 0, end, "the base")
                row = store.read_row(part, len(store.steps) - 1, 0, end)
                same = np.array_equal(float_row(reference, current, spec.dtype, store.mantissa_bits or 23), row)
            else:
                same = np.array_equal(current, store.read_state(part, len(store.steps) - 1, 0, end))
            if not same:
                raise CheckpointError(
                    f"step {last} of the run differs from the one recorded in {store.path}: this is another run; "
                    "choose another -o"
                )


# -- appending --------------------------------------------------------------------------------------------------------


def _append_all(
    run: Run,
    steps: list[int],
    writer: StoreWriter,
    base: Checkpoint,
    memory_budget_bytes: int,
    progress: ProgressCallback | None,
) -> None:
    with closing(_Appender(writer, base, memory_budget_bytes)) as appender:
        for done, step in enumerate(steps, 1):
            checkpoint = run.checkpoint(step)
            try:
                appender.append(step, checkpoint)
            except BaseException:
                checkpoint.close()
                raise
            if progress:
                progress("importing", done, len(steps))


class _Appender:
    """Encodes checkpoints against the previous step (sparse parts) or the base (dense parts) and commits them.

    Reference weights stay in memory up to the budget, whole parts at a time; beyond it they are read again: the
    previous step from its checkpoint (or replayed from the store, after a restart), the base from its folder.

    Writing goes on in the background, in order, so a step is committed while the next one is read.
    """

    def __init__(self, writer: StoreWriter, base: Checkpoint, memory_budget_bytes: int):
        self._writer, self._store, self._base = writer, writer.store, base
        self._layout = writer.store.layout
        self._previous: Checkpoint | None = None
        self._kept: dict[int, np.ndarray] = {}
        remaining = memory_budget_bytes
        for part, spec in enumerate(self._layout.parts):
            size = spec.numel * bits_dtype(spec.dtype).itemsize
            if spec.encoding != "fixed" and size <= remaining:
                remaining -= size
                self._kept[part] = self._initial_reference(part, 0, spec.numel)
        self._pool = ThreadPoolExecutor(_WORKERS)
        self._background = ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._scratch = threading.local()

    def close(self) -> None:
        """Finish what is being written, stop the workers and close the last checkpoint.

        Raises:
            StoreError: the last writes failed.
        """
        try:
            self._finish(0)
        finally:
            self._pool.shutdown()
            self._background.shutdown()
            if self._previous is not None:
                self._previous.close()

    def _finish(self, num_bytes: int) -> None:
        """Wait until no more than ``num_bytes`` are still to be written."""
        while self._pending and (num_bytes == 0 or sum(size for _, size in self._pending) > num_bytes):
            self._pending.popleft()[0].result()

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        """Let the background thread write, once there is room in its queue."""
        size = sum(a.nbytes for a in arguments if isinstance(a, np.ndarray))
        self._finish(max(0, _QUEUE_BYTES - size))
        self._pending.append((self._background.submit(write, *arguments), size))

    def append(self, step: int, checkpoint: Checkpoint) -> None:
        """Record one checkpoint; it is closed when the next one is done."""
        where = f"step {step}"
        expected = {t.name: (t.shape, t.dtype) for t in self._layout.tensors}
        _check_tensors(expected, checkpoint, f"the store {self._store.path}", where)
        for tensor in self._layout.tensors:
            if tensor.tied_to and not _equal(checkpoint, tensor.name, tensor.tied_to):
                raise CheckpointError(
                    f"{where}: tensors {tensor.name!r} and {tensor.tied_to!r} differ but were tied so far; "
                    "import into a new store"
                )
        self._write(self._writer.begin, step)
        for part, spec in enumerate(self._layout.parts):
            if spec.encoding == "sparse":
                self._append_sparse(part, checkpoint, where)
            elif spec.encoding == "fixed":
                self._check_fixed(part, checkpoint, where)
            else:
                self._append_row(part, spec, checkpoint, where)
        self._write(self._writer.commit, checkpoint.metrics())
        if self._previous is not None:
            self._previous.close()
        self._previous = checkpoint

    def _initial_reference(self, part: int, begin: int, end: int) -> np.ndarray:
        if self._layout.parts[part].encoding == "sparse" and len(self._store.steps):
            return self._store.read_state(part, len(self._store.steps) - 1, begin, end)
        return _read_columns(self._base, self._layout, part, begin, end, "the base")

    def _reference(self, part: int, begin: int, end: int) -> np.ndarray:
        if part in self._kept:
            return self._kept[part][begin:end]
        if self._layout.parts[part].encoding == "sparse" and self._previous is not None:
            return _read_columns(self._previous, self._layout, part, begin, end, "the previous step")
        return self._initial_reference(part, begin, end)

    def _read(self, checkpoint: Checkpoint, part: int, begin: int, end: int, where: str) -> np.ndarray:
        """Columns of a checkpoint in the thread's own buffer, good until its next call: fresh pages cost as much as reading."""
        bits = bits_dtype(self._layout.parts[part].dtype)
        buffers: dict[np.dtype, np.ndarray] = self._scratch.__dict__.setdefault("buffers", {})
        if bits not in buffers:
            buffers[bits] = np.empty(CHECKSUM_BLOCK, bits)
        return _read_columns(checkpoint, self._layout, part, begin, end, where, buffers[bits][: end - begin])

    def _append_sparse(self, part: int, checkpoint: Checkpoint, where: str) -> None:
        def encode(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
            begin, end = span
            current = self._read(checkpoint, part, begin, end, where)
            reference = self._reference(part, begin, end)
            columns = changed_columns(reference, current)
            after = current[columns]
            self._refuse_nonfinite(part, after, begin + columns, where, self._layout.parts[part].dtype)
            differences = after - reference[columns]
            if part in self._kept:
                reference[columns] = after
            return columns + np.int32(begin), differences, block_checksums(current)

        results = list(self._pool.map(encode, blocks(self._layout.parts[part].numel)))
        columns = np.concatenate([np.empty(0, np.int32), *(r[0] for r in results)])
        bits = bits_dtype(self._layout.parts[part].dtype)
        differences = np.concatenate([np.empty(0, bits), *(r[1] for r in results)])
        checksum = content_checksum([value for r in results for value in r[2]])
        self._write(self._writer.write_sparse, part, columns, differences.view(f"int{bits.itemsize * 8}"), checksum)

    def _append_row(self, part: int, spec: Part, checkpoint: Checkpoint, where: str) -> None:
        bits = bits_dtype(spec.dtype)
        is_float = spec.encoding == "float"
        row = np.empty(spec.numel, np.float32 if is_float else f"int{bits.itemsize * 8}")

        def encode(span: tuple[int, int]) -> list[int]:
            begin, end = span
            current = self._read(checkpoint, part, begin, end, where)
            self._refuse_nonfinite(part, current, range(begin, end), where, spec.dtype)
            reference = self._reference(part, begin, end)
            if is_float:
                with np.errstate(over="ignore"):
                    row[begin:end] = float_row(reference, current, spec.dtype, self._store.mantissa_bits or 23)
                self._refuse_nonfinite(part, row[begin:end].view(np.uint32), range(begin, end), where, "float32")
            else:
                row[begin:end] = (current - reference).view(row.dtype)
            return block_checksums(row[begin:end])

        checksums = self._pool.map(encode, blocks(spec.numel))
        checksum = content_checksum([value for block in checksums for value in block])
        self._write(self._writer.write_row, part, row, checksum)

    def _check_fixed(self, part: int, checkpoint: Checkpoint, where: str) -> None:
        for begin, end in blocks(self._layout.parts[part].numel):
            current = _read_columns(checkpoint, self._layout, part, begin, end, where)
            base = _read_columns(self._base, self._layout, part, begin, end, "the base")
            if not np.array_equal(current, base):
                at = begin + int((current != base).argmax())
                name = self._layout.segments_in(part, at)[0].tensor.name
                raise CheckpointError(
                    f"{where}: tensor {name!r} is not float and differs from the base; "
                    "expected integer and boolean tensors to stay the same in all steps"
                )

    def _refuse_nonfinite(
        self, part: int, bits: np.ndarray, columns: Sequence[int] | np.ndarray, where: str, dtype: str
    ) -> None:
        """Refuse a weight, or a delta, that is not finite; ``columns`` say where ``bits`` lie in the part."""
        bad = nonfinite_index(bits, dtype)
        if bad is not None:
            column = int(columns[bad])
            segment = self._layout.segments_in(part, column)[0]
            raise CheckpointError(_nonfinite(where, segment.tensor.name, segment.start))
