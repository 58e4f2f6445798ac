"""Shards that PyTorch's own Hugging Face storage writer leaves (NeMo-RL's default), other names of
steps, and nanochat's flat files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import LLAMA_SHAPES, Run, Weights, same_bits, write_checkpoint, write_run
from safetensors.torch import load_file
from sharded import assert_reads, write_shards
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files,
)

from relexkit import checkout, import_checkpoints
from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.errors import CheckpointError


def weights(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {**LLAMA_SHAPES, "experts": (4, 4, 6), "one": (1,)}
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shards_of_any_number_of_ranks_are_the_weights(tmp_path: Path, world: int) -> None:
    tensors = weights()
    place = tmp_path / "step_5" / "policy" / "weights" / "model"
    write_shards(place, tensors, world)
    assert len(list(place.iterdir())) == world
    checkpoint = open_checkpoint(tmp_path / "step_5")
    assert checkpoint.description.startswith(f"safetensors shards of {world} rank")
    assert_reads(checkpoint, tensors)


def test_what_pytorch_itself_consolidates_is_the_same(tmp_path: Path) -> None:
    tensors = weights()
    write_shards(tmp_path / "model", tensors, 2)
    (tmp_path / "whole").mkdir()
    consolidate_safetensors_files(
        str(tmp_path / "model"), str(tmp_path / "whole"), dict.fromkeys(tensors, 1)
    )
    whole = load_file(next((tmp_path / "whole").glob("*.safetensors")))
    assert_reads(open_checkpoint(tmp_path), whole)


def test_a_run_of_nemo_rl(tmp_path: Path) -> None:
    """Shards, or their consolidated form beside; configuration, tokenizer and metrics from where
    NeMo-RL puts them.
    """
    run = write_run(tmp_path, steps=[1, 2], dtype="float32", motion="drift", extras=False)
    for step in (1, 2):
        folder = tmp_path / "nemo" / f"step_{step}"
        place = folder / "policy" / "weights" / "model"
        write_shards(place, run.weights[step], 2)
        (place / ".hf_metadata").mkdir()
        shutil.copy(run.folders[step] / "config.json", place / ".hf_metadata")
        (folder / "policy" / "tokenizer").mkdir()
        (folder / "policy" / "tokenizer" / "tokenizer.json").write_text("{}")
        info = {"step": step, "val_reward": step / 4, "name": "x", "bad": float("inf")}
        (folder / "training_info.json").write_text(json.dumps(info))
    source = open_run(tmp_path / "nemo")
    assert "safetensors shards, float32, 2 steps" in source.notes[0]
    shutil.copytree(tmp_path / "nemo/step_2", tmp_path / "cut")
    next((tmp_path / "cut/policy/weights/model").glob("shard-00001*")).unlink()
    with pytest.raises(CheckpointError, match="of at least 2 ranks the shards of 1 are missing"):
        open_checkpoint(tmp_path / "cut")
    result = import_checkpoints(
        tmp_path / "nemo", tmp_path / "s.zarr", base=run.base, encoding="exact"
    )
    assert result.store.metrics()["val_reward"].tolist() == [0.25, 0.5]
    assert {"config.json", "tokenizer.json"} <= result.store.files().keys()
    found = load_file(checkout(result.store, 2, tmp_path / "two") / "model.safetensors")
    assert all(same_bits(found[n], t) for n, t in run.weights[2].items())
    consolidated = tmp_path / "nemo/step_2/policy/weights/model/consolidated"
    write_checkpoint(consolidated, run.weights[2])
    assert open_checkpoint(tmp_path / "nemo/step_2").description.endswith("consolidated")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.pop("one"), "does not say where the pieces belong"),
        (lambda info: info["one"].update(saved_offsets=[-1]), "impossible place"),
        (lambda info: info["one"].update(saved_offsets=[2**60]), "impossible place"),
        (lambda info: info["one"].update(saved_offsets=[1]), "hold 1 of 2 elements"),
        (lambda info: info["one"].update(saved_offsets=["0"]), "not a whole number"),
        (lambda info: info["one"].update(saved_offsets=[0, 0]), "disagree about its dtype or"),
    ],
)
def test_a_place_that_cannot_be_is_refused(tmp_path: Path, change, message: str) -> None:
    write_shards(tmp_path, weights(), 1)
    path = next(tmp_path.iterdir())
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    change(info)
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("naming", ["checkpoint_{}", "ckpt-{}", "iter-{}", "step-{}", "ckpt_{}"])
def test_other_names_of_steps(tmp_path: Path, naming: str) -> None:
    run = write_run(tmp_path, steps=[3, 10], naming=naming, extras=False)
    assert open_run(run.source).steps == [3, 10]


def test_epochs_need_a_map_that_knows_the_first(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=[1, 2], naming="epoch_{}", extras=False)
    run.folders[1].rename(run.source / "epoch_0")
    run.folders[2].rename(run.source / "epoch_1")
    for step_map in (None, "500"):
        with pytest.raises(CheckpointError, match="epoch_0 is the end of the first one; give"):
            open_run(run.source, step_map=step_map)
    (tmp_path / "map.json").write_text('{"0": 500, "1": 1000}')
    result = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, step_map=str(tmp_path / "map.json")
    )
    assert result.store.steps.tolist() == [500, 1000]
    assert result.store.metrics()["label"].tolist() == [0, 1]


def write_flat(folder: Path, run: Run) -> None:
    """As nanochat's ``checkpoint_manager.py`` names them."""
    folder.mkdir()
    for step, tensors in run.weights.items():
        torch.save(
            {f"_orig_mod.{n}": t for n, t in tensors.items()}, folder / f"model_{step:06d}.pt"
        )
        meta = {"step": step, "val_bpb": 1 / (1 + step), "model_config": {"n_layer": 2}}
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
        (folder / f"optim_{step:06d}_rank0.pt").write_bytes(b"never opened")


def test_nanochat_flat_files(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=[60, 120], extras=False)
    write_flat(tmp_path / "d4", run)
    result = import_checkpoints(tmp_path / "d4", tmp_path / "s.zarr")
    assert "files of one state dict, bfloat16, 3 steps" in result.notes[0]
    assert result.store.steps.tolist() == [60, 120]
    assert result.store.metrics()["val_bpb"].tolist() == [1 / 61, 1 / 121]
    found = load_file(checkout(result.store, 120, tmp_path / "last") / "model.safetensors")
    assert all(same_bits(found[n], t) for n, t in run.weights[120].items())
