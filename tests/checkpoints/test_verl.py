"""verl's FSDP shards: every mesh, uneven and empty parts, missing and foreign ranks, code in any
rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LLAMA_SHAPES, Weights
from sharded import Malicious, assert_reads, rank_of, sharded_state, write_verl
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.errors import CheckpointError


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {**LLAMA_SHAPES, "experts": (3, 4, 6), "one": (1,), "short": (2, 7)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("mesh", [(1,), (2,), (3,), (4,), (5,), (2, 2), (1, 2), (2, 3)], ids=str)
def test_the_shards_of_any_mesh_are_the_weights_that_were_cut(
    tmp_path: Path, mesh: tuple[int, ...]
) -> None:
    """With five ranks a tensor of one element leaves four of them nothing."""
    tensors = weights()
    write_verl(tmp_path / "actor", tensors, mesh)
    checkpoint = open_checkpoint(tmp_path)
    world = int(torch.tensor(mesh).prod())
    assert (
        checkpoint.description
        == f"verl FSDP shards of {world} rank{'s' * (world > 1)} in {tmp_path / 'actor'}"
    )
    assert_reads(checkpoint, tensors)


def test_bfloat16_shards_and_buffers_are_read(tmp_path: Path) -> None:
    tensors = weights(torch.bfloat16) | {"position_ids": torch.arange(9)}
    write_verl(tmp_path, tensors, (2,))
    assert_reads(open_checkpoint(tmp_path), tensors)


def test_files_come_from_the_folder_beside_and_a_configuration_alone_is_no_checkpoint(
    tmp_path: Path,
) -> None:
    beside = tmp_path / "global_step_3" / "actor" / "huggingface"
    beside.mkdir(parents=True)
    (beside / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step 3: .*holds no weights"):
        open_run(tmp_path)
    write_verl(beside.parent, weights(), (2,))
    assert open_run(tmp_path).checkpoint(3).files() == {"config.json": b"{}"}


def broken(change: Callable[[Path], object], message: str) -> Any:
    return pytest.param(change, message)


def resave(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


R1 = "model_world_size_3_rank_1.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        broken(
            lambda f: (f / R1).unlink(), r"of 3 ranks the shards of 1 are missing; copy them all"
        ),
        broken(
            lambda f: (f / R1).write_bytes((f / R1).read_bytes()[:-9]),
            r"rank_1\.pt: cannot be read: it is truncated",
        ),
        broken(
            lambda f: shutil.copy(f / R1, f / R1.replace("rank_1", "rank_2")),
            r"rank 2 holds part 1; expected part 2",
        ),
        broken(
            lambda f: shutil.copy(f / R1, f / "model_world_size_4_rank_0.pt"),
            "holds shards of world sizes 3, 4; remove",
        ),
        broken(
            lambda f: torch.save({"other": torch.ones(2)}, f / R1), "ranks 0 and 1 differ in tensor"
        ),
        broken(lambda f: torch.save([1], f / R1), r"rank_1\.pt: is not a dictionary of tensors"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(
    tmp_path: Path, change: Callable, message: str
) -> None:
    write_verl(tmp_path, weights(), (3,))
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_of_several_world_sizes_the_configured_one_is_taken(tmp_path: Path) -> None:
    write_verl(tmp_path, weights(seed=1), (3,))
    write_verl(tmp_path, weights(seed=2), (2,))
    (tmp_path / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    assert_reads(open_checkpoint(tmp_path), weights(seed=2))


@pytest.mark.parametrize(
    ("placements", "mesh", "message"),
    [
        ((Partial(),), (2,), "has the placement Partial; expected Shard or Replicate"),
        (
            (Shard(0), Shard(1)),
            (2, 2),
            "has the placements Shard, Shard; expected at most one sharded",
        ),
        ((Shard(0), Replicate()), (2, 2), "has the placements Shard, Replicate"),
    ],
)
def test_placements_that_cannot_be_put_together_are_refused(
    tmp_path: Path, placements: Any, mesh: Any, message: str
) -> None:
    world = int(torch.tensor(mesh).prod())
    for rank in range(world):
        with rank_of(rank, world):
            names = ("a", "b")[: len(mesh)]
            tensor = DTensor.from_local(
                torch.ones(2, 2), init_device_mesh("cpu", mesh, mesh_dim_names=names), placements
            )
            torch.save({"w": tensor}, tmp_path / f"model_world_size_{world}_rank_{rank}.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_replicated_tensor_is_read_from_the_first_rank(tmp_path: Path) -> None:
    for rank in range(2):
        with rank_of(rank, 2):
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
            state = sharded_state({"a": torch.arange(6.0)}, (2,))
            state["r"] = DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()])
            torch.save(state, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    assert_reads(open_checkpoint(tmp_path), {"a": torch.arange(6.0), "r": torch.ones(2, 2)})


class OldShard:
    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedTensor, ()


def test_the_tensors_of_fsdp_1_without_a_mesh_are_refused_with_advice(tmp_path: Path) -> None:
    torch.save({"w": OldShard()}, tmp_path / "model_world_size_1_rank_0.pt")
    with pytest.raises(
        CheckpointError,
        match=r"rank_0\.pt: holds a ShardedTensor, .* merge it with python -m verl\.model_merger",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("rank", [0, 2])
def test_code_in_any_rank_is_refused_by_name(tmp_path: Path, rank: int) -> None:
    write_verl(tmp_path, weights(), (3,))
    torch.save(
        {"x": Malicious(tmp_path / "executed")}, tmp_path / f"model_world_size_3_rank_{rank}.pt"
    )
    with pytest.raises(
        CheckpointError,
        match=rf"rank_{rank}\.pt: cannot be read safely: it refers to 'posix.mkdir'",
    ):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()
