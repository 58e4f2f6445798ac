"""Sharded checkpoints for the tests, written by PyTorch itself, all ranks one after the other in
one process.

The process group is PyTorch's own stand-in ("fake"), in which every rank exists but nothing is
sent: cutting parameters, describing them and saving needs no communication. The tests marked slow
write the same with real processes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from runs import Weights, raw_bits
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from relexkit.checkpoints import Checkpoint


@contextlib.contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """Be one rank of a process group that does not exist; what PyTorch remembers of the rank before
    is cleared.
    """
    _clear_sharding_prop_cache()
    hook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def module_of(tensors: Weights) -> torch.nn.Module:
    """A module with parameters (for floats) and buffers of these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        owner = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if tensor.is_floating_point():
            owner.register_parameter(last, torch.nn.Parameter(tensor.clone()))
        else:
            owner.register_buffer(last, tensor.clone())
    return root


def first_divisible(parts: int) -> Callable[[torch.nn.Parameter], Shard]:
    """verl's choice under FSDP2: the first dimension that divides, else the first
    (``verl/utils/fsdp_utils.py``).
    """

    def place(parameter: torch.nn.Parameter) -> Shard:
        return Shard(next((d for d, n in enumerate(parameter.shape) if n % parts == 0), 0))

    return place


def sharded_state(tensors: Weights, mesh_shape: Sequence[int]) -> dict[str, Any]:
    """This rank's state dict under FSDP2; a mesh of two dimensions shards in a hybrid way."""
    names = ("ddp", "fsdp")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
    module = module_of(tensors)
    return fully_shard(
        module, mesh=mesh, shard_placement_fn=first_divisible(mesh_shape[-1])
    ).state_dict()


def write_verl(folder: Path, tensors: Weights, mesh_shape: Sequence[int] = (2,)) -> None:
    """``model_world_size_W_rank_R.pt`` of every rank, as verl's checkpoint manager saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    world = int(torch.tensor(mesh_shape).prod())
    for rank in range(world):
        path = folder / f"model_world_size_{world}_rank_{rank}.pt"
        if world == 1:
            torch.save(
                tensors, path
            )  # what FSDP1 hands out where nothing is sharded (verl issue 903)
            continue
        with rank_of(rank, world):
            torch.save(sharded_state(tensors, mesh_shape), path)


def write_dcp(
    folder: Path,
    tensors: Weights,
    world: int = 1,
    extra: dict[str, Any] | None = None,
    prefix: str = "",
) -> None:
    """A ``torch.distributed.checkpoint`` folder of FSDP2 shards (plain tensors for one process)."""

    def state() -> dict[str, Any]:
        shards = sharded_state(tensors, (world,)) if world > 1 else tensors
        return {prefix + n: t for n, t in shards.items()} | (extra or {})

    write_dcp_states(folder, world, state)


def write_dcp_states(folder: Path, world: int, state_of_rank: Callable[[], dict[str, Any]]) -> None:
    """What ``torch.distributed.checkpoint.save`` does on every rank, with the plans handed over
    instead of sent.
    """
    planners, writers, plans = [], [], []
    for rank in range(world):
        with rank_of(rank, world):
            planner, writer = DefaultSavePlanner(), FileSystemWriter(folder)
            planner.set_up_planner(state_of_rank(), writer.storage_meta(), rank == 0)
            writer.set_up_storage_writer(rank == 0)
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
            planners.append(planner)
            writers.append(writer)
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = []
    for rank in range(world):
        with rank_of(rank, world):
            planner = planners[rank]
            results.append(
                writers[rank].write_data(planner.finish_plan(plans[rank]), planner).value()
            )
    writers[0].finish(metadata, results)


def write_shards(folder: Path, tensors: Weights, world: int) -> None:
    """What every rank's ``HuggingFaceStorageWriter(save_distributed=True)`` writes."""
    planners, writers, plans = [], [], []
    for rank in range(world):
        with rank_of(rank, world):
            planner = DefaultSavePlanner()
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            state = sharded_state(tensors, (world,)) if world > 1 else tensors
            planner.set_up_planner(state, writer.storage_meta(), rank == 0)
            writer.set_up_storage_writer(rank == 0)
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
            planners.append(planner)
            writers.append(writer)
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = []
    for rank in range(world):
        with rank_of(rank, world):
            plan = planners[rank].finish_plan(plans[rank])
            results.append(writers[rank].write_data(plan, planners[rank]).value())
    writers[0].finish(metadata, results)


def assert_reads(checkpoint: Checkpoint, tensors: Weights) -> None:
    """Names, shapes, dtypes and every bit are as written, read whole and by ranges."""
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
        )
        bits = raw_bits(tensor)
        for begin, end in (
            (0, len(bits)),
            (len(bits) // 3, len(bits) // 3 * 2),
            (len(bits) - 1, len(bits)),
        ):
            out = np.empty(max(0, end - max(begin, 0)), bits.dtype)
            checkpoint.read_into(name, max(begin, 0), out)
            np.testing.assert_array_equal(
                out, bits[max(begin, 0) : end], err_msg=f"{name} {begin}:{end}"
            )


class Malicious:
    """Pickles as a call that makes a folder, the trace of code that ran."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def write_zero(
    folder: Path, tensors: Weights, world: int, *, stage: int, frozen: Sequence[str] = ()
) -> None:
    """DeepSpeed ZeRO files, by a writer of our own after ``deepspeed/runtime/zero`` and
    ``zero_to_fp32.py``.

    Floats are trained in two parameter groups; others are buffers. Where DeepSpeed itself wrote
    files, they are in ``tests/data/zero``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = [n for n, t in tensors.items() if t.is_floating_point() and n not in frozen]
    groups = [g for g in (trained[::2], trained[1::2]) if g]
    flats = [
        _flat_partitions([tensors[n].float() for n in group], world, stage) for group in groups
    ]
    shapes = [{n: tensors[n].shape for n in group} for group in groups]
    for rank in range(world):
        partitions = [flat[rank] for flat in flats]
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {
            "zero_stage": stage,
            "partition_count": world if stage == 3 else [world] * len(groups),
            key: partitions,
        }
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.0"}, path)
        if stage < 3 and rank:
            continue
        fragments = {
            n: tensors[n] if stage < 3 else _parts([tensors[n]], world)[rank] for n in frozen
        }
        content = {
            "module": {n: t for n, t in tensors.items() if n not in trained},
            "buffer_names": [n for n, t in tensors.items() if not t.is_floating_point()],
            "param_shapes": shapes,
            "shared_params": {},
            "frozen_param_shapes": {n: tensors[n].shape for n in frozen} or None,
            "frozen_param_fragments": fragments or None,
        }
        name = (
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            if stage == 3
            else "mp_rank_00_model_states.pt"
        )
        torch.save(content, folder / name)


def _flat_partitions(tensors: Sequence[torch.Tensor], world: int, stage: int) -> list[torch.Tensor]:
    if stage == 3:
        return _parts(tensors, world)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * world)))
    return [piece.clone() for piece in padded.chunk(world)]


def _parts(tensors: Sequence[torch.Tensor], world: int) -> list[torch.Tensor]:
    """Every tensor padded to a multiple of the ranks and cut into as many parts; a rank's parts one
    after the other.
    """
    cut = [
        torch.nn.functional.pad(t.reshape(-1), (0, -t.numel() % world)).chunk(world)
        for t in tensors
    ]
    return [torch.cat([parts[rank] for parts in cut]) for rank in range(world)]
