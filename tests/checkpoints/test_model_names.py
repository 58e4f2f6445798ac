"""Names in memory against names on disk: fused experts, vision models, prefixes of wrappers and of
model classes, in whichever format; and tensors that one side only has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import Weights, write_checkpoint
from safetensors.torch import load_file, save_file

from relexkit import TrajectoryStore, apply, checkout, import_checkpoints
from relexkit.checkpoints import open_checkpoint
from relexkit.checkpoints.model_names import common_prefix, config_places, model_places
from relexkit.errors import CheckpointError, RelexkitError

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def experts(kind: str = "qwen3_moe") -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(
        kind,
        **SMALL,
        head_dim=8,
        num_experts=3,
        num_local_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def move(model: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
def test_places_are_those_of_what_transformers_writes(kind: str, tmp_path: Path) -> None:
    model = experts(kind)
    model.save_pretrained(tmp_path)
    written, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    for places in (model_places(model), config_places((tmp_path / "config.json").read_bytes())):
        assert places.keys() == written.keys()
        for name, tensor in written.items():
            place = places[name]
            held = state[place.name].reshape(-1)[place.start : place.start + tensor.numel()]
            assert torch.equal(held.view(place.shape), tensor)
    assert any(place.start for place in places.values())


@pytest.mark.parametrize(
    "config",
    [b"", b"{}", b'{"architectures": ["Nothing"]}', b'{"architectures": ["os"]}', b"[1]"],
)
def test_a_configuration_that_transformers_does_not_know_has_no_places(config: bytes) -> None:
    assert config_places(config) == {}


def write_verl(model: Any, folder: Path) -> None:
    (folder / "actor").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "actor/model_world_size_1_rank_0.pt")
    model.config.save_pretrained(folder / "actor/huggingface")


def write_dcp(model: Any, folder: Path) -> None:
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(folder), no_dist=True)


def write_folder(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def write_memory(model: Any, folder: Path) -> None:
    """As a loop of one's own saves it, in a compiled model's names."""
    folder.mkdir(parents=True)
    tensors = {f"_orig_mod.{n}": t.clone() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    model.config.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
@pytest.mark.parametrize("write", [write_verl, write_dcp, write_folder, write_memory])
@pytest.mark.parametrize("write_base", [write_folder, write_memory])
def test_fused_experts_are_apart_in_the_store_and_fused_in_the_model(
    write: Callable[[Any, Path], None], write_base: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    model = experts()
    write_base(model, tmp_path / "base")
    for step in (1, 2):
        move(model, step)
        write(model, tmp_path / f"run/step_{step}")
    store = import_checkpoints(
        tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base", encoding="exact"
    ).store
    model.save_pretrained(tmp_path / "own")
    written = load_file(checkout(store, 2, tmp_path / "out") / "model.safetensors")
    expected = load_file(tmp_path / "own/model.safetensors")
    if write_base is write_memory and write is not write_folder:
        expected = model.state_dict()  # all have the names of memory, and so has the store
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    live, weights = experts(), np.zeros((len(store.layout.moving_tensors), 2))
    weights[:, 1] = 1.0
    apply(store, live, weights)
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])


@pytest.mark.parametrize("bare", ["base", "run"])
def test_the_prefix_of_a_class_on_one_side_does_not_matter(bare: str, tmp_path: Path) -> None:
    """The hub's GPT-2 has ``h.0`` where trainers write ``transformer.h.0``, and causal masks."""
    model = gpt2()
    for folder in ("base", "run/step_1", "run/step_2"):
        model.save_pretrained(tmp_path / folder)
        if folder.startswith(bare):
            path = tmp_path / folder / "model.safetensors"
            tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
            if bare == "base":
                tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(2)}
            save_file(tensors, path)
        move(model, len(folder))
    result = import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base")
    names = {t.name.split(".")[0] for t in result.store.layout.tensors}
    assert names == ({"transformer"} if bare == "base" else {"wte", "wpe", "h", "ln_f"})
    assert bare == "run" or any("2 tensors" in n and "as in the base" in n for n in result.notes)
    live, weights = gpt2(), np.zeros((len(result.store.layout.moving_tensors), 2))
    weights[:, 1] = 1.0
    apply(result.store, live, weights)
    moved = load_file(tmp_path / "run/step_2/model.safetensors")
    key = "transformer.h.1.mlp.c_fc.weight"
    expected = moved[key if bare == "base" else key.removeprefix("transformer.")]
    torch.testing.assert_close(live.state_dict()[key], expected, rtol=1e-3, atol=1e-4)


def test_common_prefixes() -> None:
    assert common_prefix(["a.w", "b.w"], ["m.a.w", "m.b.w", "head.w"]) == "m."
    assert common_prefix(["a.w"], ["m.n.a.w"]) == "m.n."
    assert common_prefix(["a.w", "b.w"], ["a.w", "b.w"]) == ""
    assert common_prefix(["a.w"], ["m.x", "m.y", "m.a.w"]) == ""  # one of three is a coincidence


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_wrappers_are_taken_off_in_folders(prefix: str, file: str, tmp_path: Path) -> None:
    tensors = {
        f"{prefix}model.norm.weight": torch.ones(3),
        f"{prefix}lm_head.weight": torch.ones(2),
    }
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"model.norm.weight", "lm_head.weight"}
    out = np.empty(3, np.uint32)
    checkpoint.read_into("model.norm.weight", 0, out)
    assert (out.view(np.float32) == 1).all()
    checkpoint.close()


def test_two_keys_of_one_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"_orig_mod.w": torch.ones(1), "w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="several keys mean the same tensor"):
        open_checkpoint(tmp_path)


# -- tensors of one side ---------------------------------------------------------------------------

COMMON: Weights = {
    "model.layers.0.q_proj.weight": torch.arange(6.0).view(2, 3),
    "model.layers.1.q_proj.weight": torch.arange(6.0).view(2, 3),
}


def imported(tmp_path: Path, base: Weights, run: Weights, *exclude: str) -> Any:
    config = {"num_hidden_layers": 2}
    write_checkpoint(tmp_path / "base", COMMON | base, config=config)
    for step in (1, 2):
        moved = {n: t + step for n, t in COMMON.items()}
        write_checkpoint(tmp_path / f"run/step_{step}", moved | run)
    return import_checkpoints(
        tmp_path / "run",
        tmp_path / "s.zarr",
        base=tmp_path / "base",
        encoding="exact",
        exclude=exclude,
    )


def names(store: TrajectoryStore) -> set[str]:
    return {t.name for t in store.layout.tensors} - COMMON.keys()


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        "model.layers.2.eh_proj.weight",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.embeddings.position_ids",
    ],
)
def test_what_trainers_drop_is_kept_as_in_the_base_and_said(name: str, tmp_path: Path) -> None:
    kind = torch.int64 if "ids" in name else torch.float32
    result = imported(tmp_path, {name: torch.arange(4).to(kind)}, {})
    assert any(name in n and "kept as in the base" in n for n in result.notes)
    result.store.verify()
    written = load_file(checkout(result.store, 2, tmp_path / "out") / "model.safetensors")
    assert torch.equal(written[name], torch.arange(4).to(kind))
    assert all(torch.equal(written[n], t + 2) for n, t in COMMON.items())
    again = imported(tmp_path, {name: torch.arange(4).to(kind)}, {})
    assert (again.added, again.already) == ([], [1, 2])


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "value_head.bias"])
def test_heads_that_only_the_run_has_are_left_out_and_said(name: str, tmp_path: Path) -> None:
    result = imported(tmp_path, {}, {name: torch.zeros(3)})
    assert any(name in n and "left out" in n for n in result.notes)
    assert names(result.store) == set()


def test_other_tensors_of_one_side_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for base, run in (({"odd": torch.ones(1)}, {}), ({}, {"odd": torch.ones(1)})):
        with pytest.raises(CheckpointError, match=r"'odd'.* with --exclude"):
            imported(tmp_path, base, run)
    assert names(imported(tmp_path, {"odd": torch.ones(1)}, {}, "^odd$").store) == {"odd"}


def test_excluded_tensors_keep_the_values_of_the_base(tmp_path: Path) -> None:
    changing = {"model.counter": torch.tensor([7])}
    with pytest.raises(CheckpointError, match=r"counter.* not float .*--exclude"):
        imported(tmp_path / "a", {"model.counter": torch.tensor([0])}, changing)
    result = imported(tmp_path / "b", {"model.counter": torch.tensor([0])}, changing, "counter")
    written = load_file(checkout(result.store, 2, tmp_path / "out") / "model.safetensors")
    assert written["model.counter"].tolist() == [0]
    store = imported(tmp_path / "c", {}, {}, r"layers\.1").store
    written = load_file(checkout(store, 2, tmp_path / "out2") / "model.safetensors")
    assert torch.equal(
        written["model.layers.1.q_proj.weight"], COMMON["model.layers.1.q_proj.weight"]
    )
    assert torch.equal(
        written["model.layers.0.q_proj.weight"], COMMON["model.layers.0.q_proj.weight"] + 2
    )


@pytest.mark.parametrize(
    ("pattern", "words"), [("(", "is not a regular expression"), ("nothing", "matches no tensor")]
)
def test_a_pattern_without_sense_is_refused(pattern: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RelexkitError, match=words):
        imported(tmp_path, {}, {}, pattern)


# -- true causes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "run", "words"),
    [
        (
            {"model.embed_tokens.weight": torch.ones(5, 2)},
            {"model.embed_tokens.weight": torch.ones(8, 2)},
            "the vocabulary was resized; resize the other side alike",
        ),
        (
            {"model.norm.weight": torch.ones(5)},
            {"model.norm.weight": torch.ones(0)},
            "saved without being gathered .DeepSpeed ZeRO-3.; import the partitions",
        ),
        (
            {"model.x.qweight": torch.ones(5, dtype=torch.int32)},
            {"model.x.weight": torch.ones(5)},
            "base is a quantised copy .it holds 'model.x.qweight'",
        ),
        (
            {"model.norm.weight": torch.ones(5, dtype=torch.float16)},
            {"model.norm.weight": torch.ones(5, dtype=torch.bfloat16)},
            "another precision than the base has; round the base first with `relexkit round BASE"
            " --dtype bfloat16",
        ),
    ],
    ids=["vocabulary", "ungathered", "quantised", "precision"],
)
def test_a_mismatch_names_its_cause(
    base: Weights, run: Weights, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        imported(tmp_path, base, run)


def test_a_last_step_in_another_precision_says_how_to_leave_it_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", COMMON)
    for step in (1, 2):
        moved = {n: t + step for n, t in COMMON.items()}
        last = {n: t.to(torch.bfloat16) for n, t in moved.items()}
        write_checkpoint(tmp_path / f"run/step_{step}", moved if step == 1 else last)
    with pytest.raises(CheckpointError, match=r"step 2: .* dtype bfloat16; .*leave that step out"):
        import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base")
