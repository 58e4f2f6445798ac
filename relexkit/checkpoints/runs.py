"""A folder of steps as a run: which folders are steps, which of them are whole, and which of
several formats to take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from relexkit.checkpoints.folders import LocalFolder
from relexkit.checkpoints.formats.flat_files import STEP_FILE
from relexkit.checkpoints.formats.table import FORMATS, Format
from relexkit.checkpoints.protocol import Checkpoint
from relexkit.checkpoints.small_files import read_small
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import CheckpointError

_STEP = re.compile(
    r"(?:checkpoint[-_]|ckpt[-_]|global_steps?_?|step_?|step-|iter[-_]|epoch_|.+-step-)"
    r"(\d{1,15})(_hf)?"
)
_EPOCH = re.compile(r"epoch_\d+")
_UNFINISHED = re.compile(
    r"(?:tmp[-_]|old_)(?:checkpoint|step|global_step).*|.*\.(?:incomplete|tmp)"
)
_BELOW = ("_actor", "checkpoints")  # OpenRLHF and prime-rl keep the steps one level below the run
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MARKERS = ("STABLE", "trainer_state.json")  # written last by prime-rl; by Trainer and TRL
_PRECISIONS = ("float32", "bfloat16", "float16")
_ENOUGH = 0.5
"""A more precise source is taken if it has at least this share of the steps that another one has.
"""

SUPPORTED_NAMES = "checkpoint-N, global_step_N, step_N, iter_N, ckpt-N, epoch_N or weight_vN"


@dataclass
class Source:
    """One format in a run: the place of each whole step, and why others are not."""

    format: Format
    places: dict[int, Path] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    dtype: str = ""

    def __str__(self) -> str:
        steps = len(self.places)
        return f"{self.format.title}, {self.dtype}, {steps} step{'s' * (steps != 1)}"


class FolderRun:
    """A folder of step folders; see ``relexkit.checkpoints.Run``.

    Args:
        source: the folder.
        wanted: name of a format, or None for the most precise one.
        label_step: optimizer step of a label, or None if the run does not map it; None if labels
            are steps.

    Raises:
        CheckpointError: no steps, none of them whole, two folders for one step, or no such format
            there.
    """

    def __init__(
        self,
        source: Path,
        wanted: str | None = None,
        label_step: Callable[[int], int | None] | None = None,
    ):
        folders, self.left_out = step_folders(source)
        _check_epochs(folders, label_step, source)
        sources = _survey(folders)
        chosen = choose(sources, wanted, source)
        self.format = chosen.format.name
        self.dtype = chosen.dtype
        self.description = f"{chosen.format.title} in {source.name}"
        others = [s for s in sources if s is not chosen and s.places]
        self.notes = [f"read as {chosen}"]
        if others:
            also = "; ".join(f"{s} (--format {s.format.name})" for s in others)
            self.notes.append(f"also there: {also}")
        for label in sorted(folders.keys() - chosen.places.keys()):
            reason = f"has no {chosen.format.title}"
            if not any(label in s.places for s in others):
                reason = next(
                    (s.failures[label] for s in (chosen, *sources) if label in s.failures), reason
                )
            self.left_out[f"step {label}"] = chosen.failures.get(label, reason)
        self._format = chosen.format
        self._mapped = label_step is not None
        self._labels = labels_by_step(sorted(chosen.places), label_step, self.left_out)
        self._places = chosen.places
        self.steps = sorted(self._labels)
        if not self.steps:
            raise CheckpointError(
                f"{source}: the step map leaves no step; expected the labels"
                f" {sorted(chosen.places)[:5]}"
            )

    def folder(self, step: int) -> Path:
        """The folder that a trainer made for one step, with all that it saved there."""
        place = self._places[self._labels[step]]
        return next(
            path
            for path in (place, *place.parents)
            if _STEP.fullmatch(path.name) or STEP_FILE.fullmatch(path.name)
        )

    def stamp(self, step: int) -> list[tuple[str, int, str]]:
        """Name, size and time of every file of a step; nothing if it goes away meanwhile."""
        folder = self.folder(step)
        return LocalFolder(folder.parent).stamp(folder.name)

    def is_marked(self, step: int) -> bool:
        """True if the file that the trainer writes last is there."""
        return any((self.folder(step) / marker).is_file() for marker in _MARKERS)

    def checkpoint(self, step: int) -> Checkpoint:
        """Open one step.

        Raises:
            CheckpointError: it is damaged; the message names the step.
        """
        if step not in self._labels:
            reason = self.left_out.get(
                f"step {step}", f"the run holds {len(self.steps)} steps, up to {self.steps[-1]}"
            )
            raise CheckpointError(f"step {step}: {reason}")
        label = self._labels[step]
        try:
            checkpoint = self._format.open(self._places[label])
        except CheckpointError as error:
            raise CheckpointError(f"step {step}: {error}") from None
        return (
            CheckpointView(checkpoint, metrics={"label": float(label)})
            if self._mapped
            else checkpoint
        )


def step_folders(source: Path) -> tuple[dict[int, list[Path]], dict[str, str]]:
    """Label -> folders of that step (weights and, for OpenRLHF, an export beside), and what was not
    taken for a step.

    Raises:
        CheckpointError: no steps, or two folders for one step.
    """
    folders: dict[tuple[int, str], Path] = {}
    unfinished: dict[str, str] = {}
    places = [source, *(p for p in (source / name for name in _BELOW) if p.is_dir())]
    for path in (path for place in places for path in sorted(place.iterdir())):
        match = _STEP.fullmatch(path.name) if path.is_dir() else find_flat(path)
        if match is None:
            if _UNFINISHED.fullmatch(path.name) and path.is_dir():
                unfinished[path.name] = "is the name of a checkpoint that is being written"
            continue
        suffix = match[2] or "" if path.is_dir() else ""
        key = (
            int(match[1]),
            f"{path.parent.name}/{suffix}" if path.parent != source else suffix,
        )
        if key in folders:
            raise CheckpointError(
                f"step {key[0]} occurs twice in {source}: {folders[key].name} and {path.name};"
                " remove or rename one"
            )
        folders[key] = path
    if not folders:
        raise CheckpointError(
            f"{source}: holds no steps; expected sub-folders named {SUPPORTED_NAMES}"
        )
    by_label: dict[int, list[Path]] = {}
    for (label, _), path in sorted(folders.items()):
        by_label.setdefault(label, []).append(path)
    return by_label, unfinished


def has_steps(source: Path) -> bool:
    """True if a folder holds folders of steps."""
    places = [source, *(p for p in (source / name for name in _BELOW) if p.is_dir())]
    return any(
        _STEP.fullmatch(path.name) if path.is_dir() else find_flat(path)
        for place in places
        for path in place.iterdir()
    )


def find_flat(path: Path) -> re.Match[str] | None:
    """The name of a file that is a whole step."""
    return STEP_FILE.fullmatch(path.name) if path.is_file() else None


def _check_epochs(
    folders: dict[int, list[Path]], label_step: Callable[[int], int | None] | None, source: Path
) -> None:
    """Epochs are not optimizer steps, and ``epoch_0`` is the end of the first one, not the base."""
    names = [path.name for paths in folders.values() for path in paths]
    if not any(_EPOCH.fullmatch(name) for name in names):
        return
    if label_step is None or (0 in folders and not label_step(0)):
        raise CheckpointError(
            f"{source}: is numbered by epochs, and epoch_0 is the end of the first one; give the"
            ' optimizer step of each with --step-map FILE, such as {"0": 500, "1": 1000}'
        )


def _survey(folders: dict[int, list[Path]]) -> list[Source]:
    """Every format that occurs, with its whole steps. Reads the headers of every checkpoint."""
    sources = {f.name: Source(f) for f in FORMATS}
    missing: dict[int, str] = {}
    for label, paths in folders.items():
        matches = [
            (f, folder, place)
            for folder in paths
            for f in FORMATS
            for place in [_find(f, folder)]
            if place is not None
        ]
        if not matches:
            missing[label] = (
                f"{paths[0]}: holds no weights; expected model.safetensors, pytorch_model.bin, or"
                " files of another known format"
            )
        for f, folder, place in matches:
            source = sources[f.name]
            reason = unfinished_reason(folder, label)
            if reason is None and label not in source.places:
                reason = _try(source, place, label)
            if reason is not None and label not in source.places:
                source.failures[label] = reason
    for source in sources.values():
        if source.places:
            source.failures |= missing
    occurring = [s for s in sources.values() if s.places or s.failures]
    return occurring or [Source(FORMATS[0], failures=missing)]


def _find(f: Format, folder: Path) -> Path | None:
    try:
        if folder.is_file() != f.of_files:
            return None
        return f.find(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror or error})") from None


def _try(source: Source, place: Path, label: int) -> str | None:
    """Record a step that opens; otherwise the reason why it does not."""
    try:
        with closing(source.format.open(place)) as checkpoint:
            if not checkpoint.tensors:
                return f"{place}: holds no tensors"
            source.dtype = source.dtype or main_dtype(checkpoint)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{place}: cannot be read ({error.strerror or error})"
    source.places[label] = place
    return None


def unfinished_reason(folder: Path, label: int) -> str | None:
    """Why a step's folder must be taken for unfinished, by the file that its trainer writes
    last.
    """
    if (folder / "training_args.bin").is_file() and not (folder / "trainer_state.json").is_file():
        return (
            f"{folder}: has no trainer_state.json, which Trainer writes last: it was being written"
            " (if only whole weights were kept, remove training_args.bin too)"
        )
    if folder.parent.name == "broadcasts" and not (folder / "STABLE").is_file():
        return f"{folder}: has no STABLE, which prime-rl writes last: it was being written"
    marker = folder.parent / "latest_checkpointed_iteration.txt"
    try:
        latest = int(read_small(marker, 1000)) if marker.is_file() else label
    except (CheckpointError, ValueError):
        latest = label
    return f"{folder}: was being written: {marker.name} says {latest}" if label > latest else None


def main_dtype(checkpoint: Checkpoint) -> str:
    """The float dtype of most of a checkpoint's elements."""
    counts: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.startswith(("float", "bfloat")):
            counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
    return max(counts, key=lambda dtype: counts[dtype], default="no floats")


def choose(sources: list[Source], wanted: str | None, where: Path) -> Source:
    """The source to take: the wanted one, else the most precise one with enough of the steps.

    Raises:
        CheckpointError: the wanted format is not there, or nothing is whole.
    """
    if wanted is not None:
        names = [f.name for f in FORMATS if f.name != "unsupported"]
        if wanted not in names:
            raise CheckpointError(f"--format {wanted} is unknown; choose one of {', '.join(names)}")
        sources = [s for s in sources if s.format.name == wanted]
        if not sources:
            raise CheckpointError(
                f"{where}: holds no {wanted} checkpoints; leave --format out to see what is there"
            )
    whole = [s for s in sources if s.places]
    if not whole:
        label, reason = next(
            (item for s in sources for item in sorted(s.failures.items())),
            (None, "it holds no weights"),
        )
        raise CheckpointError(f"{where}: holds no whole checkpoint; step {label}: {reason}")
    most = max(len(s.places) for s in whole)
    enough = [s for s in whole if len(s.places) >= _ENOUGH * most]
    return min(
        enough,
        key=lambda s: _PRECISIONS.index(s.dtype) if s.dtype in _PRECISIONS else len(_PRECISIONS),
    )


def best_checkpoint(folder: Path, wanted: str | None = None) -> Checkpoint:
    """Open the most precise whole checkpoint in one folder.

    Raises:
        CheckpointError: there is none; with the reason of the first that is there.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; expected one with weights{hub_hint(folder)}"
        )
    sources = [
        Source(f, {0: place}) for f in FORMATS for place in [_find(f, folder)] if place is not None
    ]
    if len(sources) == 1 and wanted is None:
        return sources[0].format.open(sources[0].places[0])
    for source in sources:
        place = source.places.pop(0)
        reason = _try(source, place, 0)
        if reason is not None:
            source.failures[0] = reason
    if not sources:
        raise CheckpointError(
            f"{folder}: holds no weights; expected model.safetensors, pytorch_model.bin or their"
            " index there, in huggingface/ or in actor/huggingface/, or the files of verl,"
            " torch.distributed.checkpoint or DeepSpeed"
        )
    chosen = choose(sources, wanted, folder)
    return chosen.format.open(chosen.places[0])


def hub_hint(folder: str | Path) -> str:
    """What to add about a folder that is not there, if it looks like the name of a repository."""
    if _REPOSITORY.fullmatch(str(folder)):
        return f": a repository of the hub is written hf://{folder}"
    return ""


def read_step_map(text: str) -> Callable[[int], int | None]:
    """Label -> optimizer step, from ``--step-map``: a factor such as ``2`` or ``1/4``, or a JSON
    file ``{label: step}``.

    Raises:
        CheckpointError: it is neither.
    """
    try:
        factor = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return _step_map_file(Path(text))
    if factor <= 0:
        raise CheckpointError(
            f"--step-map {text} is not positive; expected optimizer steps per label"
        )

    def scaled(label: int) -> int:
        step = label * factor
        if step.denominator != 1:
            raise CheckpointError(
                f"--step-map {text} makes step {float(step):g} of label {label}; expected whole"
                " steps"
            )
        return int(step)

    return scaled


def _step_map_file(path: Path) -> Callable[[int], int | None]:
    if not path.is_file():
        raise CheckpointError(
            f"--step-map {path} is neither a number nor a file; expected a factor or a JSON file"
        )
    try:
        table = {int(label): step for label, step in json.loads(read_small(path)).items()}
        if any(type(step) is not int or step < 0 for step in table.values()):
            raise ValueError("a step is not a whole number")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{path}: is not a step map ({error}); expected JSON such as {{"50": 100}}'
        ) from None
    return table.get


def labels_by_step(
    labels: list[int], label_step: Callable[[int], int | None] | None, left_out: dict[str, str]
) -> dict[int, int]:
    """Optimizer step -> label; labels that the map does not name are added to ``left_out``."""
    if label_step is None:
        return {label: label for label in labels}
    label_of: dict[int, int] = {}
    for label in labels:
        step = label_step(label) if label else label_step(label) or 0
        if step is None:
            left_out[f"step {label}"] = "the step map does not name it"
        elif step in label_of:
            raise CheckpointError(
                f"the step map makes step {step} of the labels {label_of[step]} and {label};"
                " expected one each"
            )
        else:
            label_of[step] = label
    return label_of
