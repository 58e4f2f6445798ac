"""Turn checkpoints into store steps as they appear, and delete them afterwards if asked to."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from relexkit.checkpoints import Run, SavedRun, open_run
from relexkit.checkpoints.formats.hub import is_hub
from relexkit.checkpoints.formats.peft import named_base
from relexkit.checkpoints.same_tensors import check_tensors
from relexkit.checkpoints.stored import StoredBase
from relexkit.errors import CheckpointError, RelexkitError
from relexkit.ingest.importer import import_checkpoints, seen_alike
from relexkit.ingest.readback import DroppedFromMemory, ReadBack
from relexkit.ingest.reading import Reading
from relexkit.store import NotAStoreError, TrajectoryStore, durable


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What ``watch`` waits for, and what it deletes.

    Attributes:
        every: only steps that are multiples of this; the others are not deleted either.
        continues: the run goes on from the store although no step is in both.
        delete_after: delete a checkpoint's folder once a later one is stored as well: the newest
            stays, to resume from. Right before, the whole checkpoint is compared with what the
            disk holds of the store; one that the trainer has written again since stays, and is
            reported. The same holds for links, and for what another checkpoint or the base links
            to. Started again after a kill, it goes on with what is still to be deleted. Needs an
            exact store, or ``encoding="float"`` to say that rounded deltas are enough. Holds one
            more copy of 16-bit weights.
        poll_seconds: between two looks at the folder.
        idle_seconds: stop when nothing came for so long; None to go on until interrupted.

    Raises:
        RelexkitError: ``every`` or ``poll_seconds`` is not positive.
    """

    every: int = 1
    continues: bool = False
    delete_after: bool = False
    poll_seconds: float = 5.0
    idle_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.poll_seconds <= 0:
            raise RelexkitError(
                f"every {self.every} and poll {self.poll_seconds:g} s; expected at least 1 step and"
                " more than 0 s"
            )


def watch(
    source: str | Path,
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda message: None,
    **settings: Any,
) -> TrajectoryStore:
    """Import every checkpoint of ``source`` into ``out`` as soon as it is whole, until nothing came
    for ``idle_seconds``.

    A checkpoint is whole if its reader finds it complete and the trainer has written its marker, or
    nothing in its folder has changed between two looks. Steps that lie before the last recorded one
    are reported and left out.

    Args:
        say: told what happens, a line at a time.
        settings: fields of ``Watching``; and ``base``, ``encoding``, ``mantissa_bits``,
            ``source_format``, ``step_map`` and ``exclude`` as for ``import_checkpoints``.

    Raises:
        CheckpointError: a checkpoint does not belong to the run, or is not finite.
        StoreError: see ``import_checkpoints``; or the store is damaged, and then nothing is
            deleted.
        RelexkitError: the store, the base and the checkpoints lie inside each other.
    """
    names = {field.name for field in fields(Watching)}
    watching = Watching(**{name: value for name, value in settings.items() if name in names})
    reading = Reading(**{name: value for name, value in settings.items() if name not in names})
    watcher = _Watcher(source, Path(out), reading, watching, say)
    quiet_since = time.monotonic()
    while True:
        if watcher.look():
            quiet_since = time.monotonic()
        elif (
            watching.idle_seconds is not None
            and time.monotonic() - quiet_since >= watching.idle_seconds
        ):
            return TrajectoryStore(out)
        time.sleep(watching.poll_seconds)


class _Watcher:
    def __init__(
        self,
        source: str | Path,
        out: Path,
        reading: Reading,
        watching: Watching,
        say: Callable[[str], None],
    ):
        self._source, self._out, self._say = source, out, say
        self._reading, self._format = reading, reading.source_format
        self._every, self._continues = watching.every, watching.continues
        self._delete_after, self._base = watching.delete_after, _local(reading.base)
        self._known_until = 0
        self._seen: dict[int, Any] = {}
        self._kept: dict[int, Any] = {}
        self._told: set[str] = set()
        self._read_back: ReadBack | None = None
        self._view: tuple[SavedRun, Run] | None = None
        self._memory = DroppedFromMemory(str(out))

    def look(self) -> bool:
        """Import what is whole by now, delete what is due; True if there was anything."""
        run = self._run()
        if run is None:
            return False
        if self._reading.base is None and self._base is None and run.format == "peft":
            self._base = _local(named_base(run, run.steps[-1]))
        self._check_places(run)
        last = self._last_recorded()
        ready = []
        for step in run.steps:
            if step == 0 or step % self._every or (last is not None and step <= last):
                self._tell_if_skipped(step, last)
            elif self._settled(run, step):
                ready.append(step)
            else:
                break  # steps are recorded in order
        did = self._delete_earlier(run)  # what a former watcher, or the last look, has left
        for step in ready:
            try:
                import_checkpoints(
                    self._source,
                    self._out,
                    **vars(replace(self._reading, source_format=run.format)),
                    steps=f"{step}:{step}",
                    continues=self._continues,
                    known_until=self._known_until,
                )
            except (RelexkitError, OSError):
                if run.stamp(step) == self._seen[step]:
                    raise
                self._say(
                    f"step {step} was changed or deleted while it was read; it is not recorded yet"
                )
                return did
            did = True
            self._format, self._known_until = run.format, step
            self._say(f"step {step} recorded")
            self._delete_earlier(run)
        return did

    def _run(self) -> SavedRun | None:
        """The run as it is now; None if no step is whole yet."""
        if "://" not in str(self._source) or is_hub(self._source):
            if not Path(self._source).is_dir():
                raise CheckpointError(
                    f"{self._source}: no such folder; expected the one that the trainer saves into"
                )
            if self._delete_after:
                _remove_left(Path(self._source))
        try:
            kept = TrajectoryStore(self._out)
        except NotAStoreError:
            kept = None
        try:
            return open_run(
                self._source,
                source_format=self._format,
                step_map=self._reading.step_map,
                kept=kept,
            )
        except CheckpointError as error:
            self._tell(f"waiting: {error}")
            return None
        except OSError:  # a folder went away while it was looked at
            return None

    def _check_places(self, run: SavedRun) -> None:
        """The store, the base and the checkpoints must not lie inside each other."""
        if "://" in str(self._source):
            return
        out = Path(os.path.realpath(self._out))
        if Path(os.path.realpath(self._source)).is_relative_to(out):
            raise RelexkitError(
                f"{self._source}: lies inside the store {self._out}; choose another -o"
            )
        for step in run.steps:
            folder = Path(os.path.realpath(run.folder(step)))
            if _inside_each_other(folder, out):
                raise RelexkitError(
                    f"{self._out}: the store and the checkpoint {run.folder(step)} lie inside each"
                    " other; choose another -o"
                )
            if (
                self._delete_after
                and step
                and self._base is not None
                and _inside_each_other(folder, Path(os.path.realpath(self._base)))
            ):
                raise RelexkitError(
                    f"{self._base}: the base and the checkpoint {run.folder(step)} lie inside each"
                    " other, and --delete-after would delete it; copy the base elsewhere"
                )

    def _last_recorded(self) -> int | None:
        try:
            steps = TrajectoryStore(self._out).steps
        except NotAStoreError:
            return None
        return int(steps[-1]) if len(steps) else 0

    def _tell_if_skipped(self, step: int, last: int | None) -> None:
        if (
            last is not None
            and 0 < step < last
            and step % self._every == 0
            and step not in TrajectoryStore(self._out).steps
        ):
            self._tell(
                f"step {step} came after step {last} was recorded; steps are recorded in order:"
                " left out"
            )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._say(message)

    def _settled(self, run: SavedRun, step: int) -> bool:
        now = run.stamp(step)
        before, self._seen[step] = self._seen.get(step), now
        return bool(now) and (before == now or run.is_marked(step))

    # -- deleting ----------------------------------------------------------------------------------

    def _delete_earlier(self, run: SavedRun) -> bool:
        """Delete the checkpoints of recorded steps but the newest one that is there, each right
        after it was found equal to what the disk holds of the store; True if there was one.
        """
        if not self._delete_after:
            return False
        try:
            store = TrajectoryStore(self._out)
        except NotAStoreError:
            return False
        if not store.exact and not self._reading.rounds:
            raise RelexkitError(
                f"{self._out}: holds deltas rounded to {store.mantissa_bits} mantissa bits, so"
                " nothing was deleted; expected --encoding exact, or --encoding float to say that"
                " this is enough"
            )
        recorded = {int(step) for step in store.steps}
        there = [
            step
            for step in run.steps
            if step in recorded and step % self._every == 0 and run.folder(step).is_dir()
        ]
        owed = [s for s in there[:-1] if run.stamp(s) != self._kept.get(s)]
        if owed:
            self._memory.drop()
        deleted = [step for step in owed if self._delete(run, store, step, there)]
        return bool(deleted)

    def _delete(self, run: SavedRun, store: TrajectoryStore, step: int, there: list[int]) -> bool:
        folder = run.folder(step)
        files = run.stamp(step)
        reason = self._reason_to_keep(run, step, there)
        if reason is None:
            reason = self._difference(run, store, step)
        if not folder.is_dir() or (reason is None and run.stamp(step) != files):
            return False  # it is gone, or being written again: the next look compares anew
        if reason is not None:
            self._kept[step] = files
            self._say(f"{folder.name} {reason}; it is not deleted")
            return False
        # under another name first, on the disk, so that no crash leaves half of a checkpoint
        left = folder.with_name(_LEFT.format(folder.name))
        durable.rename(folder, left)
        durable.fsync(folder.parent)
        shutil.rmtree(left)
        self._say(f"{folder.name} deleted")
        return True

    def _reason_to_keep(self, run: SavedRun, step: int, there: list[int]) -> str | None:
        folder = run.folder(step)
        if folder.is_symlink():
            return "is a link"
        others = [run.folder(other) for other in {0, *there} & {*run.steps} if other != step]
        for other in [*others, *([self._base] if self._base is not None else [])]:
            if _links_into(other, folder):
                return f"holds files that {other.name} links to"
        return None

    def _difference(self, run: SavedRun, store: TrajectoryStore, step: int) -> str | None:
        row = store.row_of(step)
        if (
            self._read_back is None
            or not self._read_back.follow(store)
            or row <= self._read_back.row
        ):
            self._read_back = ReadBack(store)
        try:
            if self._view is None or self._view[0] is not run:
                # one for all steps of a look: of a chain of deltas it goes on where it was
                self._view = run, seen_alike(run, StoredBase(store), step, self._reading.exclude)[0]
            with closing(self._view[1].checkpoint(step)) as checkpoint:
                expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
                check_tensors(expected, checkpoint, f"the store {store.path}", f"step {step}")
                tensor = self._read_back.difference(row, checkpoint)
        except (CheckpointError, OSError) as error:
            self._read_back = self._view = None
            return f"cannot be compared with the recorded step {step} ({error})"
        if tensor is None:
            return None
        store.verify()  # or is it the store that has changed?
        return (
            f"differs from the recorded step {step}, near tensor {tensor!r}: it was written again"
            " after it was recorded"
        )


_LEFT = ".{}.relexkit-deletes"


def _local(base: str | Path | None) -> Path | None:
    return None if base is None or "://" in str(base) else Path(base)


def _inside_each_other(first: Path, second: Path) -> bool:
    return first.is_relative_to(second) or second.is_relative_to(first)


def _links_into(folder: Path, target: Path) -> bool:
    """Whether ``folder`` is a link, or holds one, that leads into ``target``."""
    inside = Path(os.path.realpath(target))
    links = [folder, *folder.rglob("*")] if folder.is_dir() else []
    return any(
        Path(os.path.realpath(path)).is_relative_to(inside) for path in links if path.is_symlink()
    )


def _remove_left(source: Path) -> None:
    """What a kill has left of checkpoints that were compared and renamed to be deleted."""
    name = _LEFT.format("*")
    for left in [*source.glob(name), *source.glob(f"*/{name}")]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
