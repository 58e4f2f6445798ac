"""Checkpoints of an existing run into a trajectory store: each checkpoint is read once, in blocks,
and differenced.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from relexkit.checkpoints import ChangingCheckpoint, Checkpoint, Run, open_checkpoint, open_run
from relexkit.checkpoints.chain import ChainedRun
from relexkit.checkpoints.formats.hub import Hub, HubRun, is_hub
from relexkit.checkpoints.formats.peft import AdaptedCheckpoint, named_base, over_base
from relexkit.checkpoints.same_tensors import WIDENED, check_tensors
from relexkit.checkpoints.stored import StoredBase
from relexkit.checkpoints.tied import RunWithHeads, heads_on_one_side, tied_tensors, with_heads
from relexkit.checkpoints.version_run import WeightSyncRun
from relexkit.errors import CheckpointError, RelexkitError
from relexkit.ingest.append import Appender, base_reader, read_columns
from relexkit.store import (
    NotAStoreError,
    ProgressCallback,
    StoreWriter,
    TrajectoryStore,
    base_sha256,
    create_store,
    describe_steps,
)
from relexkit.store.encodings.bits import BLOCK, float_row
from relexkit.version import __version__
from relexkit.weights.dtypes import FLOAT_DTYPES, bits_dtype, widen_bits
from relexkit.weights.layout import Encoding, build_layout

DEFAULT_MANTISSA_BITS = 10
SPARSE_BELOW = 1 / 8
"""A dtype whose neighbouring checkpoints differ in a smaller share of the weights is stored as a
sparse log.
"""

_SAMPLE_ELEMENTS = 2**14


@dataclass(frozen=True)
class ImportResult:
    """What an import did.

    Attributes:
        store: open for reading.
        added, already: steps that it added, steps that were already there.
        notes: what a person should know: the format that was taken, what else lay there, tied
            weights that differ.
        left_out: checkpoints that are not whole, and why.
    """

    store: TrajectoryStore
    added: list[int]
    already: list[int]
    notes: list[str]
    left_out: dict[str, str]


def import_checkpoints(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    steps: str | None = None,
    encoding: Literal["auto", "exact", "float"] = "auto",
    mantissa_bits: int | None = None,
    source_format: str | None = None,
    step_map: str | None = None,
    memory_budget_bytes: int = 5 * 2**26,
    progress: ProgressCallback | None = None,
) -> ImportResult:
    """Import checkpoints into the store ``out``; run again, it adds what is new or was interrupted.

    Checkpoints that are not whole (a missing marker, rank or file, a truncated one) are left out
    and reported.

    Args:
        source: folder with one sub-folder for each step; ``hf://OWNER/NAME``, a hub repository with
            branches ``step_N``; or the URL of a folder of weight-sync versions.
        base: folder of the base model, or ``hf://OWNER/NAME``; without it the run's step 0 is the
            base. Adapters may name it.
        steps: ``"A:B"`` or ``"A:B:C"``: only steps from A to B, both included, whose number is A
            plus a multiple of C.
        encoding: ``exact`` keeps every bit, ``float`` rounded float deltas; ``auto`` is exact for
            16-bit checkpoints and for float32 ones that hardly change, else float.
        mantissa_bits: explicit mantissa bits of float deltas, 1 to 23 (10 if not given): a relative
            error of at most ``2 ** -(mantissa_bits + 1)`` of each delta.
        source_format: ``peft``, ``huggingface``, ``verl``, ``dcp``, ``deepspeed`` or
            ``weight-sync``; the most precise one there if not given.
        step_map: optimizer steps per label (``"2"``, ``"1/4"``) or a JSON file ``{label: step}``,
            where folders are not numbered by optimizer steps; ``steps`` then means optimizer steps,
            and labels are kept as the metric ``label``.
        memory_budget_bytes: bound on the weights of the previous step (or base) kept in memory;
            what does not fit is read again from its file.

    From the hub one revision at a time is downloaded into ``OUT.download``, checked, differenced
    and deleted: the disk never holds more than two checkpoints, and heads are not tested for being
    tied, which would take a second download.

    Weight-sync deltas need one copy of the model beside ``OUT`` while they are applied.

    Reads every checkpoint once, and the base twice; a head and an embedding that may be tied are
    read once more, and so is what does not fit the budget. Memory: the budget, a few blocks of
    2**22 elements, the changes of one step, and for dense encodings two rows of a part.

    Raises:
        CheckpointError: a checkpoint is damaged, not finite, or does not have the base's tensors.
        StoreError: ``out`` is something else, belongs to another run, is being written, or the disk
            is full.
    """
    _check_encoding(encoding, mantissa_bits)
    with closing(Hub(Path(f"{out}.download"))) as hub:
        run: Run
        if is_hub(source):
            run = HubRun(str(source), hub, step_map)
        else:
            run = open_run(
                source,
                source_format=source_format,
                step_map=step_map,
                kept=TrajectoryStore(out) if _is_store(out) else None,
                scratch=_scratch(out),
            )
        wanted = select_steps(run.steps, steps)
        base_checkpoint, base_words, wanted = _open_base(run, base, wanted, source, hub)
        with closing(base_checkpoint):
            view, over = seen_alike(run, base_checkpoint, wanted[0])
            notes = list(run.notes)
            created = not _is_store(out)
            if created:
                sampled = wanted[:1] if is_hub(source) else wanted
                notes += create_for(
                    out, view, sampled, over, base_words, encoding, mantissa_bits, progress
                )
            with StoreWriter(out) as writer:
                if not created:
                    _check_same_run(writer.store, view, over, encoding, mantissa_bits)
                    if isinstance(run, HubRun):
                        run.check_commits(
                            writer.store.files(), [int(s) for s in writer.store.steps]
                        )
                if is_hub(base_words):  # the store has it by now, and the disk needs the room
                    base_checkpoint.close()
                    view, over = seen_alike(run, StoredBase(writer.store), wanted[0])
                recorded = {int(s) for s in writer.store.steps}
                new = _new_steps(wanted, recorded, source, out)
                if new:
                    append_all(view, new, writer, over, memory_budget_bytes, progress)
    return ImportResult(
        TrajectoryStore(out), new, [s for s in wanted if s in recorded], notes, run.left_out
    )


def seen_alike(run: Run, base: Checkpoint, first_step: int) -> tuple[Run, Checkpoint]:
    """Run and base with the same tensors: adapters merged into the base, tied heads on both
    sides.
    """
    run = (
        ChainedRun(run, base)
        if isinstance(run, WeightSyncRun)
        else over_base(run, base, first_step)
    )
    if isinstance(run, ChainedRun):  # its tensors are the base's
        return run, base
    with closing(run.checkpoint(first_step)) as first:
        missing = heads_on_one_side(base, first)
    return RunWithHeads(run, missing), with_heads(base, missing)


def _new_steps(
    wanted: list[int], recorded: set[int], source: str | Path, out: str | Path
) -> list[int]:
    new = [s for s in wanted if s not in recorded]
    if new and recorded and new[0] < max(recorded):
        raise CheckpointError(
            f"step {new[0]} of {source} lies before step {max(recorded)}, the last one recorded in"
            f" {out}; steps are recorded in order: import into a new store"
        )
    return new


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
        raise RelexkitError(
            f"--steps {selection!r} is not a range; expected A:B or A:B:C with whole numbers"
        ) from None
    chosen = [s for s in available if low <= s <= high and (s - low) % every == 0]
    if not chosen:
        raise RelexkitError(
            f"--steps {selection} selects no step; the run holds"
            f" {describe_steps(np.asarray(available))}"
        )
    return chosen


def _check_encoding(encoding: str, mantissa_bits: int | None) -> None:
    if encoding not in ("auto", "exact", "float"):
        raise RelexkitError(f"--encoding {encoding} is unknown; choose auto, exact or float")
    if mantissa_bits is not None and not 1 <= mantissa_bits <= 23:
        raise RelexkitError(f"--mantissa-bits {mantissa_bits} is out of range; expected 1 to 23")
    if mantissa_bits is not None and encoding == "exact":
        raise RelexkitError(
            "--mantissa-bits has no effect with --encoding exact; leave one of them out"
        )


def _open_base(
    run: Run, base: str | Path | None, wanted: list[int], source: str | Path, hub: Hub
) -> tuple[Checkpoint, str, list[int]]:
    after_base = [s for s in wanted if s > 0]
    if not after_base:
        raise CheckpointError(
            f"{source}: holds no step after the base; expected at least one step from 1 upwards"
        )
    base = named_base(run, after_base[0]) if base is None else base
    if base is not None and is_hub(base):
        opened = hub.open(str(base))
        return opened, opened.description, after_base
    if base is not None:
        return open_checkpoint(Path(base)), str(base), after_base
    if 0 in run.steps:
        return run.checkpoint(0), f"step 0 of {source}", after_base
    raise CheckpointError(
        f"{source}: has no step 0, so the base is unknown; give the base model with --base DIR"
    )


def _scratch(out: str | Path) -> Path | None:
    """The folder that a local store lies in: what has to be unpacked goes there."""
    parent = Path(out).absolute().parent
    return parent if "://" not in str(out) and parent.is_dir() else None


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


# -- creating --------------------------------------------------------------------------------------


def create_for(
    out: str | Path,
    run: Run,
    steps: list[int],
    base: Checkpoint,
    base_words: str,
    encoding: str,
    mantissa_bits: int | None,
    progress: ProgressCallback | None,
) -> list[str]:
    """Create the store; returns what is odd about tied weights, in words."""
    with closing(run.checkpoint(steps[0])) as first:
        names = {n: (i.shape, i.dtype) for n, i in first.tensors.items()}
        check_tensors(names, base, f"step {steps[0]}", base_words, widen=True)
        files = {**base.files(), **first.files()}
        order = [(name, *names[name]) for name in first.tensors]
        adapted = first if isinstance(first, AdaptedCheckpoint) else None
        factors, still = (adapted.factors, adapted.still) if adapted else ({}, frozenset[str]())
    tied, notes = tied_tensors(run, [] if adapted else steps, base)
    if adapted:  # what an adapter leaves alone needs no look at the steps
        tied = {head: embedding for head, embedding in tied.items() if {head, embedding} <= still}
    moving = [t for t in order if t[0] not in factors and t[0] not in still]
    encodings = _choose_encodings(moving, run, steps, base, encoding)
    layout = build_layout(order, encodings, tied, factors=factors, still=still)
    bits = (mantissa_bits or DEFAULT_MANTISSA_BITS) if "float" in encodings.values() else None
    create_store(
        out,
        layout,
        base_reader(base, layout),
        files=files,
        source=run.description,
        base=base_words,
        mantissa_bits=bits,
        version=__version__,
        progress=progress,
    )
    return notes


def _choose_encodings(
    order: list[tuple[str, tuple[int, ...], str]],
    run: Run,
    steps: list[int],
    base: Checkpoint,
    encoding: str,
) -> dict[str, Encoding]:
    """Encoding of each float dtype, from a sample of what changed between the last two
    checkpoints.
    """
    dtypes = sorted({dtype for _, _, dtype in order if dtype in FLOAT_DTYPES})
    if encoding == "float":
        return dict.fromkeys(dtypes, "float")
    try:
        if isinstance(run, ChainedRun):  # its last step costs as much as all of them
            steps = steps[:1]
        with ExitStack() as stack:
            last = stack.enter_context(closing(run.checkpoint(steps[-1])))
            earlier = (
                stack.enter_context(closing(run.checkpoint(steps[-2]))) if len(steps) > 1 else base
            )
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


def _sampled_density(
    order: list[tuple[str, tuple[int, ...], str]], earlier: Checkpoint, later: Checkpoint
) -> dict[str, float]:
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


# -- checking --------------------------------------------------------------------------------------


def _check_same_run(
    store: TrajectoryStore, run: Run, base: Checkpoint, encoding: str, mantissa_bits: int | None
) -> None:
    """The store belongs to this run, base and options (it may have been created by an earlier,
    interrupted call).
    """
    expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
    check_tensors(expected, base, f"the store {store.path}", "the base", widen=True)
    if (
        base_sha256(store.layout, base_reader(base, store.layout))
        != store.attributes["base"]["sha256"]
    ):
        raise CheckpointError(
            f"the base differs from the one in {store.path}"
            f" ({store.attributes['base']['description']}); give the same --base, or another -o"
        )
    if mantissa_bits is not None and mantissa_bits != store.mantissa_bits:
        raise CheckpointError(
            f"{store.path} holds deltas with {store.mantissa_bits} mantissa bits, not"
            f" {mantissa_bits}; leave --mantissa-bits out, or choose another -o"
        )
    kinds = {p.encoding for p in store.layout.parts} - {"fixed"} if not store.has_factors else set()
    if (encoding == "exact" and "float" in kinds) or (encoding == "float" and kinds - {"float"}):
        raise CheckpointError(
            f"{store.path} is encoded as {', '.join(sorted(kinds))}; leave --encoding out, or"
            " choose another -o"
        )
    _check_last_step(store, run, base)


def _check_last_step(store: TrajectoryStore, run: Run, base: Checkpoint) -> None:
    """The last recorded step, if the run still has it, holds what the store holds, in the first
    block of every part.
    """
    last = int(store.steps[-1]) if len(store.steps) else 0
    if last not in run.steps or not last:
        return
    with closing(run.checkpoint(last)) as checkpoint:
        expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
        check_tensors(expected, checkpoint, f"the store {store.path}", f"step {last}")
        for part, spec in enumerate(store.layout.parts):
            end = min(spec.numel, BLOCK)
            if isinstance(checkpoint, AdaptedCheckpoint) and spec.encoding == "factors":
                bits = checkpoint.factor_bits(store.layout.segments_in(part)[0].tensor.name)
                if not np.array_equal(bits, store.read_factor_bits(part, len(store.steps) - 1)):
                    raise _another_run(store, last)
                continue
            current = read_columns(checkpoint, store.layout, part, 0, end, f"step {last}")
            if spec.encoding == "float":
                reference = read_columns(base, store.layout, part, 0, end, "the base")
                row = store.read_row(part, len(store.steps) - 1, 0, end)
                same = np.array_equal(
                    float_row(reference, current, spec.dtype, store.mantissa_bits or 23), row
                )
            else:
                same = np.array_equal(current, store.read_state(part, len(store.steps) - 1, 0, end))
            if not same:
                raise _another_run(store, last)


def _another_run(store: TrajectoryStore, step: int) -> CheckpointError:
    return CheckpointError(
        f"step {step} of the run differs from the one recorded in {store.path}: this is another"
        " run; choose another -o"
    )


# -- appending -------------------------------------------------------------------------------------


def append_all(
    run: Run,
    steps: list[int],
    writer: StoreWriter,
    base: Checkpoint,
    memory_budget_bytes: int,
    progress: ProgressCallback | None,
) -> None:
    """Append steps of a run that fits the store, in order."""
    with closing(run.checkpoint(steps[0])) as first:
        still = first.still if isinstance(first, AdaptedCheckpoint) else ()
        changing = isinstance(first, ChangingCheckpoint)
    with closing(
        Appender(writer, base, memory_budget_bytes, still=still, changing=changing)
    ) as appender:
        for done, step in enumerate(steps, 1):
            checkpoint = run.checkpoint(step)
            try:
                appender.append(step, checkpoint)
            except BaseException:
                checkpoint.close()
                raise
            if progress:
                progress("importing", done, len(steps))
