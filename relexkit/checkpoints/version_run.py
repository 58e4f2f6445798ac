"""The versions of weights that a trainer sent to its inference engines, as a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relexkit.checkpoints.folders import Folder, LocalFolder, open_folder
from relexkit.checkpoints.formats.huggingface import HuggingFaceCheckpoint
from relexkit.checkpoints.formats.weight_sync import (
    LAYOUTS,
    DeltaFiles,
    Header,
    Layout,
    open_deltas,
    parse,
)
from relexkit.checkpoints.protocol import Checkpoint
from relexkit.checkpoints.runs import labels_by_step
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import CheckpointError
from relexkit.store import TrajectoryStore

_BELOW = ("", "deltas")  # SkyRL's receivers keep what they fetched one level deeper


def find_versions(
    source: str | Path, scratch: Path | None = None
) -> tuple[Folder, Layout, dict[int, str]] | None:
    """The versions in or one level below a source: where they lie, how, and version -> folder; None
    if there are none.

    Raises:
        CheckpointError: versions of two trainers, or two folders for one version.
    """
    for below in _BELOW:
        path = f"{str(source).rstrip('/')}/{below}" if below else source
        if "://" not in str(path) and not Path(path).is_dir():
            continue
        folder = open_folder(path, scratch)
        names = folder.names()
        kinds = [
            (layout, [(m, n) for n in names for m in [layout.pattern.fullmatch(n)] if m])
            for layout in LAYOUTS
        ]
        kinds = [(layout, matches) for layout, matches in kinds if matches]
        if len(kinds) > 1:
            raise CheckpointError(
                f"{path}: holds {' and '.join(k.title for k, _ in kinds)}; expected those of one"
                " run: move them apart"
            )
        for layout, matches in kinds:
            versions: dict[int, str] = {}
            for match, name in matches:
                number = int(match[1])
                if number in versions:
                    raise CheckpointError(
                        f"version {number} occurs twice in {path}: {versions[number]} and {name};"
                        " remove one"
                    )
                versions[number] = name
            return folder, layout, versions
    return None


class WeightSyncRun:
    """Versions of weights as a run; see ``relexkit.checkpoints.Run``. On its own the checkpoints of
    deltas are compressed bytes; over a base (``relexkit.checkpoints.chain``) they are weights.

    Args:
        source: folder or URL.
        label_step: optimizer step of a version; None if versions are steps.
        kept: a store of this run; the versions after its last step may go on from it.
        scratch: folder for what has to be unpacked or downloaded; the system's if not given.

    Attributes:
        parents: accepted version -> version that it applies to, None for a whole one.
        versions: step -> version.
    """

    format = "weight-sync"

    def __init__(
        self,
        source: str | Path,
        *,
        label_step: Callable[[int], int | None] | None = None,
        kept: TrajectoryStore | None = None,
        scratch: Path | None = None,
    ):
        located = find_versions(source, scratch)
        if located is None:
            raise CheckpointError(
                f"{source}: holds no versions; expected sub-folders such as weight_v000001 or"
                " delta-00000001"
            )
        self._folder, self._layout, self._names = located
        self.scratch = scratch
        self._mapped = label_step is not None
        self.left_out: dict[str, str] = {}
        self.description = f"{self._layout.title} in {str(source).rstrip('/').rpartition('/')[2]}"
        headers = self._headers()
        self.kept, self.kept_version = kept, None
        if kept is not None and kept.exact and len(kept.steps):
            last = int(kept.steps[-1])
            known = {*self._names, *(h.base for h in headers.values() if h.base is not None)}
            step_of = label_step or (lambda version: version)
            self.kept_version = next((v for v in sorted(known) if v and step_of(v) == last), None)
        self.parents = self._accept(headers)
        self.versions = labels_by_step(sorted(self.parents), label_step, self.left_out)
        self.steps = sorted(self.versions)
        whole = sum(parent is None for parent in self.parents.values())
        self.notes = [
            f"read as {self._layout.title}: {len(self.steps)} versions, {whole} of them whole"
        ]
        if not self._mapped:
            self.notes.append(
                "versions are taken for optimizer steps; if one is several steps, give --step-map"
            )
        if not self.steps:
            first = next(iter(self.left_out.items()), ("", ""))
            raise CheckpointError(f"{source}: holds no usable version; {first[0]}: {first[1]}")

    def _headers(self) -> dict[int, Header]:
        headers = {}
        for number, name in sorted(self._names.items()):
            try:
                headers[number] = self._header(number, name)
            except CheckpointError as error:
                self.left_out[f"version {number}"] = str(error)
        return headers

    def _header(self, number: int, name: str) -> Header:
        content = self._folder.small(f"{name}/{self._layout.manifest}")
        header = None if content is None else parse(self._layout, content, name)[1]
        if header is None and not self._layout.has_whole:
            raise CheckpointError(
                f"{name}: has no {self._layout.manifest}, which is written last: it was being"
                " written"
                if content is None
                else f"{name}/{self._layout.manifest}: does not describe a version"
            )
        if isinstance(self._folder, LocalFolder):  # a download shows it later
            with self.opened(number, whole=header is None):
                pass
        if header is None:
            return Header(number, None)
        if header.number != number:
            raise CheckpointError(f"{name}: says that it is version {header.number}; it was moved")
        return header

    def _accept(self, headers: Mapping[int, Header]) -> dict[int, int | None]:
        """The versions whose bases are all there."""
        parents: dict[int, int | None] = {}
        reachable = {0, *([self.kept_version] if self.kept_version else [])}
        for number, header in sorted(headers.items()):
            base = header.base
            if base is None or (base < number and base in reachable):
                parents[number] = base
                reachable.add(number)
            elif base >= number:
                self.left_out[f"version {number}"] = (
                    f"says that it applies to version {base}, which does not come before it"
                )
            else:
                why = "was left out" if base in self._names else "is not there"
                self.left_out[f"version {number}"] = (
                    f"applies to version {base}, which {why}: the chain is broken from here to the"
                    " next whole version"
                )
        return parents

    @contextmanager
    def opened(self, version: int, *, whole: bool) -> Iterator[DeltaFiles | HuggingFaceCheckpoint]:
        """The files of a version: deltas, or whole weights.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        with self._folder.local(self._names[version]) as folder:
            opened = HuggingFaceCheckpoint(folder) if whole else open_deltas(self._layout, folder)
            try:
                yield opened
            finally:
                opened.close()

    def has(self, version: int) -> bool:
        """True if the folder of an accepted version is there."""
        return version in self.parents

    def metrics_of(self, step: int) -> dict[str, float]:
        """The version, if a map makes steps of versions."""
        return {"label": float(self.versions[step])} if self._mapped else {}

    def folder(self, step: int) -> Path:
        """The local folder of a step.

        Raises:
            CheckpointError: it lies in object storage.
        """
        if not isinstance(self._folder, LocalFolder):
            raise CheckpointError(
                f"{self.description}: lies in object storage, where nothing is deleted; leave"
                " --delete-after out"
            )
        return self._folder.path / self._names[self.versions[step]]

    def stamp(self, step: int) -> list[tuple[str, int, str]]:
        """Name, size and time of every file of a step."""
        return self._folder.stamp(self._names[self.versions[step]])

    def is_marked(self, step: int) -> bool:
        """True if the file that is written last is there."""
        return self.parents[self.versions[step]] is not None

    def checkpoint(self, step: int) -> Checkpoint:
        """Open one step as it is stored; of deltas these are compressed bytes.

        Raises:
            CheckpointError: no such step, or it is damaged; the message names the step.
        """
        self.check_step(step)
        version = self.versions[step]
        context = self.opened(version, whole=self.parents[version] is None)
        try:
            inner = context.__enter__()
        except CheckpointError as error:
            raise CheckpointError(f"step {step}: {error}") from None
        return _Opened(inner, context, self.metrics_of(step))

    def check_step(self, step: int) -> None:
        """Refuse a step that the run does not hold.

        Raises:
            CheckpointError: see above.
        """
        if step not in self.versions:
            raise CheckpointError(
                f"step {step}: the run holds {len(self.steps)} steps, up to {self.steps[-1]}"
            )


class _Opened(CheckpointView):
    """A version whose download goes when it is closed."""

    def __init__(self, inner: Checkpoint, context: Any, metrics: Mapping[str, float]):
        super().__init__(inner, metrics=metrics)
        self._context = context

    def close(self) -> None:
        """Close the files."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None
