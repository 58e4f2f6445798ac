"""What an import would write and how long it would take, from a miniature of it: the same code on a
slice of every tensor.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from relexkit.checkpoints import Checkpoint, Run, open_run
from relexkit.checkpoints.chain import ChainedRun
from relexkit.checkpoints.formats.hub import is_hub
from relexkit.checkpoints.formats.peft import named_base
from relexkit.checkpoints.protocol import WholeTensors
from relexkit.checkpoints.referenced import no_reference, open_base
from relexkit.errors import CheckpointError
from relexkit.gram_matrix.compute.distributed import ALONE
from relexkit.gram_matrix.compute.settings import DEFAULT
from relexkit.ingest.creation import Base, create_for
from relexkit.ingest.importer import append_all, seen_alike, select_steps
from relexkit.ingest.reading import PLAIN, Reading
from relexkit.ingest.shared_writer import SharedWriter
from relexkit.store import TrajectoryStore
from relexkit.weights.dtypes import FLOAT_DTYPES, bits_dtype
from relexkit.weights.safetensors_io import ITEM_BYTES, TensorInfo

_SLICE = 2**16  # elements of each tensor in the miniature


@dataclass(frozen=True)
class Estimate:
    """What an import would do. Sizes in bytes.

    Attributes:
        steps: the steps that would be recorded.
        dtypes, encodings: of the recorded tensors.
        step_bytes, base_bytes: of the store (0 for a base by reference); ``checkpoint_bytes`` of
            the weights that it stands for.
        seconds: of the import, at the speed of the miniature; None for adapters, which are small.
        sampled: share of the elements that the miniature held.
        notes, left_out: see ``ImportResult``.
    """

    steps: list[int]
    num_tensors: int
    num_parameters: int
    dtypes: list[str]
    encodings: list[str]
    step_bytes: int
    base_bytes: int
    checkpoint_bytes: int
    seconds: float | None
    sampled: float
    notes: list[str]
    left_out: dict[str, str]


def estimate_import(
    source: str | Path, *, steps: str | None = None, reading: Reading = PLAIN
) -> Estimate:
    """Estimate an import with the same arguments. Reads ``2**16`` elements of every tensor in up to
    four steps; writes nothing.

    The size of a step is that of the second and the last one, as differences from their neighbours:
    where changes grow or shrink in between, a sparse log may turn out larger or smaller. Of
    weight-sync deltas the first three are taken, and applied whole.

    Raises:
        CheckpointError: see ``import_checkpoints``; or the source is on the hub, where nothing can
            be read without a download.
    """
    base = reading.base
    if is_hub(source) or (base is not None and is_hub(base)):
        raise CheckpointError(
            f"{source}: --dry-run reads from a sample of the weights; expected folders, not a hub"
            " repository"
        )
    run = open_run(source, source_format=reading.source_format, step_map=reading.step_map)
    wanted = [s for s in select_steps(run.steps, steps) if s > 0]
    if not wanted:
        raise CheckpointError(
            f"{source}: holds no step after the base; expected at least one step from 1 upwards"
        )
    base = named_base(run, wanted[0]) if base is None else base
    if base is None and 0 not in run.steps:
        raise CheckpointError(
            f"{source}: has no step 0, so the base is unknown; give the base model with --base DIR"
        )
    if base is None and reading.base_by_reference:
        raise no_reference(source)
    with closing(run.checkpoint(0) if base is None else open_base(str(base))) as original:
        view, over, said = seen_alike(run, original, wanted[0], reading.exclude)
        with closing(view.checkpoint(wanted[0])) as first:
            if first.factors:
                estimate = _of_adapters(first, run, wanted)
            else:
                estimate = _of_miniature(view, over, first, run, wanted, reading)
                estimate = replace(estimate, notes=[*estimate.notes, *said])
            return replace(estimate, base_bytes=0) if reading.base_by_reference else estimate


def _of_adapters(first: Checkpoint, run: Run, wanted: list[int]) -> Estimate:
    """Factors are stored unchanged, and whole tensors nearly so."""
    factors = sum(spec.numel * bits_dtype(spec.dtype).itemsize for spec in first.factors.values())
    touched = [n for n in first.tensors if n not in first.still and n not in first.factors]
    whole = [first.tensors[n] for n in touched if first.tensors[n].dtype in FLOAT_DTYPES]
    adapter_bytes = factors + sum(info.num_bytes for info in whole)
    infos, dtypes = first.tensors.values(), sorted({spec.dtype for spec in first.factors.values()})
    return Estimate(
        wanted,
        len(infos),
        sum(i.numel for i in infos),
        dtypes,
        ["factors"],
        adapter_bytes * len(wanted),
        sum(i.num_bytes for i in infos),
        adapter_bytes * len(wanted),
        None,
        1.0,
        run.notes,
        run.left_out,
    )


def _of_miniature(
    view: Run,
    base: Checkpoint,
    first: Checkpoint,
    run: Run,
    wanted: list[int],
    reading: Reading,
) -> Estimate:
    # neighbours at the beginning and at the end, so that two of the differences are those of single
    # steps
    sample = sorted({*wanted[:2], *wanted[-2:]})
    if isinstance(view, ChainedRun):  # the last step costs as much as all of them
        sample = wanted[:3]
    single = [
        row
        for row, step in enumerate(sample)
        if step in (wanted[min(1, len(wanted) - 1)], sample[-1])
    ]
    whole, held = (sum(i.num_bytes for i in c.tensors.values()) for c in (first, _Slice(first)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "miniature.zarr"
        small, small_base = _SlicedRun(view), _Slice(base)
        create_for(out, small, sample, Base(small_base, "the base"), reading, DEFAULT)
        times: list[float] = []
        with SharedWriter(out, ALONE) as writer:
            began, small.opening_seconds = time.perf_counter(), 0.0
            append_all(
                small,
                sample,
                writer,
                small_base,
                replace(DEFAULT, progress=lambda *_: times.append(time.perf_counter())),
            )
            opening = small.opening_seconds
            working = time.perf_counter() - began - opening
        store = TrajectoryStore(out)
        step_bytes = np.mean([_row_bytes(store, row) for row in single]) * whole / held
        base_bytes = store.num_bytes()["base"] * whole / held
    moving = [part for part in store.layout.parts if part.moves]
    return Estimate(
        wanted,
        len(first.tensors),
        sum(i.numel for i in first.tensors.values()),
        sorted({p.dtype for p in moving}),
        sorted({p.encoding for p in moving}),
        int(step_bytes * len(wanted)),
        int(base_bytes),
        whole * len(wanted),
        (working * whole / held + opening) / len(sample) * len(wanted),
        held / whole,
        run.notes,
        run.left_out,
    )


def _row_bytes(store: TrajectoryStore, row: int) -> int:
    """Bytes of one step in a local store."""
    names = [n for p in range(len(store.layout.parts)) for n in store.encoding(p).arrays(p)]
    files = [path for name in names for path in Path(store.path, name).glob(f"c/{row}/*")]
    return sum(os.path.getsize(path) for path in files)


class _Slice(WholeTensors):
    """The middle of every tensor of a checkpoint, flat."""

    def __init__(self, inner: Checkpoint):
        self._inner = inner
        self.description, self.files, self.metrics, self.close = (
            inner.description,
            inner.files,
            inner.metrics,
            inner.close,
        )
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo((min(info.numel, _SLICE),), info.dtype)
            for name, info in inner.tensors.items()
        }

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``relexkit.checkpoints.Checkpoint``."""
        skipped = (self._inner.tensors[name].numel - self.tensors[name].numel) // 2
        info = self._inner.tensors[name]
        item = (
            1 if info.dtype in FLOAT_DTYPES else ITEM_BYTES[info.dtype]
        )  # those are read by bytes
        self._inner.read_into(name, start + skipped * item, out)


class _SlicedRun:
    def __init__(self, inner: Run):
        self._inner = inner
        self.description, self.steps, self.notes, self.left_out = (
            inner.description,
            inner.steps,
            inner.notes,
            inner.left_out,
        )

        self.opening_seconds = 0.0

    def checkpoint(self, step: int) -> _Slice:
        """Open one step; its time is counted separately, since it is that of whole tensors."""
        began = time.perf_counter()
        opened = self._inner.checkpoint(step)
        self.opening_seconds += time.perf_counter() - began
        return _Slice(opened)
