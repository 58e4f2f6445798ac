"""Turn checkpoints into store steps as they appear, and delete them afterwards if asked to."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from relexkit.checkpoints import SavedRun, open_run
from relexkit.checkpoints.stored import StoredBase
from relexkit.errors import CheckpointError, RelexkitError
from relexkit.ingest.importer import import_checkpoints, seen_alike
from relexkit.ingest.readback import ReadBack
from relexkit.store import NotAStoreError, TrajectoryStore


def watch(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    every: int = 1,
    encoding: Literal["auto", "exact", "float"] = "auto",
    mantissa_bits: int | None = None,
    source_format: str | None = None,
    step_map: str | None = None,
    delete_after: bool = False,
    poll_seconds: float = 5.0,
    idle_seconds: float | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> TrajectoryStore:
    """Import every checkpoint of ``source`` into ``out`` as soon as it is whole, until nothing came
    for ``idle_seconds``.

    A checkpoint is whole if its reader finds it complete and the trainer has written its marker, or
    nothing in its folder has changed between two looks. Steps that lie before the last recorded one
    are reported and left out.

    Args:
        base, encoding, mantissa_bits, source_format, step_map: see ``import_checkpoints``.
        every: only steps that are multiples of this; the others are not deleted either.
        delete_after: delete a checkpoint's folder once its step has been read back from the store
            and found equal, and a later one is stored as well: the newest stays, to resume from.
            Needs an exact store, or ``encoding="float"`` to say that rounded deltas are enough.
            Holds one more copy of 16-bit weights.
        poll_seconds: between two looks at the folder.
        idle_seconds: None to go on until interrupted.

    Raises:
        CheckpointError: a checkpoint does not belong to the run, or is not finite.
        StoreError: see ``import_checkpoints``; or a step reads back differently, and then nothing
            is deleted.
    """
    if every < 1 or poll_seconds <= 0:
        raise RelexkitError(
            f"every {every} and poll {poll_seconds:g} s; expected at least 1 step and more than 0 s"
        )
    watcher = _Watcher(
        source,
        Path(out),
        every,
        source_format,
        step_map,
        delete_after,
        encoding == "float",
        say,
    )
    options = {
        "base": base,
        "encoding": encoding,
        "mantissa_bits": mantissa_bits,
        "step_map": step_map,
    }
    quiet_since = time.monotonic()
    while True:
        if watcher.look(options):
            quiet_since = time.monotonic()
        elif idle_seconds is not None and time.monotonic() - quiet_since >= idle_seconds:
            return TrajectoryStore(out)
        time.sleep(poll_seconds)


class _Watcher:
    def __init__(
        self,
        source: str | Path,
        out: Path,
        every: int,
        source_format: str | None,
        step_map: str | None,
        delete_after: bool,
        rounded_is_enough: bool,
        say: Callable[[str], None],
    ):
        self._source, self._out, self._every, self._format = source, out, every, source_format
        self._step_map = step_map
        self._delete_after, self._rounded_is_enough, self._say = (
            delete_after,
            rounded_is_enough,
            say,
        )
        self._seen: dict[int, Any] = {}
        self._told: set[str] = set()
        self._read_back: ReadBack | None = None
        self._deletable: list[Path] = []

    def look(self, options: dict[str, Any]) -> bool:
        """Import what is whole by now; True if there was anything."""
        run = self._run()
        if run is None:
            return False
        last = self._last_recorded()
        ready = []
        for step in run.steps:
            if step == 0 or step % self._every or (last is not None and step <= last):
                self._tell_if_skipped(step, last)
            elif self._settled(run, step):
                ready.append(step)
            else:
                break  # steps are recorded in order
        for count, step in enumerate(ready):
            try:
                import_checkpoints(
                    self._source,
                    self._out,
                    steps=f"{step}:{step}",
                    source_format=run.format,
                    **options,
                )
            except (RelexkitError, OSError):
                if run.stamp(step) == self._seen[step]:
                    raise
                self._say(
                    f"step {step} was changed or deleted while it was read; it is not recorded yet"
                )
                return count > 0
            self._format = run.format
            self._say(f"step {step} recorded")
            if self._delete_after:
                self._delete_earlier(run, step)
        return bool(ready)

    def _run(self) -> SavedRun | None:
        """The run as it is now; None if no step is whole yet."""
        if "://" not in str(self._source) and not Path(self._source).is_dir():
            raise CheckpointError(
                f"{self._source}: no such folder; expected the one that the trainer saves into"
            )
        try:
            kept = TrajectoryStore(self._out)
        except NotAStoreError:
            kept = None
        try:
            return open_run(
                self._source, source_format=self._format, step_map=self._step_map, kept=kept
            )
        except CheckpointError as error:
            self._tell(f"waiting: {error}")
            return None
        except OSError:  # a folder went away while it was looked at
            return None

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

    def _delete_earlier(self, run: SavedRun, step: int) -> None:
        """Read ``step`` back; then the checkpoints before it may go, as there is a newer one to
        resume from.
        """
        store = TrajectoryStore(self._out)
        if not store.exact and not self._rounded_is_enough:
            raise RelexkitError(
                f"{self._out}: holds deltas rounded to {store.mantissa_bits} mantissa bits, so"
                " nothing was deleted; expected --encoding exact, or --encoding float to say that"
                " this is enough"
            )
        row = store.row_of(step)
        if self._read_back is None:
            self._read_back = ReadBack(store, row - 1)
        self._read_back.follow(store)
        view, _ = seen_alike(run, StoredBase(store), step)
        with closing(view.checkpoint(step)) as checkpoint:
            self._read_back.check(row, checkpoint)
        for folder in self._deletable:
            shutil.rmtree(folder)
            self._say(f"{folder.name} deleted")
        self._deletable = [run.folder(step)]
