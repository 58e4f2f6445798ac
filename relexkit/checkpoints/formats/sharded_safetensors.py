"""Safetensors files of each rank with pieces of tensors: NeMo-RL's default, and what PyTorch's
``HuggingFaceStorageWriter`` leaves where nothing consolidates it.

``shard-RRRRR-model-CCCCC-of-NNNNN.safetensors``; the header's ``DCP_SHARDING_INFO`` has the place
of each piece in its tensor. A tensor's shape is written nowhere: it is where its pieces end.
"""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

from relexkit.checkpoints.formats.huggingface import trainer_metrics
from relexkit.checkpoints.formats.key_names import model_names
from relexkit.checkpoints.small_files import model_files
from relexkit.checkpoints.torchfile.regions import (
    Block,
    Chunk,
    PiecewiseTensor,
    PiecewiseTensors,
    ReadOnlyFile,
    contiguous_stride,
)
from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import ITEM_BYTES, SafetensorsFile, TensorInfo

_SHARD = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
_INSIDE = (".", "policy/weights/model", "weights/model", "model", "sharded")
_INFO = "DCP_SHARDING_INFO"


def find(folder: Path) -> Path | None:
    """The folder with the shards, in or below a step's folder."""
    for inside in _INSIDE:
        place = folder / inside
        if place.is_dir() and any(_SHARD.fullmatch(path.name) for path in place.iterdir()):
            return place
    return None


class ShardedSafetensors(PiecewiseTensors):
    """The shards of all ranks as one checkpoint. Opening reads headers only; see
    ``relexkit.checkpoints.Checkpoint``.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        paths = _whole_set(folder)
        pieces: dict[str, list[tuple[Chunk, str]]] = {}
        for path in paths:
            for name, chunk, dtype in _pieces(path):
                pieces.setdefault(name, []).append((chunk, dtype))
        tensors = {}
        for name, tensor_pieces in pieces.items():
            try:
                tensors[name] = _assembled(tensor_pieces)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: tensor {name!r}: {error}") from None
        super().__init__({name: tensors[key] for key, name in model_names(tensors).items()})
        ranks = len({match[1] for p in paths for match in [_SHARD.fullmatch(p.name)] if match})
        self.description = f"safetensors shards of {ranks} rank{'s' * (ranks > 1)} in {folder}"

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer: NeMo-RL writes them into ``.hf_metadata`` and beside the
        weights.
        """
        tokenizer = self.folder.parents[1] / "tokenizer"
        places = (tokenizer, self.folder.parent, self.folder / ".hf_metadata", self.folder)
        return {name: content for p in places for name, content in model_files(p).items()}

    def metrics(self) -> dict[str, float]:
        """See ``trainer_metrics``."""
        return trainer_metrics(self.folder)

    def close(self) -> None:
        """Nothing is held open."""


def _whole_set(folder: Path) -> list[Path]:
    """The shards, all ranks' from the first to the last."""
    paths = sorted(p for p in folder.iterdir() if _SHARD.fullmatch(p.name))
    matches = [m for p in paths for m in [_SHARD.fullmatch(p.name)] if m]
    if not paths:
        raise CheckpointError(f"{folder}: holds no shards; expected shard-00001-model-...")
    ranks = {int(m[1]) for m in matches}
    missing = sorted(set(range(1, max(ranks) + 1)) - ranks)
    if missing:
        raise CheckpointError(
            f"{folder}: of at least {max(ranks)} ranks the shards of {missing[0]} are missing; copy"
            " them all"
        )
    if len({m[3] for m in matches}) > 1:
        raise CheckpointError(
            f"{folder}: holds shards of several saves ({paths[0].name}, {paths[-1].name}); remove"
            " the older ones"
        )
    return paths


def _pieces(path: Path) -> list[tuple[str, Chunk, str]]:
    """Name, place and dtype of every piece in a file."""
    with closing(SafetensorsFile(path)) as file:
        try:
            offsets: Any = json.loads(file.metadata[_INFO])
            places = {name: tuple(offsets[name]["saved_offsets"]) for name in file.tensors}
            if any(type(n) is not int for place in places.values() for n in place):
                raise ValueError("an offset is not a whole number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: its header does not say where the pieces belong"
                f" ({type(error).__name__}: {str(error)[:80]}); copy it again"
            ) from None
        source = ReadOnlyFile(path)
        return [
            (
                name,
                Chunk(
                    places[name],
                    Block(
                        source,
                        file.offset(name),
                        ITEM_BYTES[info.dtype],
                        info.shape,
                        contiguous_stride(info.shape),
                    ),
                ),
                info.dtype,
            )
            for name, info in file.tensors.items()
        ]


def _assembled(pieces: list[tuple[Chunk, str]]) -> PiecewiseTensor:
    chunks, dtypes = [chunk for chunk, _ in pieces], {dtype for _, dtype in pieces}
    dimensions = {len(n) for chunk in chunks for n in (chunk.offsets, chunk.block.shape)}
    if len(dtypes) > 1 or len(dimensions) > 1:
        raise CheckpointError("the ranks disagree about its dtype or its number of dimensions")
    if any(offset < 0 or offset > 2**48 for chunk in chunks for offset in chunk.offsets):
        raise CheckpointError("a piece has an impossible place")
    shape = tuple(
        max(chunk.offsets[d] + chunk.block.shape[d] for chunk in chunks)
        for d in range(dimensions.pop())
    )
    return PiecewiseTensor(TensorInfo(shape, dtypes.pop()), chunks)
