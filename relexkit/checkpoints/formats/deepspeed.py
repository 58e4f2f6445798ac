"""DeepSpeed ZeRO 1 to 3, also below Trainer's ``checkpoint-N`` and as OpenRLHF writes it: the
float32 masters.

The weights that the optimizer trains lie flat in ``*_optim_states.pt``, one file for each rank;
names and shapes lie in ``*_model_states.pt``. How they fit together follows
``deepspeed/utils/zero_to_fp32.py``: stages 1 and 2 cut each parameter group as one vector, rank
after rank; stage 3 cuts each parameter into equal parts. The script of that name which DeepSpeed
leaves beside a checkpoint is never run, and the package is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from relexkit.checkpoints.formats.huggingface import trainer_metrics
from relexkit.checkpoints.formats.key_names import model_names
from relexkit.checkpoints.small_files import merged_files, model_files, read_small
from relexkit.checkpoints.torchfile.regions import (
    Block,
    Chunk,
    PiecewiseTensor,
    PiecewiseTensors,
    ReadOnlyFile,
)
from relexkit.checkpoints.torchfile.safe_pickle import Record
from relexkit.checkpoints.torchfile.torch_files import StoredTensor, TorchFile, shape_of
from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import TensorInfo

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,4})_optim_states\.pt")
_MODEL = re.compile(r"(?:(?:bf16_)?zero_pp_rank_\d{1,6}_)?mp_rank_(\d{1,4})_model_states\.pt")
_TAG = re.compile(r"global_step\d+")
_INERT = ("deepspeed.", "argparse.", "numpy.", "torch.optim.", "openrlhf.")
_EXTRA = dict.fromkeys(
    ("builtins.slice", "builtins.complex", "datetime.datetime", "pathlib.PosixPath")
)

Flat = tuple[TorchFile, StoredTensor]
"""A flat float32 partition and the file that it lies in."""


def find(folder: Path) -> Path | None:
    """The folder with the ZeRO files: the step's own, or the one that ``latest`` names below
    Trainer's.
    """
    if _has_zero_files(folder):
        return folder
    tags = sorted(
        path for path in folder.iterdir() if _TAG.fullmatch(path.name) and _has_zero_files(path)
    )
    if len(tags) > 1:
        latest = folder / "latest"
        named = (
            read_small(latest, 1000).decode(errors="replace").strip() if latest.is_file() else ""
        )
        tags = [path for path in tags if path.name == named] or tags[-1:]
    return tags[0] if tags else None


def _has_zero_files(folder: Path) -> bool:
    return folder.is_dir() and any(
        _OPTIMIZER.fullmatch(p.name) or _MODEL.fullmatch(p.name) for p in folder.iterdir()
    )


class DeepSpeedCheckpoint(PiecewiseTensors):
    """The float32 masters of all ranks as one checkpoint. Opening reads the pickles, which hold no
    data.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        optimizers = _optimizer_files(folder)
        models = _model_files(folder)
        states = [_optimizer_state(file) for file in optimizers]
        stage, world = states[0].get("zero_stage"), states[0].get("partition_count")
        if isinstance(stage, Record) and stage.arguments:  # a member of an enumeration
            stage = stage.arguments[0]
        if isinstance(world, list) and world and all(type(n) is int for n in world):
            world = max(world)
        if stage not in (1, 2, 3) or type(world) is not int:
            raise CheckpointError(
                f"{folder}: says ZeRO stage {stage!r} of {world!r} ranks; expected stage 1, 2 or 3"
            )
        if world != len(optimizers):
            raise CheckpointError(
                f"{folder}: holds {len(optimizers)} of {world} *_optim_states.pt files; copy"
                " them all"
            )
        if stage == 3 and len(models) != world:
            raise CheckpointError(
                f"{folder}: holds {len(models)} of {world} *_model_states.pt files; copy them all"
            )
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        groups = [
            _flat_groups(file, state.get(key), key)
            for file, state in zip(optimizers, states, strict=True)
        ]
        described = _model_state(models[0])
        try:
            tensors = (
                _trained_3(groups, described) if stage == 3 else _trained_12(groups, described)
            )
            tensors = (
                _rest(models[0], described, stage) | _frozen(models, described, stage) | tensors
            )
            tensors |= {
                alias: tensors[name]
                for alias, name in _shared(described).items()
                if name in tensors
            }
            names = model_names(tensors)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise CheckpointError(
                f"{folder}: the parameters are not described as DeepSpeed does ({error})"
            ) from None
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from None
        super().__init__({name: tensors[key] for key, name in names.items()})
        self.description = (
            f"DeepSpeed ZeRO-{stage} float32 partitions of {world} rank{'s' * (world > 1)} in"
            f" {folder}"
        )

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files of the step, if Trainer wrote them beside."""
        return merged_files(model_files(self.folder.parent), model_files(self.folder))

    def metrics(self) -> dict[str, float]:
        """What Trainer logged, if it wrote the folder; DeepSpeed keeps none."""
        return trainer_metrics(self.folder.parent)

    def close(self) -> None:
        """Nothing is held open."""


def _optimizer_files(folder: Path) -> list[TorchFile]:
    by_rank = {}
    for path in folder.iterdir():
        match = _OPTIMIZER.fullmatch(path.name)
        if match:
            _refuse_model_parallel(folder, int(match[2]))
            by_rank[int(match[1])] = path
    missing = [rank for rank in range(max(by_rank, default=0) + 1) if rank not in by_rank]
    if missing:
        raise CheckpointError(
            f"{folder}: the *_optim_states.pt file of rank {missing[0]} is missing; copy all of"
            " them"
        )
    return [_open(by_rank[rank]) for rank in sorted(by_rank)]


def _model_files(folder: Path) -> list[TorchFile]:
    paths = [path for path in folder.iterdir() if _MODEL.fullmatch(path.name)]
    for path in paths:
        match = _MODEL.fullmatch(path.name)
        _refuse_model_parallel(folder, int(match[1]) if match else 0)
    if not paths:
        raise CheckpointError(
            f"{folder}: has no *_model_states.pt, which names the parameters; copy it too"
        )
    numbers = {path: [int(n) for n in re.findall(r"\d+", path.name)] for path in paths}
    return [_open(path) for path in sorted(paths, key=lambda p: numbers[p])]


def _refuse_model_parallel(folder: Path, rank: int) -> None:
    if rank:
        raise CheckpointError(
            f"{folder}: is split by tensor parallelism (mp_rank_{rank:02d}), which is not"
            " supported; convert it with deepspeed's ds_to_universal.py or the trainer's own"
            " export"
        )


def _open(path: Path) -> TorchFile:
    return TorchFile(ReadOnlyFile(path), extra=_EXTRA, extra_prefixes=_INERT)


def _optimizer_state(file: TorchFile) -> dict[str, Any]:
    content = file.content
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state:
        raise CheckpointError(
            f"{file.path}: is not a ZeRO optimizer state; expected zero_stage in"
            " optimizer_state_dict"
        )
    return state


def _model_state(file: TorchFile) -> dict[str, Any]:
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("param_shapes"), list):
        raise CheckpointError(
            f"{file.path}: does not list param_shapes; expected the model states of a ZeRO"
            " checkpoint"
        )
    return content


def _flat_groups(file: TorchFile, stored: Any, key: str) -> list[Flat]:
    groups = [stored] if isinstance(stored, StoredTensor) else stored
    if not isinstance(groups, list) or not all(
        isinstance(g, StoredTensor) and len(g.shape) == 1 for g in groups
    ):
        raise CheckpointError(
            f"{file.path}: has no flat partitions in {key}; expected those of a ZeRO checkpoint"
        )
    return [(file, group) for group in groups]


def _slice(flat: Flat, begin: int, count: int) -> Block:
    """Elements ``begin:begin+count`` of a flat partition."""
    file, tensor = flat
    part = StoredTensor(
        tensor.storage,
        tensor.offset + begin * tensor.stride[0],
        (count,),
        tensor.stride,
        tensor.dtype,
    )
    return file.block(part)


def _trained_12(
    groups: Sequence[Sequence[Flat]], described: dict[str, Any]
) -> dict[str, PiecewiseTensor]:
    """Stages 1 and 2: the ranks' partitions of a group follow one another, its parameters lie in
    order, padding last.
    """
    shapes = described["param_shapes"]
    if any(len(rank) != len(shapes) for rank in groups):
        raise CheckpointError(
            f"has {len(shapes)} groups of parameters but other numbers of partitions; expected one"
            " save's"
        )
    tensors = {}
    for index, group in enumerate(shapes):
        partitions = [rank[index] for rank in groups]
        begins = [0]
        for _, tensor in partitions:
            begins.append(begins[-1] + tensor.shape[0])
        position = 0
        for name, shape in group.items():
            count = prod(shape_of(shape))
            pieces = _overlaps(partitions, begins, position, position + count)
            tensors[name] = PiecewiseTensor(
                TensorInfo(shape, partitions[0][1].dtype), pieces, (count,)
            )
            position += count
        unit = 2 * len(
            groups
        )  # the padding's unit; as in zero_to_fp32.py, both numbers are compared rounded up to it
        if -(-position // unit) != -(-begins[-1] // unit):
            raise CheckpointError(
                f"its parameters take {position:,} of {begins[-1]:,} elements; expected all but the"
                " padding"
            )
    return tensors


def _overlaps(
    partitions: Sequence[Flat], begins: Sequence[int], begin: int, end: int
) -> list[Chunk]:
    """Elements ``begin:end`` of the partitions laid end to end, as pieces of a flat tensor."""
    pieces = []
    for flat, start, stop in zip(partitions, begins, begins[1:], strict=False):
        low, high = max(begin, start), min(end, stop)
        if low < high:
            pieces.append(Chunk((low - begin,), _slice(flat, low - start, high - low)))
    return pieces


def _trained_3(
    groups: Sequence[Sequence[Flat]], described: dict[str, Any]
) -> dict[str, PiecewiseTensor]:
    """Stage 3: every rank has ``ceil(numel / ranks)`` elements of each parameter, at the same
    running position.
    """
    world = len(groups)
    begins = [[0] for _ in groups]
    for rank, flats in enumerate(groups):
        for _, tensor in flats:
            begins[rank].append(begins[rank][-1] + tensor.shape[0])
    tensors = {}
    position = 0
    for name, shape in ((n, s) for group in described["param_shapes"] for n, s in group.items()):
        count = prod(shape_of(shape))
        each = -(-count // world)
        pieces = []
        for rank, flats in enumerate(groups):
            wanted = max(0, min(each, count - rank * each))
            for chunk in _overlaps(flats, begins[rank], position, position + wanted):
                pieces.append(Chunk((rank * each + chunk.offsets[0],), chunk.block))
        tensors[name] = PiecewiseTensor(TensorInfo(shape, groups[0][0][1].dtype), pieces, (count,))
        position += each
    if any(b[-1] != position for b in begins):
        raise CheckpointError(
            f"its parameters take {position:,} of {begins[0][-1]:,} elements of a rank;"
            " expected all"
        )
    return tensors


def _frozen(
    models: Sequence[TorchFile], described: dict[str, Any], stage: int
) -> dict[str, PiecewiseTensor]:
    """Parameters that are not trained: whole in the first file, or in stage 3 cut into equal parts
    like the others.
    """
    shapes = described.get("frozen_param_shapes") or {}
    fragments = [_model_state(file).get("frozen_param_fragments") or {} for file in models]
    tensors = {}
    for name, shape in shapes.items():
        if stage < 3:
            tensors[name] = models[0].whole(fragments[0][name])
            continue
        count, each, pieces = prod(shape_of(shape)), -(-prod(shape) // len(models)), []
        for rank, file in enumerate(models):
            wanted = max(0, min(each, count - rank * each))
            if wanted:
                fragment = fragments[rank][name]
                pieces.append(Chunk((rank * each,), _slice((file, fragment), 0, wanted)))
        tensors[name] = PiecewiseTensor(
            TensorInfo(shape, fragments[0][name].dtype), pieces, (count,)
        )
    return tensors


def _rest(file: TorchFile, described: dict[str, Any], stage: int) -> dict[str, PiecewiseTensor]:
    """Buffers; below stage 3 also everything else of the module, since stage 1 does not list frozen
    parameters apart.
    """
    module = described.get("module") or {}
    names = list(module) if stage < 3 else described.get("buffer_names") or []
    return {
        name: file.whole(module[name])
        for name in names
        if isinstance(module.get(name), StoredTensor)
    }


def _shared(described: dict[str, Any]) -> dict[str, str]:
    """Alias -> the parameter whose weights it shares; a dictionary or, in older versions, pairs."""
    shared = described.get("shared_params") or {}
    return dict(shared) if isinstance(shared, dict | list) else {}
