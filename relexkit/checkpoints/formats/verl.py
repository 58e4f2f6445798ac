"""verl's FSDP checkpoints: ``global_step_N/actor/model_world_size_W_rank_R.pt``, a state dict of
DTensors for each rank.

The shards hold what the optimizer trains, float32 unless configured otherwise, while verl's merged
export is bfloat16. Layout, from ``verl/utils/checkpoint/fsdp_checkpoint_manager.py``: under FSDP1 a
tensor is cut along dimension 0, under FSDP2 along the dimension that its placement names; with
hybrid sharding the first replica is enough; a rank's part carries no padding and may be empty; a
world of one process has plain tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from relexkit.checkpoints.formats.key_names import renamed
from relexkit.checkpoints.small_files import model_files, read_small
from relexkit.checkpoints.torchfile.regions import (
    Chunk,
    PiecewiseTensor,
    PiecewiseTensors,
    ReadOnlyFile,
)
from relexkit.checkpoints.torchfile.torch_files import (
    DTENSOR_NAMES,
    ShardedTensor,
    StoredTensor,
    TorchFile,
    tensors_in,
)
from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import TensorInfo

_SHARD = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
_INSIDE = ("actor", ".")
_FIRST_MESH_DIMENSIONS = 2


def _refuse_sharded_tensor(*arguments: Any) -> NoReturn:
    raise CheckpointError(
        "holds a ShardedTensor, which FSDP 1 makes without a device mesh; merge it with python -m"
        " verl.model_merger merge --backend fsdp, or load and save it with a newer version"
    )


_SHARDED_TENSOR = ("api.ShardedTensor", "shard.Shard")
_NAMES = DTENSOR_NAMES | {
    f"torch.distributed._shard.sharded_tensor.{n}": _refuse_sharded_tensor for n in _SHARDED_TENSOR
}


def find(folder: Path) -> Path | None:
    """The folder with the shards, in or below a step's folder."""
    for inside in _INSIDE:
        place = folder / inside
        if place.is_dir() and any(_SHARD.fullmatch(path.name) for path in place.iterdir()):
            return place
    return None


class VerlCheckpoint(PiecewiseTensors):
    """The shards of all ranks as one checkpoint. Opening reads the pickles, which hold no data."""

    def __init__(self, folder: Path):
        self.folder = folder
        world = _world_size(folder)
        ranks = [
            _read_rank(folder / f"model_world_size_{world}_rank_{rank}.pt") for rank in range(world)
        ]
        super().__init__(renamed(_assemble(folder, ranks), str(folder)))
        self.description = f"verl FSDP shards of {world} rank{'s' * (world > 1)} in {folder}"

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer, which verl writes into ``huggingface/`` beside the
        shards.
        """
        return model_files(self.folder / "huggingface")

    def metrics(self) -> dict[str, float]:
        """Nothing: verl keeps metrics elsewhere."""
        return {}

    def close(self) -> None:
        """Nothing is held open."""


def _world_size(folder: Path) -> int:
    ranks_by_world: dict[int, set[int]] = {}
    for path in folder.iterdir():
        match = _SHARD.fullmatch(path.name)
        if match:
            ranks_by_world.setdefault(int(match[1]), set()).add(int(match[2]))
    if not ranks_by_world:
        raise CheckpointError(f"{folder}: holds no shards; expected model_world_size_W_rank_R.pt")
    world = next(iter(ranks_by_world))
    if len(ranks_by_world) > 1:
        configured = _configured_world_size(folder)
        if configured not in ranks_by_world:
            sizes = ", ".join(str(size) for size in sorted(ranks_by_world))
            raise CheckpointError(
                f"{folder}: holds shards of world sizes {sizes}; remove those of the older run"
            )
        world = configured
    missing = sorted(set(range(world)) - ranks_by_world[world])
    if missing:
        shown = ", ".join(str(rank) for rank in missing[:5]) + ", ..." * (len(missing) > 5)
        raise CheckpointError(
            f"{folder}: of {world} ranks the shards of {shown} are missing; copy them all"
        )
    return world


def _configured_world_size(folder: Path) -> int:
    try:
        return int(json.loads(read_small(folder / "fsdp_config.json"))["world_size"])
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return -1


def _read_rank(path: Path) -> tuple[TorchFile, dict[str, StoredTensor | ShardedTensor]]:
    file = TorchFile(ReadOnlyFile(path), extra=_NAMES)
    try:
        return file, dict(tensors_in(file.content))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _assemble(
    folder: Path, ranks: Sequence[tuple[TorchFile, dict[str, StoredTensor | ShardedTensor]]]
) -> dict[str, PiecewiseTensor]:
    names = list(ranks[0][1])
    for rank, (_, state) in enumerate(ranks):
        if state.keys() != ranks[0][1].keys():
            odd = sorted(state.keys() ^ ranks[0][1].keys())[0]
            raise CheckpointError(
                f"{folder}: ranks 0 and {rank} differ in tensor {odd!r}; expected shards of one"
                " save"
            )
    tensors = {}
    for name in names:
        try:
            tensors[name] = _assemble_one([(file, state[name]) for file, state in ranks])
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: tensor {name!r}: {error}") from None
    return tensors


def _assemble_one(
    parts: Sequence[tuple[TorchFile, StoredTensor | ShardedTensor]],
) -> PiecewiseTensor:
    first_file, first = parts[0]
    if isinstance(first, StoredTensor):
        if any(isinstance(part, ShardedTensor) or part.shape != first.shape for _, part in parts):
            raise CheckpointError("is sharded on some ranks only; expected shards of one save")
        return first_file.whole(first)  # every rank has the same copy
    dimension = _sharded_dimension(first)
    if dimension is None:
        return first_file.whole(first.local)
    chunks: list[Chunk] = []
    position, seen = 0, 0
    for rank, (file, part) in enumerate(parts):
        if (
            not isinstance(part, ShardedTensor)
            or part.shape != first.shape
            or part.local.dtype != first.local.dtype
        ):
            raise CheckpointError(
                f"ranks 0 and {rank} disagree about its shape or dtype; expected shards of one save"
            )
        replica, shard = _coordinate(part, rank, len(parts))
        if replica or _sharded_dimension(part) != dimension:
            continue
        if shard != seen:
            raise CheckpointError(f"rank {rank} holds part {shard}; expected part {seen}")
        seen += 1
        if prod(part.local.shape):  # a rank may have got nothing, in any shape
            offsets = tuple(position if d == dimension else 0 for d in range(len(first.shape)))
            chunks.append(Chunk(offsets, file.block(part.local)))
            position += (
                part.local.shape[dimension] if len(part.local.shape) == len(first.shape) else 0
            )
    return PiecewiseTensor(TensorInfo(first.shape, first.local.dtype), chunks)


def _sharded_dimension(part: ShardedTensor) -> int | None:
    """The tensor dimension that is cut, or None if every rank has everything."""
    kinds = [record.kind.rpartition(".")[2] for record in part.placements]
    if any(kind not in ("Shard", "Replicate") for kind in kinds):
        raise CheckpointError(
            f"has the placement {', '.join(kinds)}; expected Shard or Replicate: merge it with"
            " verl.model_merger"
        )
    cut = [record for record, kind in zip(part.placements, kinds, strict=True) if kind == "Shard"]
    if (
        len(cut) > 1
        or len(kinds) > _FIRST_MESH_DIMENSIONS
        or (len(kinds) == 2 and kinds[1] != "Shard" and cut)
    ):
        raise CheckpointError(
            f"has the placements {', '.join(kinds)}; expected at most one sharded mesh dimension,"
            " the last"
        )
    if not cut:
        return None
    dimension = cut[0].get("dim", cut[0].arguments[0] if cut[0].arguments else None)
    if type(dimension) is not int or not -len(part.shape) <= dimension < len(part.shape):
        raise CheckpointError(
            f"is cut along dimension {dimension!r} of {len(part.shape)}; the shard is damaged"
        )
    return dimension % len(part.shape)


def _coordinate(part: ShardedTensor, rank: int, world: int) -> tuple[int, int]:
    """(replica, shard) of a rank: what the mesh says of itself, else ranks in order."""
    coordinate = part.mesh.get("_coordinate_on_dim")
    if not isinstance(coordinate, list | tuple) or not all(type(c) is int for c in coordinate):
        if len(part.placements) > 1:
            raise CheckpointError(
                "is sharded in a hybrid way by a PyTorch that does not say how; merge it with"
                " verl.model_merger"
            )
        coordinate = (rank,)
    if len(coordinate) != len(part.placements):
        raise CheckpointError("has a mesh that does not fit its placements; the shard is damaged")
    return (coordinate[0], coordinate[1]) if len(coordinate) == 2 else (0, coordinate[0])
