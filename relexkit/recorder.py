"""A live model's weights into a trajectory store: copied after an optimizer step, encoded and written in the background.

    recorder = Recorder(model, "run.zarr")        # the base: the weights as they are now
    recorder.record(step, {"reward": reward})     # after optimizer.step(); returns when the weights are copied
    recorder.close()

Works on any ``torch.nn.Module``. With ``torch.distributed`` every process makes the same calls in the same order: each writes
the parts of the store that it owns, the first one creates the store and commits. Sharded parameters (``DTensor``, as FSDP2 has
them) are gathered one at a time.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relexkit.append import Appender, base_reader, check_tensors, read_columns
from relexkit.dtypes import FLOAT_DTYPES, bits_dtype, to_float32
from relexkit.encoding import BLOCK, float_row
from relexkit.errors import RelexkitError, StoreError
from relexkit.layout import Encoding, Layout, build_layout
from relexkit.live_weights import describe_weights, frozen_names, whole_weights
from relexkit.processes import Processes
from relexkit.safetensors_io import ITEM_BYTES, TensorInfo
from relexkit.sketch import Sketch
from relexkit.store import SAFE_FILE_NAME, StoreWriter, TrajectoryStore, blocks, create_store, describe_steps
from relexkit.version import __version__

if TYPE_CHECKING:
    import torch

_SKETCH_BLOCK = 2**20  # elements; the base is compressed in such pieces


class Recorder:
    """Records the weights of ``model`` into the store ``path``, at most one step in flight.

    A new store takes the weights as they are as its base. An existing one is continued from ``resume_from``; the steps after
    it are removed, because training goes on from there.

    Memory: one copy of the weights (with several processes, of the parts that each owns; the first one holds a whole copy
    while the base is written); 16-bit parameters take a second one, of the step before.

    Args:
        model: its parameters, a shared one once, and its persistent buffers are recorded under their ``state_dict`` names.
        every: record only the steps that are multiples of this.
        include, exclude: regular expressions, searched for in tensor names. What matches no ``include`` (if there are any) or
            matches an ``exclude`` keeps the base's values in every step, and so does what is not trained.
        encoding: of float32 weights: ``float`` deltas with ``mantissa_bits``, or ``exact``. 16-bit weights are always exact.
        tokenizer: kept beside the configuration of a transformers model, so that written checkpoints load.
        resume_from: the step whose weights the model holds, 0 for the base; None for a new store.
        compare: False if that step, though a multiple of ``every``, was not recorded.
        source: where the steps come from, in words.
        sketch: also keep a sketch of every step, and log with its metrics how much of the variance lies on the first
            directions so far, how straight the path is, and R² of the first coefficient; see ``Sketch.live_statistics``.

    Raises:
        StoreError: ``path`` exists and ``resume_from`` is None, another process is writing it, or the disk is full.
        RelexkitError: the model has other tensors than the store, or does not hold the weights of ``resume_from``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        path: str | Path,
        *,
        every: int = 1,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        encoding: Literal["float", "exact"] = "float",
        mantissa_bits: int = 10,
        tokenizer: Any = None,
        resume_from: int | None = None,
        compare: bool = True,
        source: str = "recorded during training",
        sketch: bool = True,
    ):
        if every < 1:
            raise RelexkitError(f"every {every} is not a number of steps; expected 1 or more")
        if hasattr(model, "peft_config"):
            raise RelexkitError(
                "the model is a PEFT adapter; save every step as an adapter (they are small), and record them with "
                "`relexkit watch` or `relexkit import`, which keep the factors"
            )
        self._model, self._every = model, every
        self._processes = Processes()
        self._written: Future[None] | None = None
        self._failure: BaseException | None = None
        self._metrics: dict[str, float] = {}
        self._committed: Future[None] | None = None
        names = [name for name, _, _ in describe_weights(model)]
        still = _still_names(names, frozen_names(model), include, exclude)
        if resume_from is None:
            base = _Snapshot.whole(model, keep=self._processes.rank == 0)
            new = base.layout_for(encoding, still)
            self._processes.lead(lambda: _create(path, model, base, new, mantissa_bits, tokenizer, source))
            del base
        writer = self._processes.lead(lambda: StoreWriter(path))
        self._writer = self._processes.agree(lambda: writer or StoreWriter(path, member=True))
        try:
            self._snapshot = self._position(resume_from, compare, still)
        except BaseException:
            self._writer.close()
            raise
        layout = self._writer.store.layout
        previous = sum(p.numel * bits_dtype(p.dtype).itemsize for p in layout.parts if p.encoding == "sparse")
        self._sketch = Sketch() if sketch else None
        self._appender = Appender(
            self._writer, None, previous, owned=self._snapshot.owned, still=still, sketch=self._sketch
        )  # fmt: skip
        if self._sketch is not None:
            kept = self._writer.store.sketches()
            for step, row in zip(self._writer.store.steps, () if kept is None else kept, strict=kept is not None):
                if np.isfinite(row).all():
                    self._sketch.add(int(step), row)
        self._sketch_row = np.empty(0)
        self.live: dict[str, float] = {}
        """What ``Sketch.live_statistics`` says after the step before the last one given to ``record``."""
        if self._sketch is not None and len(self._sketch.steps):
            self.live = self._sketch.live_statistics()
        self.live_sketch: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty((0, 0), np.float32))
        """Steps ``[K]`` and sketches ``[K, width]`` up to the step before the last one given to ``record``; never changed."""
        self._pool = ThreadPoolExecutor(1)

    def _position(self, resume_from: int | None, compare: bool, still: Collection[str]) -> _Snapshot:
        """Room for a copy of the weights, once the model is known to fit the store, which then ends with ``resume_from``."""
        store = self._writer.store
        expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
        described = _Snapshot.described(self._model)
        self._processes.agree(lambda: check_tensors(expected, described, f"the store {store.path}", "the model"))
        self._processes.agree(lambda: _check_still(store, still))
        snapshot = _Snapshot(store.layout, _owned_parts(store.layout, self._processes.rank, self._processes.size), still)
        if resume_from is not None:
            snapshot.copy(self._model)
            if compare and resume_from % self._every == 0:
                self._processes.agree(lambda: snapshot.check_equals(store, resume_from))
            self._processes.lead(lambda: self._writer.truncate(resume_from))
            if self._processes.rank:
                self._writer.truncate(resume_from)
        return snapshot

    def record(self, step: int, metrics: Mapping[str, float] | None = None, *, metrics_follow: bool = False) -> bool:
        """Record the weights as they are, as those after optimizer step ``step``; False if ``every`` leaves it out.

        Waits for the step before, copies the weights and returns; the rest happens in the background. With
        ``metrics_follow`` the step is committed once ``describe`` has given further metrics, or at the next ``flush``.

        Raises:
            RelexkitError: the step before could not be recorded, or had a weight that is not finite.
            StoreError: ``step`` does not come after the recorded ones.
        """
        if step % self._every:
            return False
        self.flush()
        self.live |= {name: value for name, value in self._metrics.items() if name.startswith("live_")}
        if self._sketch is not None:
            self.live_sketch = (self._sketch.steps, self._sketch.rows)
        self._processes.lead(lambda: self._writer.begin(step))
        if self._processes.rank:
            self._writer.begin(step)
        self._snapshot.copy(self._model)
        self._metrics = dict(metrics or {})
        self._written, self._committed = self._pool.submit(self._write, step), None
        if not metrics_follow:
            self.describe({})
        return True

    def describe(self, metrics: Mapping[str, float]) -> None:
        """Further metrics of the step in flight, recorded with ``metrics_follow``; it may now be committed."""
        written = self._written
        if written is None or self._committed is not None:
            return
        self._metrics |= metrics
        if self._processes.size == 1:
            self._committed = self._pool.submit(self._commit_after, written)

    def flush(self) -> None:
        """Wait until all that was recorded is committed.

        Raises:
            RelexkitError: it could not be written; the store ends with the last step that could, and takes no more.
        """
        if self._failure is not None:
            raise self._failure
        self.describe({})
        written, committed = self._written, self._committed
        self._written = self._committed = None
        try:
            if committed is not None:
                committed.result()
            elif written is not None:
                self._commit_together(written)
        except BaseException as failure:
            self._failure = failure
            raise

    def close(self) -> None:
        """``flush``, and release the store. Raises as ``flush`` does."""
        try:
            self.flush()
        finally:
            self._pool.shutdown()
            with contextlib.suppress(RelexkitError):  # flush has raised it
                self._appender.close()
            self._writer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._processes.size > 1:  # the others may be gone: no more calls that need them
            self._job = None
        self.close()

    @property
    def store(self) -> TrajectoryStore:
        """The store, with the steps committed so far."""
        return self._writer.store

    def _write(self, step: int) -> None:
        self._step = step
        self._appender.write_parts(step, self._snapshot)
        if self._sketch is not None:
            self._sketch_row = self._appender.sketch_row + self._sketch.row(self._deltas())
        self._appender.finish()

    def _commit_after(self, written: Future[None]) -> None:
        written.result()
        self._keep_sketch([self._sketch_row])
        self._writer.commit(self._metrics)

    def _deltas(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """The step's deltas in the owned parts that are not encoded as such, piece by piece, as a sketch takes them."""
        store = self._writer.store
        for part in self._snapshot.owned:
            spec = store.layout.parts[part]
            if spec.encoding in ("fixed", "float") or not self._snapshot.holds(part, store.layout):
                continue
            for begin, end in blocks(spec.numel, _SKETCH_BLOCK):
                current = read_columns(self._snapshot, store.layout, part, begin, end, "the model")
                delta = to_float32(current, spec.dtype) - to_float32(store.read_base(part, begin, end), spec.dtype)
                for segment in store.layout.segments_in(part, begin, end):
                    low = segment.offset - begin
                    yield segment.tensor.name, segment.start, delta[low : low + segment.numel]

    def _keep_sketch(self, rows: list[np.ndarray]) -> None:
        """Add the sketches of all processes, keep the sum with the step, and what it says with the metrics."""
        if self._sketch is None:
            return
        row = np.sum(rows, axis=0)
        self._writer.write_sketch(row)
        self._sketch.add(self._step, row)
        self._metrics |= self._sketch.live_statistics()

    def _commit_together(self, job: Future[None]) -> None:
        self._processes.agree(job.result)
        checksums: dict[int, int] = {}
        for written in self._processes.gather(self._writer.checksums):
            checksums |= written
        rows = self._processes.gather(self._sketch_row)

        def commit() -> None:
            self._keep_sketch(rows)
            self._writer.commit(self._metrics, checksums)

        self._processes.lead(commit)
        if self._processes.rank:
            self._writer.follow()


# -- opening ----------------------------------------------------------------------------------------------------------


def _create(
    path: str | Path, model: Any, base: _Snapshot, layout: Layout, mantissa_bits: int, tokenizer: Any, source: str
) -> None:
    with contextlib.suppress(StoreError):  # none there, or one whose creation was interrupted
        there = TrajectoryStore(path)
        raise RelexkitError(
            f"{path}: a store with {describe_steps(there.steps)} exists there; resume from one of them or choose another path"
        )
    create_store(
        path, layout, base_reader(base, layout),
        files=_model_files(model, tokenizer), source=source, base="the weights at the start of training",
        mantissa_bits=mantissa_bits if any(p.encoding == "float" for p in layout.parts) else None, version=__version__,
    )  # fmt: skip


def _model_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """What transformers saves beside the weights: configuration, generation configuration, tokenizer."""
    config = getattr(model, "config", None)
    with tempfile.TemporaryDirectory() as folder:
        for owner in (config, getattr(model, "generation_config", None), tokenizer):
            if owner is not None and hasattr(owner, "save_pretrained"):
                owner.save_pretrained(folder)
        found = sorted(path for path in Path(folder).iterdir() if path.is_file() and SAFE_FILE_NAME.fullmatch(path.name))
        return {path.name: path.read_bytes() for path in found}


def _still_names(names: list[str], frozen: set[str], include: Sequence[str], exclude: Sequence[str]) -> frozenset[str]:
    """The tensors that keep the base's values in the store."""
    try:
        wanted = [n for n in names if not include or any(re.search(pattern, n) for pattern in include)]
        wanted = [n for n in wanted if not any(re.search(pattern, n) for pattern in exclude)]
    except re.error as error:
        raise RelexkitError(
            f"{error.pattern!r} is not a regular expression ({error}); expected one to search in names"
        ) from None
    moving = frozenset(wanted) - frozen
    if not moving:
        raise RelexkitError(
            f"include {list(include)} and exclude {list(exclude)} leave no trained tensor; the model has "
            f"{', '.join(names[:3])}, ..."
        )
    return frozenset(names) - moving


def _check_still(store: TrajectoryStore, still: Collection[str]) -> None:
    """The parts of a continued store hold either tensors that move or tensors that do not."""
    for part, spec in enumerate(store.layout.parts):
        kinds = (
            {segment.tensor.name in still for segment in store.layout.segments_in(part)} if spec.encoding != "fixed" else set()
        )
        dense_and_still = kinds == {True} and spec.encoding != "sparse"
        moved = kinds == {True} and spec.encoding == "sparse" and store.entries(part, len(store.steps)).any()
        if len(kinds) == 2 or dense_and_still or moved:
            name = store.layout.segments_in(part)[0].tensor.name
            raise RelexkitError(
                f"tensors near {name!r} were recorded otherwise in {store.path}; expected the same include, exclude and frozen "
                "parameters as when it was made"
            )


def _owned_parts(layout: Layout, rank: int, size: int) -> list[int]:
    """The parts that a process writes: the largest first, each to the process that has the least."""
    loads = [0] * size
    owned: list[list[int]] = [[] for _ in range(size)]
    for part in sorted(range(len(layout.parts)), key=lambda p: -layout.parts[p].numel):
        least = loads.index(min(loads))
        loads[least] += layout.parts[part].numel
        owned[least].append(part)
    return sorted(owned[rank])


# -- copies of the weights --------------------------------------------------------------------------------------------


class _Snapshot:
    """A copy of the owned parts of a model's weights, readable as a checkpoint."""

    description = "the model"

    def __init__(self, layout: Layout, owned: list[int], still: Collection[str] = ()):
        import torch

        self.owned = owned
        self.tensors = {t.name: TensorInfo(t.shape, t.dtype) for t in layout.tensors}
        self._pieces: dict[str, list[tuple[int, torch.Tensor]]] = {t.name: [] for t in layout.tensors}
        for part in owned:
            spec = layout.parts[part]
            if spec.encoding != "fixed" and all(s.tensor.name in still for s in layout.segments_in(part)):
                continue
            dtype = getattr(torch, spec.dtype) if spec.encoding != "fixed" else torch.uint8
            buffer = torch.empty(spec.numel, dtype=dtype, pin_memory=torch.cuda.is_available())
            for segment in layout.segments_in(part):
                piece = buffer[segment.offset : segment.offset + segment.numel]
                self._pieces[segment.tensor.name].append((segment.start, piece))

    @classmethod
    def described(cls, model: torch.nn.Module) -> _Snapshot:
        """Names, shapes and dtypes of a model's weights, without values."""
        weights = [(name, shape, _dtype_name(dtype)) for name, shape, dtype in describe_weights(model)]
        return cls(build_layout(weights, _encodings("exact")), [])

    @classmethod
    def whole(cls, model: torch.nn.Module, *, keep: bool) -> _Snapshot:
        """All weights; every process takes part in gathering them, those with ``keep`` hold them."""
        described = cls.described(model)
        layout = described.layout_for("exact")
        snapshot = cls(layout, list(range(len(layout.parts))) if keep else [])
        snapshot.copy(model)
        return snapshot

    def layout_for(self, encoding: Encoding, still: Collection[str] = ()) -> Layout:
        """The layout of a store for these tensors."""
        weights = [(name, info.shape, info.dtype) for name, info in self.tensors.items()]
        return build_layout(weights, _encodings(encoding), still=still)

    def copy(self, model: torch.nn.Module) -> None:
        """Take over the model's weights, one tensor at a time. A collective call if they are sharded."""
        import torch

        with torch.no_grad():
            for name, whole in whole_weights(model):
                pieces = self._pieces[name]
                if pieces:
                    flat = whole.detach().contiguous().view(-1)
                    flat = flat if pieces[0][1].dtype == flat.dtype else flat.view(torch.uint8)
                for start, piece in pieces:
                    piece.copy_(flat[start : start + len(piece)], non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Raw bits of elements ``start:start+len(out)`` of an owned tensor."""
        import torch

        for first, piece in self._pieces[name]:
            low, high = max(start, first), min(start + len(out), first + len(piece))
            if low < high:
                bits = torch.int32 if out.dtype.itemsize == 4 else torch.int16 if out.dtype.itemsize == 2 else torch.uint8
                out[low - start : high - start] = piece[low - first : high - first].view(bits).numpy().view(out.dtype)

    def holds(self, part: int, layout: Layout) -> bool:
        """False for a part whose tensors are not recorded."""
        return all(self._pieces[segment.tensor.name] for segment in layout.segments_in(part))

    def check_equals(self, store: TrajectoryStore, step: int) -> None:
        """The first block of every owned part holds what the store holds at ``step``, to its precision.

        Raises:
            RelexkitError: the model holds other weights.
        """
        row = store.row_of(step) if step else -1
        read = base_reader(self, store.layout)
        for part in self.owned:
            spec = store.layout.parts[part]
            if not self.holds(part, store.layout):
                continue
            end = min(spec.numel, BLOCK)
            current = read(part, 0, end)
            if row >= 0 and spec.encoding == "float":
                delta = float_row(store.read_base(part, 0, end), current, spec.dtype, store.mantissa_bits or 23)
                same = np.array_equal(delta, store.read_row(part, row, 0, end))
            else:
                same = np.array_equal(current, store.read_state(part, row, 0, end))
            if not same:
                raise RelexkitError(
                    f"the model does not hold the weights of {f'step {step}' if step else 'the base'} of {store.path}; "
                    "expected the state that was saved with it: load that state, or record into a new store"
                )

    def files(self) -> dict[str, bytes]:
        """Nothing: files belong to the store."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Nothing: metrics come with the step."""
        return {}

    def close(self) -> None:
        """Nothing to release."""


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise RelexkitError(f"the model has a tensor of dtype {name}; expected one of {', '.join(ITEM_BYTES)}")
    return name


def _encodings(float32: Encoding) -> dict[str, Encoding]:
    return {dtype: float32 if dtype == "float32" else "sparse" for dtype in FLOAT_DTYPES}
