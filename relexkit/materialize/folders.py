"""Checkpoint folders: written under a temporary name, complete or not there, with the record of how
they were made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints.formats.hub import REVISIONS_FILE
from relexkit.checkpoints.formats.peft_config import CONFIG
from relexkit.checkpoints.tied import with_tie
from relexkit.errors import RelexkitError, StoreError, printable
from relexkit.gram_matrix.compute.distributed import ALONE, Team
from relexkit.store import TrajectoryStore, WriterLock, blocks
from relexkit.store.durable import replace_folder
from relexkit.weights.dtypes import FLOAT_DTYPES, ROUNDINGS
from relexkit.weights.layout import Segment
from relexkit.weights.safetensors_io import SafetensorsFolderWriter, TensorInfo

PROVENANCE = "relexkit.json"
"""File in a written folder that says exactly how it was made; a rerun skips a folder that already
says the same.
"""


@dataclass(frozen=True)
class FolderJob:
    """A checkpoint folder to be written, what ``relexkit.json`` will say, and its README (None for
    none).
    """

    folder: Path
    provenance: dict[str, Any]
    card: str | None


class PendingFolders:
    """Checkpoint folders of a store's tensors under temporary names; renamed when the block
    succeeds, else removed.

    Every process of ``team`` enters the block. Each writes weight files of its own; the first one
    makes the folders and completes them.
    """

    def __init__(
        self, store: TrajectoryStore, jobs: list[FolderJob], dtype: str | None, team: Team = ALONE
    ):
        self._store, self._jobs, self._dtype, self._team = store, jobs, dtype, team
        self._aliases = store.layout.aliases()
        self._tied = {t.name: t.tied_to for t in store.layout.tensors if t.tied_to}
        sizes = Counter[str]()
        for part in store.layout.parts:
            sizes[part.dtype] += part.numel if part.moves else 0
        self._dtypes = [dtype] if dtype else [name for name, _ in sizes.most_common()]

    def __enter__(self) -> PendingFolders:
        self._tensors = tensors = {
            t.name: TensorInfo(
                t.shape, (self._dtype or t.dtype) if t.dtype in FLOAT_DTYPES else t.dtype
            )
            for t in self._store.layout.tensors
        }
        share = self._team.rank, self._team.size
        with ExitStack() as stack:
            self._folders = self._team.share(
                lambda: [stack.enter_context(temporary_folder(job.folder)) for job in self._jobs]
            )
            self._writers = [
                stack.enter_context(closing(SafetensorsFolderWriter(f, tensors, share=share)))
                for f in self._folders
            ]
            self._stack = stack.pop_all()
        return self

    @property
    def needed(self) -> set[str]:
        """The tensors that this process writes; of tied ones those that have the elements."""
        return {self._tied.get(name, name) for name in self._writers[0].names}

    def write(self, index: int, segment: Segment, bits: np.ndarray) -> None:
        """Write a piece of a tensor, and of every tensor tied to it, into folder ``index``; what
        other processes write is left out.
        """
        writer = self._writers[index]
        for name in (segment.tensor.name, *self._aliases.get(segment.tensor.name, ())):
            if name in writer.names:
                writer.write(name, segment.start, bits)

    def write_fixed(self) -> None:
        """Write the tensors that are not float into every folder."""
        for part, spec in enumerate(self._store.layout.parts):
            if spec.moves:
                continue
            for begin, end in blocks(spec.numel):
                segments = self._store.layout.segments_in(part, begin, end)
                if not any(segment.tensor.name in self.needed for segment in segments):
                    continue
                raw = self._store.read_base(part, begin, end)
                for segment in segments:
                    low = segment.offset - begin
                    for index in range(len(self._jobs)):
                        self.write(index, segment, raw[low : low + segment.numel])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self._team.rank:
                for writer in self._writers:
                    writer.flush()
            self._team.gather(lambda: None)
            if self._team.rank:
                return
            files = self._store.files()
            if "config.json" in files:
                files["config.json"] = with_tie(files["config.json"], self._tensors, self._tied)
            for folder, job in zip(self._folders, self._jobs, strict=True):
                write_files(folder, files, self._dtypes, job.provenance, job.card)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its name if the block succeeds and vanishes if it
    does not.

    Raises:
        StoreError: the disk is full or the place cannot be written.
    """
    temporary = folder.parent / f".{folder.name}.partial"
    with WriterLock(str(temporary)):  # two commands may be asked for the same folder
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # a killed run may have left one
            temporary.mkdir(parents=True)
            yield temporary
            replace_folder(temporary, folder)
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be written ({error.strerror or error}); nothing was left there: "
                "free space or choose another -o"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_finished(folder: Path, provenance: Mapping[str, Any]) -> bool:
    """True if ``folder`` is a finished result of the same request; False if nothing is there.

    Raises:
        RelexkitError: something else is there.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        existing = json.loads((folder / PROVENANCE).read_text())
    except (OSError, ValueError):
        existing = None
    if existing == json.loads(json.dumps(provenance)):
        return True
    raise RelexkitError(
        f"{folder}: exists and holds something else; remove it or choose another -o"
    )


def write_files(
    folder: Path,
    files: Mapping[str, bytes],
    dtypes: list[str],
    provenance: Mapping[str, Any],
    card: str | None,
) -> None:
    """Write configuration, tokenizer, provenance and README into a checkpoint folder.

    A configuration that names another dtype than those of the weights (most frequent first) would
    make a loader round them, so it is corrected.
    """
    for name, content in files.items():
        if name in (CONFIG, REVISIONS_FILE):
            # a loader would look for an adapter beside merged weights; commits belong to the store
            continue
        if name == "config.json":
            content = _with_dtype(content, dtypes)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    if card is not None:
        (folder / "README.md").write_text(printable(card))


def _with_dtype(config: bytes, dtypes: list[str]) -> bytes:
    def corrected(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: (
                dtypes[0]
                if key in ("dtype", "torch_dtype") and inner not in dtypes
                else corrected(inner)
            )
            for key, inner in value.items()
        }

    try:
        document = json.loads(config)
    except ValueError:
        return config
    changed = corrected(document)
    return (
        config
        if changed == document or not dtypes
        else (json.dumps(changed, indent=2) + "\n").encode()
    )


def check_output(dtype: str | None, rounding: str) -> None:
    """Refuse an unknown output format or rounding."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise RelexkitError(f"--dtype {dtype} is unknown; choose one of {', '.join(FLOAT_DTYPES)}")
    if rounding not in ROUNDINGS:
        raise RelexkitError(f"--rounding {rounding} is unknown; choose {' or '.join(ROUNDINGS)}")
