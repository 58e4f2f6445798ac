"""A new store for a run: which tensors are tied, which encoding each dtype gets."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relexkit.checkpoints import Checkpoint, Run
from relexkit.checkpoints.chain import ChainedRun
from relexkit.checkpoints.same_tensors import WIDENED, check_tensors
from relexkit.checkpoints.small_files import merged_files
from relexkit.checkpoints.tied import tied_tensors
from relexkit.errors import CheckpointError
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.ingest.columns import base_reader
from relexkit.ingest.reading import DEFAULT_MANTISSA_BITS, Reading
from relexkit.ingest.shared_writer import creation
from relexkit.store import About, Reference, build_layout, create_store
from relexkit.weights.dtypes import FLOAT_DTYPES, bits_dtype, widen_bits
from relexkit.weights.layout import Layout

_SAMPLE_ELEMENTS = 2**14


class Base(NamedTuple):
    """The base of a run; where it came from, in words; and what the store keeps in its place."""

    checkpoint: Checkpoint
    words: str
    reference: Reference | None = None


def create_for(
    out: str | Path,
    run: Run,
    steps: list[int],
    base: Base,
    reading: Reading,
    compute: Compute,
) -> list[str]:
    """Create the store, with the processes of ``compute.team``; returns anything odd about tied
    weights, in words.
    """
    team = compute.team
    layout, about, notes = team.share(lambda: _planned(run, steps, base, reading))
    read_base = base_reader(base.checkpoint, layout)
    create_store(out, layout, read_base, about, compute.progress, creation(layout, team))
    return notes


def _planned(
    run: Run, steps: list[int], base: Base, reading: Reading
) -> tuple[Layout, About, list[str]]:
    """Layout and description of the store, and anything odd about tied weights, in words."""
    with closing(run.checkpoint(steps[0])) as first:
        names = {n: (i.shape, i.dtype) for n, i in first.tensors.items()}
        check_tensors(names, base.checkpoint, f"step {steps[0]}", base.words, widen=True)
        files = merged_files(base.checkpoint.files(), first.files())
        order = [(name, *names[name]) for name in first.tensors]
        factors, still = first.factors, frozenset(first.still)
    tied, notes = tied_tensors(run, [] if factors else steps, base.checkpoint)
    if factors:  # what an adapter leaves alone needs no look at the steps
        tied = {head: embedding for head, embedding in tied.items() if {head, embedding} <= still}
    moving = [t for t in order if t[0] not in factors and t[0] not in still]
    encodings = _choose_encodings(moving, run, steps, base.checkpoint, reading)
    layout = build_layout(order, encodings, tied, factors=factors, still=still)
    about = About(
        source=run.description,
        base=base.words,
        files=files,
        mantissa_bits=reading.mantissa_bits or DEFAULT_MANTISSA_BITS,
        reference=base.reference,
    )
    return layout, about, notes


def _choose_encodings(
    order: list[tuple[str, tuple[int, ...], str]],
    run: Run,
    steps: list[int],
    base: Checkpoint,
    reading: Reading,
) -> dict[str, str]:
    """Encoding of each float dtype, from a sample of what changed between the last two
    checkpoints.
    """
    dtypes = sorted({dtype for _, _, dtype in order if dtype in FLOAT_DTYPES})
    if reading.is_named:
        return dict.fromkeys(dtypes, reading.encoding)
    try:
        if isinstance(run, ChainedRun):  # its last step costs as much as all of them
            steps = steps[:1]
        with ExitStack() as stack:
            last = stack.enter_context(closing(run.checkpoint(steps[-1])))
            earlier = (
                stack.enter_context(closing(run.checkpoint(steps[-2]))) if len(steps) > 1 else base
            )
            density = sampled_density(order, earlier, last)
    except CheckpointError:  # damaged: the import reports it when it comes to that step
        with closing(run.checkpoint(steps[0])) as first:
            density = sampled_density(order, base, first)
    return {dtype: reading.encoding_of(dtype, density.get(dtype, 0.0)) for dtype in dtypes}


def sampled_density(
    order: list[tuple[str, tuple[int, ...], str]], earlier: Checkpoint, later: Checkpoint
) -> dict[str, float]:
    """Share of the weights that differ between two checkpoints, by dtype, from the middle of every
    tensor of ``order`` (name, shape, dtype).
    """
    changed: dict[str, int] = {}
    seen: dict[str, int] = {}
    for name, shape, dtype in order:
        shapes = [c.tensors[name].shape for c in (earlier, later) if name in c.tensors]
        dtypes = {c.tensors[name].dtype for c in (earlier, later) if name in c.tensors}
        if (
            dtype not in FLOAT_DTYPES
            or shapes != [shape, shape]
            or not dtypes <= {dtype, *WIDENED.get(dtype, ())}
        ):
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
