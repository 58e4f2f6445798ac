"""A live model's weights into a trajectory store: copied after an optimizer step, encoded and
written in the background.

    recorder = Recorder(model, "run.zarr")     # the base: the weights as they are now
    recorder.record(step, {"reward": reward})  # after optimizer.step(); returns once copied
    recorder.close()

Works on any ``torch.nn.Module``. With ``torch.distributed`` every process makes the same calls in
the same order: each writes the parts of the store that it owns, the first one creates the store and
commits. Sharded parameters (``DTensor``, as FSDP2 has them) are gathered one at a time. Of a PEFT
model the factors of its adapter are recorded, over the base as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relexkit.checkpoints import Checkpoint
from relexkit.checkpoints.same_tensors import check_factors, check_tensors, factors_in
from relexkit.errors import RelexkitError
from relexkit.geometry.sketch import Sketch
from relexkit.ingest.append import Appender
from relexkit.ingest.columns import Columns, base_reader
from relexkit.processes import Processes
from relexkit.record.live_adapter import AdapterSnapshot, LiveAdapter, peft_model
from relexkit.record.live_snapshot import Snapshot, check_equals, layout_of
from relexkit.record.live_weights import frozen_names
from relexkit.record.opening import (
    check_still,
    files_of,
    give_back_memory,
    refuse_existing,
    refuse_other_base,
    still_names,
)
from relexkit.store import (
    About,
    StoreWriter,
    TrajectoryStore,
    blocks,
    create_store,
    owned_parts,
)
from relexkit.weights.dtypes import bits_dtype, to_float32
from relexkit.weights.layout import Layout

if TYPE_CHECKING:
    import torch

_SMALL = 2**26  # bytes of a base that is kept in memory: to read it takes a tenth of a small step
_SKETCH_BLOCK = 2**20  # elements; the base is compressed in such pieces


class Recorder:
    """Records the weights of ``model`` into the store ``path``, at most one step in flight.

    A new store takes the current weights as its base. An existing one is continued from
    ``resume_from``; the steps after it are removed, because training goes on from there.

    Memory: one copy of the weights, or of a PEFT model's adapter, about 110 MB, and the base where
    it has at most 64 MiB; 16-bit parameters take a second copy, of the step before. With several
    processes, of the parts that each owns; of a sharded model the first process holds a whole copy
    while the base is written.

    Args:
        model: its parameters, a shared one once, and its persistent buffers are recorded under
            their ``state_dict`` names. Of a PEFT model (LoRA, one active adapter, new) the base
            and, of every step, factors and whole tensors of the adapter.
        every: record only the steps that are multiples of this.
        include, exclude: regular expressions, searched for in tensor names. What matches no
            ``include`` (if there are any) or matches an ``exclude`` keeps the base's values in
            every step, and so does what is not trained.
        encoding: of float32 weights: ``float`` deltas with ``mantissa_bits``, or ``exact``. 16-bit
            weights are always exact.
        tokenizer: kept beside the configuration of a transformers model, so that written
            checkpoints load.
        resume_from: the step whose weights the model holds, 0 for the base; None for a new store.
        compare: False if that step, though a multiple of ``every``, was not recorded.
        files: further files that a new store keeps beside those of the model.
        source: where the steps come from, in words.
        sketch: also keep a sketch of every step, and log with its metrics how much of the variance
            lies on the first directions so far, how straight the path is, and R² of the first
            coefficient; see ``Sketch.live_statistics``.

    Raises:
        StoreError: ``path`` exists and ``resume_from`` is None, another process is writing it, or
            the disk is full.
        RelexkitError: the model has other tensors than the store, or does not hold the weights of
            ``resume_from``.
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
        files: Mapping[str, bytes] | None = None,
        source: str = "recorded during training",
        sketch: bool = True,
    ):
        if every < 1:
            raise RelexkitError(f"every {every} is not a number of steps; expected 1 or more")
        self._model, self._every = model, every
        self._processes = Processes()
        self._written: Future[None] | None = None
        self._failure: BaseException | None = None
        self._metrics: dict[str, float] = {}
        self._committed: Future[None] | None = None
        described: Checkpoint = Snapshot.described(model)
        self._adapter = (
            LiveAdapter(model, described.tensors) if peft_model(model) is not None else None
        )
        frozen = frozen_names(model)
        if self._adapter is not None:
            adapted = self._adapter.over(self._adapter.base(described, files_of(model, None)))
            described, frozen = adapted, set(adapted.still)
        still = still_names(list(described.tensors), frozen, include, exclude)
        if self._adapter is not None:
            self._adapter.leave_out(still)
        if resume_from is None:
            about = About(
                source=source,
                base="the weights at the start of training",
                files=files_of(model, tokenizer) | dict(files or {}),
                mantissa_bits=mantissa_bits,
            )
            self._create(path, described, layout_of(described, encoding, still), about)
            give_back_memory()
        writer = self._processes.lead(lambda: StoreWriter(path))
        self._writer = self._processes.agree(lambda: writer or StoreWriter(path, member=True))
        try:
            self._snapshot = self._position(described, resume_from, compare, still)
        except BaseException:
            self._writer.close()
            raise
        layout = self._writer.store.layout
        sizes = {
            part: spec.numel * bits_dtype(spec.dtype).itemsize
            for part, spec in enumerate(layout.parts)
            if spec.moves
        }
        compared = sum(sizes.values())
        if compared > _SMALL:
            compared = sum(sizes[part] for part in sizes if self.store.encoding(part).is_log)
        self._sketch = Sketch() if sketch else None
        self._appender = Appender(
            self._writer,
            None,
            compared,
            owned=self._snapshot.owned,
            still=still,
            sketch=self._sketch,
        )
        if self._sketch is not None:
            kept = self._writer.store.sketches()
            for step, row in zip(
                self._writer.store.steps, () if kept is None else kept, strict=kept is not None
            ):
                if np.isfinite(row).all():
                    self._sketch.add(int(step), row)
        self._sketch_row = np.empty(0)
        self.live: dict[str, float] = {}
        """What ``Sketch.live_statistics`` says after the step before the last one given to
        ``record``.
        """
        if self._sketch is not None and len(self._sketch.steps):
            self.live = self._sketch.live_statistics()
        self.live_sketch: tuple[np.ndarray, np.ndarray] = (
            np.empty(0, np.int64),
            np.empty((0, 0), np.float32),
        )
        """Steps ``[K]`` and sketches ``[K, width]`` up to the step before the last one given to
        ``record``; never changed.
        """
        self._pool = ThreadPoolExecutor(1)

    def _create(
        self, path: str | Path, described: Checkpoint, layout: Layout, about: About
    ) -> None:
        """The store, created by the first process, with the current weights as its base."""
        whole = Snapshot.whole(self._model, keep=self._processes.rank == 0)
        adapter = self._adapter
        base: Checkpoint = whole
        if adapter is not None:
            adapter.copy(self._model, described.tensors)
            about = replace(about, files={**about.files, **adapter.files()})
            base = adapter.base(whole, about.files)
            self._processes.lead(lambda: adapter.refuse_if_begun(base))

        def create() -> None:
            refuse_existing(path)
            create_store(path, layout, base_reader(base, layout), about)

        self._processes.lead(create)

    def _position(
        self, described: Checkpoint, resume_from: int | None, compare: bool, still: Collection[str]
    ) -> Snapshot | AdapterSnapshot:
        """Room for a copy of the weights, once the model is known to fit the store, which then ends
        with ``resume_from``.
        """
        store = self._writer.store
        expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
        self._processes.agree(
            lambda: check_tensors(expected, described, f"the store {store.path}", "the model")
        )
        self._processes.agree(
            lambda: check_factors(factors_in(store.layout), described, "the model")
        )
        self._processes.agree(lambda: check_still(store, still))
        owned = owned_parts(store.layout, self._processes.rank, self._processes.size)
        snapshot = (
            AdapterSnapshot(self._adapter, store, owned)
            if self._adapter
            else Snapshot(store.layout, owned, still)
        )
        if resume_from is not None:
            snapshot.copy(self._model)
            if self._adapter is not None:
                different = self._adapter.differs_from(self._model, store)
                self._processes.agree(lambda: refuse_other_base(different, store))
            if compare and resume_from % self._every == 0:
                self._processes.agree(lambda: check_equals(snapshot, store, resume_from))
            self._processes.lead(lambda: self._writer.truncate(resume_from))
            if self._processes.rank:
                self._writer.truncate(resume_from)
        return snapshot

    def record(
        self, step: int, metrics: Mapping[str, float] | None = None, *, metrics_follow: bool = False
    ) -> bool:
        """Record the current weights as those after optimizer step ``step``; False if ``every``
        leaves it out.

        Waits for the step before, copies the weights and returns; the rest happens in the
        background. With ``metrics_follow`` the step is committed once ``describe`` has given
        further metrics, or at the next ``flush``.

        Raises:
            RelexkitError: the step before could not be recorded, or had a weight that is not
                finite.
            StoreError: ``step`` does not come after the recorded ones.
        """
        if step % self._every:
            return False
        self.flush()
        self.live |= {
            name: value for name, value in self._metrics.items() if name.startswith("live_")
        }
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
        """Further metrics of the step in flight, recorded with ``metrics_follow``; it may now be
        committed.
        """
        written = self._written
        if written is None or self._committed is not None:
            return
        self._metrics |= metrics
        if self._processes.size == 1:
            self._committed = self._pool.submit(self._commit_after, written)

    def flush(self) -> None:
        """Wait until all that was recorded is committed.

        Raises:
            RelexkitError: it could not be written; the store ends with the last step that could,
                and takes no more.
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
        if (
            kind is not None and self._processes.size > 1
        ):  # the others may be gone: no more calls that need them
            self._written = self._committed = None
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
            for name, left, right in self._products():
                self._sketch_row += self._sketch.product(name, left, right)
        self._appender.finish()

    def _commit_after(self, written: Future[None]) -> None:
        written.result()
        self._keep_sketch([self._sketch_row])
        self._writer.commit(self._metrics)

    def _deltas(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """The step's deltas in the owned parts that are not encoded as such, piece by piece, as a
        sketch takes them.
        """
        store = self._writer.store
        columns = Columns(self._snapshot, store.layout, "the model")
        for part in self._snapshot.owned:
            spec = store.layout.parts[part]
            done = part in self._appender.sketched or spec.factors is not None
            if done or not spec.moves or not self._snapshot.holds(part, store.layout):
                continue
            for begin, end in blocks(spec.numel, _SKETCH_BLOCK):
                current = columns.read(part, begin, end)
                delta = to_float32(current, spec.dtype) - to_float32(
                    store.read_base(part, begin, end), spec.dtype
                )
                for segment in store.layout.segments_in(part, begin, end):
                    low = segment.offset - begin
                    yield segment.tensor.name, segment.start, delta[low : low + segment.numel]

    def _products(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """The step's deltas of the owned parts with factors: tensor, scaled ``left [rows, r]``,
        ``right [r, columns]``.
        """
        layout = self._writer.store.layout
        for part in self._snapshot.owned:
            spec = layout.parts[part].factors
            if spec is not None:
                name = layout.segments_in(part)[0].tensor.name
                values = to_float32(self._snapshot.factor_bits(name), spec.dtype)
                left, right = values[: spec.rows * spec.rank], values[spec.rows * spec.rank :]
                yield (
                    name,
                    spec.scale * left.reshape(spec.rows, spec.rank),
                    right.reshape(spec.rank, spec.columns),
                )

    def _keep_sketch(self, rows: list[np.ndarray]) -> None:
        """Add the sketches of all processes, keep the sum with the step, and what it says with the
        metrics.
        """
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
