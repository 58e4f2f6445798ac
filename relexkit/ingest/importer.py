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

from relexkit.checkpoints import Checkpoint, Run, open_run
from relexkit.checkpoints.chain import ChainedRun
from relexkit.checkpoints.formats.hub import Hub, HubRun, is_hub
from relexkit.checkpoints.formats.peft import named_base, over_base
from relexkit.checkpoints.model_names import named_alike
from relexkit.checkpoints.one_sided import KeptFromBase, refuse_exclude, sides
from relexkit.checkpoints.referenced import no_reference, open_base, reference_to
from relexkit.checkpoints.same_tensors import check_tensors
from relexkit.checkpoints.stored import StoredBase
from relexkit.checkpoints.tied import heads_on_one_side, with_heads
from relexkit.checkpoints.version_run import WeightSyncRun
from relexkit.checkpoints.view import RunView
from relexkit.errors import CheckpointError, RelexkitError
from relexkit.gram_matrix.compute.distributed import ALONE, Team
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.gram_matrix.exact import gram as gram_matrices
from relexkit.gram_matrix.exact import known_steps
from relexkit.gram_matrix.pca import choose
from relexkit.ingest.append import Appender
from relexkit.ingest.branches import check_branch, compare_steps, is_base_throughout
from relexkit.ingest.columns import base_reader
from relexkit.ingest.creation import Base, create_for, sampled_density
from relexkit.ingest.reading import Reading
from relexkit.ingest.shared_writer import SharedWriter
from relexkit.store import (
    NotAStoreError,
    ProgressCallback,
    StoreWriter,
    TrajectoryStore,
    base_sha256,
    describe_steps,
)
from relexkit.weights.dtypes import FLOAT_DTYPES


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
    base_by_reference: bool = False,
    steps: str | None = None,
    encoding: Literal["auto", "exact", "float"] = "auto",
    mantissa_bits: int | None = None,
    source_format: str | None = None,
    step_map: str | None = None,
    exclude: Sequence[str] = (),
    rewind: bool = False,
    continues: bool = False,
    known_until: int = 0,
    gram: bool = False,
    memory_budget_bytes: int = 5 * 2**26,
    team: Team = ALONE,
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
        base_by_reference: keep in the store where the base is, and checksums of it, instead of its
            weights. Whatever needs it later reads it there, compared with the checksums, or where
            the environment variable ``RELEXKIT_BASE`` says that it is now. From the hub it is
            downloaded into the cache that other programs use, and stays there.
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
        exclude: regular expressions, searched for in tensor names: what matches keeps the base's
            values in every step, or is left out if the base lacks it. Tensors that trainers are
            known to drop or to add (``mtp.*``, layers beyond the model's, rotary frequencies; value
            heads) are treated so without being named, and reported.
        rewind: the run was resumed and written anew: remove the recorded steps after the last one
            that is still the same, and record it again from there.
        continues: the run goes on from the store although no step is in both.
        known_until: the recorded steps up to this one need not be compared, because the caller has
            just imported them.
        gram: also compute the Gram matrices of what was added, as the command does, so that no
            later question about the run's shape reads weights; of runs for which ``--pca auto``
            approximates them they are left to the question.
        memory_budget_bytes: bound on the weights of the previous step (or base) kept in memory;
            what does not fit is read again from its file.
        team: every process of it makes this call, where all see source and ``out``; each reads,
            encodes and writes the parts that it owns, and the first one commits the steps.

    From the hub one revision at a time is downloaded into ``OUT.download``, checked, differenced
    and deleted: the disk never holds more than two checkpoints, and heads are not tested for being
    tied, which would take a second download.

    Steps that the store has already are compared with the run's, in samples of where the run moves;
    a run that differs, or shares no step, is refused. Weight-sync deltas need one copy of the model
    beside ``OUT`` while they are applied.

    Reads every checkpoint once, and the base twice (a process its parts); a head and an embedding
    that may be tied are read once more, and so is what does not fit the budget. Memory: the budget,
    a few blocks of 2**22 elements, the changes of one step, and for dense encodings two rows of a
    part.

    Raises:
        CheckpointError: a checkpoint is damaged, not finite, or does not have the base's tensors.
        StoreError: ``out`` is something else, belongs to another run, is being written, or the disk
            is full.
        RelexkitError: another process of the team failed.
    """
    reading = Reading(
        base=base,
        base_by_reference=base_by_reference,
        encoding=encoding,
        mantissa_bits=mantissa_bits,
        source_format=source_format,
        step_map=step_map,
        exclude=tuple(exclude),
    )
    compute = Compute(team=team, memory_budget_bytes=memory_budget_bytes, progress=progress)
    joining = _Joining(steps=steps, rewind=rewind, continues=continues, known_until=known_until)
    with team.together():
        result = _imported(source, out, reading, joining, compute)
        if gram:
            result.notes.extend(_keep_gram_matrices(result.store, compute))
        if bool(result.added) and team.share(lambda: is_base_throughout(result.store)):
            result.notes.append(
                "every step equals the base bit for bit: nothing was trained, or these are not the"
                " trained weights (a merged folder beside an adapter may be the base: --format"
                " peft)"
            )
    return result


@dataclass(frozen=True, kw_only=True)
class _Joining:
    """Which steps are wanted, and how they join those of a store; see ``import_checkpoints``."""

    steps: str | None
    rewind: bool
    continues: bool
    known_until: int


def _imported(
    source: str | Path, out: str | Path, reading: Reading, joining: _Joining, compute: Compute
) -> ImportResult:
    team = compute.team
    with ExitStack() as stack:
        hub = stack.enter_context(closing(Hub(Path(f"{out}.download"))))
        run: Run
        if is_hub(source):
            _refuse_several(source, team)
            run = HubRun(str(source), hub, reading.step_map)
        else:
            run = open_run(
                source,
                source_format=reading.source_format,
                step_map=reading.step_map,
                kept=TrajectoryStore(out) if _is_store(out) else None,
                scratch=_scratch(out),
            )
        wanted = team.share(lambda: select_steps(run.steps, joining.steps))
        base_checkpoint, base_words, wanted = _open_base(run, reading, wanted, source, hub, team)
        stack.enter_context(closing(base_checkpoint))
        view, over, said = seen_alike(run, base_checkpoint, wanted[0], reading.exclude)
        notes = [*run.notes, *said]
        created = team.share(lambda: not _is_store(out))
        if created:
            sampled = wanted[:1] if is_hub(source) else wanted
            reference = None
            if reading.base_by_reference:
                reference = reference_to(base_checkpoint, base_words, over)
            described = Base(over, base_words, reference)
            notes += create_for(out, view, sampled, described, reading, compute)
        left_out = team.share(lambda: {**run.left_out, **_step_zero(run, reading, view, over)})
        if not team.rank:
            writer = stack.enter_context(SharedWriter(out, team))
            if not created:
                _check_same_base(writer.store, over, reading)
                notes += _join(writer, run, view, wanted, joining)
        team.share(lambda: None)  # the first process has the lock, and has removed what it must
        if team.rank:
            writer = stack.enter_context(SharedWriter(out, team))
        if is_hub(base_words) and not reading.base_by_reference:
            # the store has it by now, and the disk needs the room
            base_checkpoint.close()
            view, over, _ = seen_alike(run, StoredBase(writer.store), wanted[0], reading.exclude)
        recorded = {int(s) for s in writer.store.steps}
        new = _new_steps(wanted, recorded, source, out)
        if new:
            append_all(view, new, writer, over, compute)
    team.share(lambda: None)  # the first process has released the store
    already = [s for s in wanted if s in recorded]
    return ImportResult(TrajectoryStore(out), new, already, notes, left_out)


def _keep_gram_matrices(store: TrajectoryStore, compute: Compute) -> list[str]:
    """Compute what is missing of the Gram matrices, unless ``--pca auto`` approximates those of
    such a run; what a person should know of it.
    """

    def missing() -> bool:
        return known_steps(store) < len(store.steps)

    if not compute.team.share(lambda: missing() and choose(store).method == "exact"):
        return []
    gram_matrices(
        store,
        team=compute.team,
        memory_budget_bytes=compute.memory_budget_bytes,
        progress=compute.progress,
    )
    if not compute.team.share(missing):
        return []
    return [
        f"warning: the Gram matrices cannot be kept in {store.path} (no space, or another process"
        " keeps some): the steps are safe, and the next question computes them"
    ]


def _join(
    writer: StoreWriter, run: Run, view: Run, wanted: list[int], joining: _Joining
) -> list[str]:
    """Check that the run is the one in the store, and remove what it has written anew if asked to;
    returns what a person should know.
    """
    if isinstance(run, HubRun):
        recorded_steps = [int(s) for s in writer.store.steps]
        run.check_commits(writer.store.files(), recorded_steps)
        return []
    continues = joining.continues or isinstance(run, WeightSyncRun)  # by its versions
    known_until = joining.known_until
    store = writer.store
    comparison = compare_steps(store, view, known_until)
    recorded = {int(s) for s in store.steps}
    new = [s for s in wanted if s not in recorded]
    notes = check_branch(
        store,
        view,
        comparison,
        new,
        rewind=joining.rewind,
        continues=continues or known_until > 0,
    )
    last = max(comparison.last_agreeing(), known_until)
    removed = [s for s in recorded if s > last]
    if joining.rewind and last and removed:
        writer.truncate(last)
        notes.append(f"removed, to be recorded anew, what was recorded after step {last}")
    return notes


def _step_zero(run: Run, reading: Reading, view: Run, over: Checkpoint) -> dict[str, str]:
    """What to say of a step 0 beside a base that was given."""
    if reading.base is None or 0 not in run.steps or isinstance(run, HubRun):
        return {}
    with closing(view.checkpoint(0)) as first:
        if first.factors:
            return {"step 0": "is before the first step; the base is what --base gives"}
        names = {n: (i.shape, i.dtype) for n, i in first.tensors.items()}
        if _sampled_equal(first, over, names):
            return {"step 0": "is the base that --base gives"}
    return {
        "step 0": (
            "differs from the base that --base gives, and steps count from 1: if the trainer counts"
            ' its first trained step as 0, give --step-map FILE with {"0": 1, "1": 2, ...}'
        )
    }


def _sampled_equal(
    first: Checkpoint, base: Checkpoint, names: dict[str, tuple[tuple[int, ...], str]]
) -> bool:
    floats = [(n, shape, dtype) for n, (shape, dtype) in names.items() if dtype in FLOAT_DTYPES]
    density = sampled_density(floats, base, first)
    return bool(density) and not any(density.values())


def seen_alike(
    run: Run, base: Checkpoint, first_step: int, exclude: Sequence[str] = ()
) -> tuple[Run, Checkpoint, list[str]]:
    """Run and base with the same tensors under the same names, and what was done about those of one
    side, in words: adapters merged into the base, tied heads on both sides.
    """
    if isinstance(run, WeightSyncRun):
        refuse_exclude(exclude, "weight-sync deltas")
        return ChainedRun(run, base), base, []  # its tensors are the base's
    run, base = over_base(run, base, first_step)
    with closing(run.checkpoint(first_step)) as first:
        if first.factors:
            refuse_exclude(exclude, "adapters")
            return run, base, []
        run, base = named_alike(run, base, first)
    with closing(run.checkpoint(first_step)) as first:
        missing = heads_on_one_side(base, first)
        base = with_heads(base, missing)
        one_sided = sides(base, with_heads(first, missing), exclude)

    def view(step: Checkpoint) -> Checkpoint:
        return KeptFromBase(with_heads(step, missing), base, one_sided)

    return RunView(run, view), base, one_sided.notes()


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


def _refuse_several(source: str | Path, team: Team) -> None:
    """The hub's revisions are downloaded one at a time, by one process."""
    if team.size > 1:
        raise RelexkitError(
            f"{source}: is downloaded by one process, and {team.size} were started; leave torchrun"
            " out, or download it first"
        )


def _open_base(
    run: Run, reading: Reading, wanted: list[int], source: str | Path, hub: Hub, team: Team
) -> tuple[Checkpoint, str, list[int]]:
    after_base = [s for s in wanted if s > 0]
    if not after_base:
        raise CheckpointError(
            f"{source}: holds no step after the base; expected at least one step from 1 upwards"
        )
    base = named_base(run, after_base[0]) if reading.base is None else reading.base
    if base is not None and is_hub(base):
        _refuse_several(base, team)
        base = str(base)
        opened = open_base(base, check=True) if reading.base_by_reference else hub.open(base)
        return opened, opened.description, after_base
    if base is not None:
        return open_base(str(base)), str(base), after_base
    if 0 in run.steps:
        if reading.base_by_reference:
            raise no_reference(source)
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


# -- checking --------------------------------------------------------------------------------------


def _check_same_base(store: TrajectoryStore, base: Checkpoint, reading: Reading) -> None:
    """The store has this base and these options (it may have been created by an earlier,
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
    if reading.base_by_reference and store.reference is None:
        raise CheckpointError(
            f"{store.path} holds its base; leave --base-by-reference out, or choose another -o"
        )
    if reading.mantissa_bits not in (None, store.mantissa_bits):
        raise CheckpointError(
            f"{store.path} holds deltas with {store.mantissa_bits} mantissa bits, not"
            f" {reading.mantissa_bits}; leave --mantissa-bits out, or choose another -o"
        )
    kinds = {part.encoding for part in store.layout.parts if part.moves}
    if not store.has_factors and not reading.fits(kinds):
        raise CheckpointError(
            f"{store.path} is encoded as {', '.join(sorted(kinds))}; leave --encoding out, or"
            " choose another -o"
        )


# -- appending -------------------------------------------------------------------------------------


def append_all(
    run: Run, steps: list[int], writer: SharedWriter, base: Checkpoint, compute: Compute
) -> None:
    """Append steps of a run that fits the store, in order; every process of the writer's team makes
    this call.
    """
    with closing(run.checkpoint(steps[0])) as first:
        still = first.still
    budget, owned = compute.memory_budget_bytes, writer.owned
    with closing(Appender(writer, base, budget, owned=owned, still=still)) as appender:
        for done, step in enumerate(steps, 1):
            checkpoint = run.checkpoint(step)
            try:
                appender.append(step, checkpoint)
            except BaseException:
                checkpoint.close()
                raise
            if compute.progress:
                compute.progress("importing", done, len(steps))
