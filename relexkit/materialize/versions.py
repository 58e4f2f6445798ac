"""Checkpoints as weight-sync versions, which a running inference engine loads by pulling: what
changed against weights that it has.

The layout is that of slime, miles, modelexpress and SGLang's ``/pull_weights``;
``relexkit.checkpoints.formats.weight_sync`` reads it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np

from relexkit.checkpoints import Checkpoint, open_checkpoint
from relexkit.checkpoints.formats.huggingface import HuggingFaceCheckpoint
from relexkit.checkpoints.same_tensors import check_tensors
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import RelexkitError
from relexkit.materialize.folders import PROVENANCE, temporary_folder
from relexkit.store import blocks
from relexkit.weights.byte_deltas import BLOCK_BYTES, CHECKSUMS, xor_frame
from relexkit.weights.dtypes import bits_dtype
from relexkit.weights.safetensors_io import SafetensorsFile, SafetensorsFolderWriter, TensorInfo

_CHECKSUM = "xxh3-128"
_VERSION = re.compile(r"weight_v(\d{6,15})")


@dataclass(frozen=True)
class WeightSync:
    """Weights are written as versions for engines, not as folders.

    Attributes:
        against: what the engine has: a folder, the number of a recorded step, or 0 for the store's
            base.
        version: number of the first version; the engine has to be at the one before. If not given,
            the one after the last in the output folder, 1 if there is none.
    """

    against: str | Path | int
    version: int | None = None

    def __post_init__(self) -> None:
        if self.version is not None and self.version < 1:
            raise RelexkitError(
                f"--version {self.version} is too small; expected 1 or more: 0 is the engine's own"
                " model"
            )


@dataclass(frozen=True)
class Version:
    """A version that was written: its folder, and whether it was there already."""

    folder: Path
    already: bool


def write_versions(
    sync: WeightSync,
    out: Path,
    step_folder: Callable[[int, Path], Path],
    make: Callable[[Path], list[Path]],
) -> list[Version]:
    """Write the checkpoints that ``make`` writes below a folder as versions ``out/weight_v{N}``,
    each against the one before.

    Args:
        step_folder: writes a recorded step as a folder.

    Disk: one copy of the model for each checkpoint meanwhile, and one for a recorded base.

    Raises:
        CheckpointError: the base does not have the checkpoints' tensors.
        RelexkitError: a version of that number is there and is another one.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = _known(out)
    number = sync.version or max(known, default=0) + 1
    written: list[Version] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix=".relexkit-", dir=out)))
        words, base = _base(sync.against, scratch, step_folder)
        stack.enter_context(closing(base))
        for folder in make(scratch):
            new = stack.enter_context(closing(HuggingFaceCheckpoint(folder)))
            provenance = json.loads((folder / PROVENANCE).read_text()) | {"against": words}
            same = [n for n, recorded in known.items() if recorded == provenance]
            if same and sync.version in (None, *same):
                number = same[0]
            place = out / f"weight_v{number:06d}"
            if not same and os.path.lexists(place):
                raise RelexkitError(
                    f"{place}: exists and holds something else; choose another --version or -o"
                )
            if not same:
                _write(place, number, base, new, provenance)
            written.append(Version(place, bool(same)))
            words, base, number = place.name, new, number + 1
    return written


def _base(
    against: str | Path | int, scratch: Path, step_folder: Callable[[int, Path], Path]
) -> tuple[str, Checkpoint]:
    if isinstance(against, int):
        return f"recorded step {against}", open_checkpoint(
            step_folder(against, scratch / f"step-{against}-recorded")
        )
    return str(against), open_checkpoint(Path(against))


def _known(out: Path) -> dict[int, Any]:
    """Provenance of every version in a folder; None for one that is not ours."""
    provenances: dict[int, Any] = {}
    for path in out.iterdir():
        match = _VERSION.fullmatch(path.name)
        if match:
            try:
                provenances[int(match[1])] = json.loads((path / PROVENANCE).read_text())
            except (OSError, ValueError):
                provenances[int(match[1])] = None
    return provenances


def _write(
    place: Path, number: int, base: Checkpoint, new: Checkpoint, provenance: dict[str, Any]
) -> None:
    if base.tensors.keys() < new.tensors.keys():  # heads that the base leaves to the embedding
        new = CheckpointView(new, stored={name: name for name in base.tensors})
    expected = {name: (info.shape, info.dtype) for name, info in base.tensors.items()}
    check_tensors(expected, new, base.description, "the checkpoint")
    with temporary_folder(place) as folder:
        files = _write_deltas(folder, base, new)
        metadata = {
            "version": f"{number:06d}",
            "base_version": f"{number - 1:06d}",
            "delta_encoding": "xor",
            "compression_format": "zstd",
            "checksum_format": _CHECKSUM,
        }
        index = {"metadata": metadata, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def _write_deltas(folder: Path, base: Checkpoint, new: Checkpoint) -> dict[str, str]:
    """Write the deltas of the tensors that differ; returns the file of each."""
    with TemporaryFile(dir=folder.parent) as spool:
        frames: dict[str, TensorInfo] = {}
        checksums: dict[str, str] = {}
        for name, info in base.tensors.items():
            start = spool.tell()
            pairs = _Pairs(base, new, name, info)
            for piece in xor_frame(pairs, info.num_bytes):
                spool.write(piece)
            if pairs.differ:
                frames[name] = TensorInfo((spool.tell() - start,), "uint8")
                checksums[name] = pairs.hasher.hexdigest()
            else:
                spool.seek(start)
        if not frames:
            return {}
        spool.seek(0)
        with closing(SafetensorsFolderWriter(folder, frames, metadata=checksums)) as writer:
            for name, info in frames.items():
                for begin, end in blocks(info.num_bytes, BLOCK_BYTES):
                    writer.write(name, begin, np.frombuffer(spool.read(end - begin), np.uint8))
    files: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with closing(SafetensorsFile(path)) as file:
            files |= dict.fromkeys(file.tensors, path.name)
    return files


class _Pairs:
    """Old and new bytes of a tensor in blocks; afterwards whether they ``differ``, and the checksum
    of the new ones.
    """

    def __init__(self, base: Checkpoint, new: Checkpoint, name: str, info: TensorInfo):
        self._sides, self._name, self._info = (base, new), name, info
        self.hasher, self.differ = CHECKSUMS[_CHECKSUM](), False

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        bits = bits_dtype(self._info.dtype)
        for begin, end in blocks(self._info.num_bytes, BLOCK_BYTES):
            pair = []
            for side in self._sides:
                out = np.empty((end - begin) // bits.itemsize, bits)
                side.read_into(self._name, begin // bits.itemsize, out)
                pair.append(out.view(np.uint8))
            self.hasher.update(pair[1].data)
            self.differ = self.differ or not np.array_equal(pair[0], pair[1])
            yield pair[0], pair[1]
