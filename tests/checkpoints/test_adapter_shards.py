"""LoRA through verl's FSDP shards and DeepSpeed's partitions, beside PEFT's own adapter of the same
weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import LLAMA_CONFIG, Weights
from safetensors.torch import load_file, save_file
from sharded import write_verl, write_zero
from transformers import LlamaConfig, LlamaForCausalLM

from relexkit import TrajectoryStore, import_checkpoints
from relexkit.checkpoints import open_run
from relexkit.checkpoints.formats.adapter_shards import AdapterShards
from relexkit.errors import CheckpointError
from relexkit.materialize.adapters import checkout_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about themselves

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Weights]]:
    """A bfloat16 base, PEFT's float32 adapters of three steps, the models' state dicts."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_CONFIG, "tie_word_embeddings": False}))
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    model.float()  # verl trains float32 masters of the bfloat16 weights
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    states: dict[int, Weights] = {}
    for step in STEPS:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.add_(1e-3 * torch.randn_like(parameter))
        adapted.save_pretrained(folder / "peft" / f"checkpoint-{step}")
        states[step] = {n: t.clone() for n, t in adapted.state_dict().items()}
    return folder, states


@pytest.fixture(scope="module")
def reference(saved: tuple[Path, dict[int, Weights]]) -> TrajectoryStore:
    """The store of PEFT's own adapters."""
    folder, _ = saved
    return import_checkpoints(folder / "peft", folder / "p.zarr", base=folder / "base").store


def assert_same(store: TrajectoryStore, reference: TrajectoryStore) -> None:
    """The same factors, bit for bit, and everything else still."""
    assert store.steps.tolist() == list(STEPS)
    assert {p.encoding for p in store.layout.parts} == {"factors", "sparse"}
    names = {t.name: t.part for t in reference.layout.tensors}
    compared = 0
    for tensor in store.layout.tensors:
        if store.layout.parts[tensor.part].encoding != "factors":
            continue
        assert store.layout.parts[tensor.part] == reference.layout.parts[names[tensor.name]]
        for row in range(len(STEPS)):
            pair = (
                store.read_factor_bits(tensor.part, row),
                reference.read_factor_bits(names[tensor.name], row),
            )
            assert np.array_equal(*pair)
            compared += 1
    assert compared == 4 * len(STEPS)


def write_verl_run(folder: Path, states: dict[int, Weights], *, meta: bool = True) -> Path:
    for step, state in states.items():
        actor = folder / f"global_step_{step}" / "actor"
        write_verl(actor, state, (2,))
        if meta:
            content = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
            (actor / "lora_train_meta.json").write_text(json.dumps(content))
    return folder


def test_verl_shards(
    saved: tuple[Path, dict[int, Weights]], reference: TrajectoryStore, tmp_path: Path
) -> None:
    folder, states = saved
    source = write_verl_run(tmp_path / "verl", states)
    assert "verl FSDP shards, float32, 3 steps" in open_run(source).notes[0]
    store = import_checkpoints(source, tmp_path / "s.zarr", base=folder / "base").store
    assert_same(store, reference)
    written = checkout_adapter(store, 2, tmp_path / "two")
    found = load_file(written / "adapter_model.safetensors")
    expected = load_file(folder / "peft/checkpoint-2/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    config = json.loads((written / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["target_modules"] == ["down_proj", "q_proj"]


def test_verl_shards_without_rank_and_alpha_say_what_is_missing(
    saved: tuple[Path, dict[int, Weights]], tmp_path: Path
) -> None:
    source = write_verl_run(tmp_path / "verl", saved[1], meta=False)
    with pytest.raises(CheckpointError, match=r"but no lora_train_meta\.json.*put one there with"):
        open_run(source)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_masters_beside_a_bfloat16_adapter(
    saved: tuple[Path, dict[int, Weights]], reference: TrajectoryStore, tmp_path: Path, stage: int
) -> None:
    """The float32 source is taken, the adapter beside it is named."""
    folder, states = saved
    for step, state in states.items():
        place = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(folder / "peft" / f"checkpoint-{step}", place)
        path = place / "adapter_model.safetensors"
        save_file({n: t.to(torch.bfloat16) for n, t in load_file(path).items()}, path)
        frozen = [n for n in state if ".lora_" not in n]
        mixed = {n: t.to(torch.bfloat16) if n in frozen else t for n, t in state.items()}
        write_zero(place / f"global_step{step}", mixed, 2, stage=stage, frozen=frozen)
    run = open_run(tmp_path / "run")
    assert "DeepSpeed ZeRO partitions, float32" in run.notes[0]
    assert "PEFT adapters, bfloat16" in run.notes[1]
    store = import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=folder / "base").store
    assert_same(store, reference)


def test_another_base_is_refused(saved: tuple[Path, dict[int, Weights]], tmp_path: Path) -> None:
    folder, states = saved
    source = write_verl_run(tmp_path / "verl", {1: states[1]})
    shutil.copytree(folder / "base", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"frozen 'model\.norm\.weight' differs from the"):
        import_checkpoints(source, tmp_path / "s.zarr", base=tmp_path / "base")


def test_the_adapter_that_the_merger_of_verl_leaves(
    saved: tuple[Path, dict[int, Weights]], reference: TrajectoryStore, tmp_path: Path
) -> None:
    """``actor/huggingface/lora_adapter``, beside a ``model.safetensors`` that is the base."""
    folder, _ = saved
    for step in STEPS:
        place = tmp_path / "run" / f"global_step_{step}" / "actor" / "huggingface"
        shutil.copytree(folder / "base", place)
        shutil.copytree(folder / "peft" / f"checkpoint-{step}", place / "lora_adapter")
    store = import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=folder / "base").store
    assert_same(store, reference)


def test_the_type_says_that_factors_came_from_shards(
    saved: tuple[Path, dict[int, Weights]], tmp_path: Path
) -> None:
    source = write_verl_run(tmp_path / "verl", {1: saved[1][1]})
    opened = open_run(source).checkpoint(1)
    assert isinstance(opened, AdapterShards)
    assert "LoRA factors in verl FSDP shards of 2 ranks" in opened.description
