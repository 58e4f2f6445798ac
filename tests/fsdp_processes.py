"""Two real processes that train a small module under FSDP and save it in every way: for the slow
tests of the readers.

    python tests/fsdp_processes.py FOLDER KIND         KIND: fsdp1, fsdp2 or accelerate

leaves ``FOLDER/verl`` (a state dict for each rank, saved as verl's checkpoint manager does), or
``FOLDER/checkpoint`` (accelerate's ``save_fsdp_model``, which Trainer calls), and
``FOLDER/whole.safetensors``: the weights gathered by PyTorch, or merged by accelerate's own
``merge_fsdp_weights``.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)

WORLD = 2
CPU = torch.device("cpu")


def module() -> torch.nn.Module:
    """Odd sizes, so that parts are uneven; the same on every rank."""
    torch.manual_seed(0)
    layers = {
        "embed": torch.nn.Embedding(7, 5),
        "norm": torch.nn.LayerNorm(5),
        "head": torch.nn.Linear(5, 3),
    }
    return torch.nn.Sequential(OrderedDict(layers))


def step(model: Any) -> None:
    """One optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.tensor([[1, 2, 6]])).square().mean().backward()
    optimizer.step()


def fsdp(rank: int, folder: Path, kind: str) -> None:
    """FSDP 1 or 2, saved rank by rank."""
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    if kind == "fsdp1":
        model: Any = FullyShardedDataParallel(module(), device_mesh=mesh, device_id=CPU)
        step(model)
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            whole = {n: p.detach().clone() for n, p in model.named_parameters()}
        with FullyShardedDataParallel.state_dict_type(
            model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()
        ):
            state = model.state_dict()
    else:
        model = fully_shard(module(), mesh=mesh)
        step(model)
        whole = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        state = model.state_dict()
    (folder / "verl").mkdir(exist_ok=True)
    torch.save(state, folder / "verl" / f"model_world_size_{WORLD}_rank_{rank}.pt")
    if rank == 0:
        save_file(
            {n.removeprefix("_fsdp_wrapped_module."): t.contiguous() for n, t in whole.items()},
            folder / "whole.safetensors",
        )


def accelerate(rank: int, folder: Path) -> None:
    """The sharded state dict that accelerate and Trainer write."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import merge_fsdp_weights, save_fsdp_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    model = fully_shard(module(), mesh=init_device_mesh("cpu", (WORLD,)))
    step(model)
    save_fsdp_model(plugin, Accelerator(cpu=True), model, str(folder / "checkpoint"))
    merge_fsdp_weights(str(folder / "checkpoint" / "pytorch_model_fsdp_0"), str(folder / "merged"))
    if rank == 0:
        (folder / "merged" / "model.safetensors").rename(folder / "whole.safetensors")


def process(rank: int, port: int, folder: Path, kind: str) -> None:
    """One rank."""
    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    if kind == "accelerate":
        accelerate(rank, folder)
    else:
        fsdp(rank, folder, kind)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (port, Path(sys.argv[1]), sys.argv[2]), nprocs=WORLD)
