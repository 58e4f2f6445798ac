"""Every checkout and every prediction loads as the run's own folder does: the same logits, chat
template and special tokens, for dense models, mixtures, vision models, tied and untied heads and
code of a model's own; of adapters, merged and not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from relexkit import Prediction, checkout, extrapolate, import_checkpoints
from relexkit.materialize.adapters import checkout_adapter

VOCABULARY = 96
IDS = torch.arange(5, 25)[None]
MESSAGES = [{"role": "user", "content": "hi"}]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}
QUICK = {"llama", "gemma", "gpt2", "qwen3_moe", "qwen2_5_vl"}


def build(model_type: str, head: str, **settings: Any) -> Any:
    """A tiny model of random weights; ``head`` is what its class is called after the model."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    kind = {
        "causal": transformers.AutoModelForCausalLM,
        "vision": transformers.AutoModelForImageTextToText,
    }[head]
    return kind.from_config(config, dtype=torch.float32)


def vision(model_type: str, text: str, **more: Any) -> Callable[[], Any]:
    inner = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"model_type": text}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    if "qwen" in model_type:
        inner["rope_parameters"] = rope
    return lambda: build(model_type, "vision", text_config=inner, vision_config=VISION, **more)


def causal(model_type: str, **settings: Any) -> Callable[[], Any]:
    return lambda: build(model_type, "causal", **{**COMMON, **settings})


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": causal("llama", tie_word_embeddings=False),
    "llama_tied": causal("llama", tie_word_embeddings=True),
    "qwen2": causal("qwen2", tie_word_embeddings=True),
    "qwen3": causal("qwen3", tie_word_embeddings=False),
    "gemma": causal("gemma"),
    "gemma3_text": causal("gemma3_text"),
    "gpt2": lambda: build("gpt2", "causal", **GPT2, bos_token_id=1, eos_token_id=2),
    "gpt_neox": causal("gpt_neox", num_key_value_heads=2),
    "phi3": causal("phi3"),
    "olmo2": causal("olmo2"),
    "mistral": causal("mistral"),
    "qwen3_moe": causal("qwen3_moe", **EXPERTS),
    "mixtral": causal("mixtral", **EXPERTS),
    "olmoe": causal("olmoe", **EXPERTS),
    "qwen2_5_vl": vision("qwen2_5_vl", "qwen2_5_vl_text"),
    "llava": vision("llava", "llama", image_token_index=90),
}


def save(model: Any, folder: Path, template: str, end: str) -> None:
    """Model and tokenizer as a trainer saves them."""
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<end>": 3}
    words |= {chr(c): len(words) + i for i, c in enumerate(range(32, 120))}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token="<pad>", bos_token="<bos>"
    )
    tokenizer.chat_template = {"default": template, "tools": f"tools {template}"}
    tokenizer.save_pretrained(folder)


def moved(model: Any, seed: int, amount: float = 2e-2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            change = amount * torch.randn(parameter.shape, generator=generator)
            parameter += change.to(parameter.dtype)
    return model


def write_run(model: Any, folder: Path) -> None:
    model = model.to(torch.bfloat16)
    save(model, folder / "base", "base {{ messages[0]['content'] }}", "<eos>")
    for step in (1, 2, 3):
        save(
            moved(model, step),
            folder / f"run/checkpoint-{step}",
            "run {{ messages[0]['content'] }}",
            "<end>",
        )


def logits(folder: Path, **options: Any) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    kind = AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        kind = transformers.AutoModelForImageTextToText
    with torch.no_grad():
        model = kind.from_pretrained(folder, dtype=torch.float32, **options).eval()
        return model(input_ids=IDS).logits


def said(folder: Path) -> dict[str, Any]:
    """What a tokenizer makes of a chat, and which tokens are special."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "tools": tokenizer.apply_chat_template(MESSAGES, tokenize=False, chat_template="tools"),
        "special": tokenizer.special_tokens_map,
    }


def assert_loads_alike(ours: Path, theirs: Path, **options: Any) -> None:
    assert torch.equal(logits(ours, **options), logits(theirs, **options))
    assert said(ours) == said(theirs)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
def test_checkouts_and_predictions_load_as_the_runs_own_folder(name: str, tmp_path: Path) -> None:
    write_run(ARCHITECTURES[name](), tmp_path)
    store = import_checkpoints(
        tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base", encoding="exact"
    ).store
    own = tmp_path / "run/checkpoint-3"
    assert_loads_alike(checkout(store, 3, tmp_path / "out"), own)
    (prediction,) = extrapolate(
        store, [4], tmp_path, Prediction(method="hold")
    )  # holds the last step
    assert_loads_alike(prediction.folder, own)
    assert torch.equal(logits(checkout(store, 0, tmp_path / "zero")), logits(tmp_path / "base"))


CODE = {
    "configuration_own.py": (
        "from transformers import LlamaConfig\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    ),
    "layers_own.py": "FACTOR = 2.0\n",
    "modeling_own.py": (
        "from transformers import LlamaForCausalLM\n\n"
        "from .configuration_own import OwnConfig\nfrom .layers_own import FACTOR\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n\n"
        "    def forward(self, *args, **kwargs):\n"
        "        found = super().forward(*args, **kwargs)\n"
        "        found.logits = FACTOR * found.logits\n        return found\n"
    ),
}


@pytest.mark.parametrize("where", ["base and run", "base"])
def test_code_of_a_model_is_kept_and_not_executed(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    write_run(ARCHITECTURES["llama"](), tmp_path)
    trap = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    for folder in (tmp_path / "base", *sorted((tmp_path / "run").iterdir())):
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "configuration_own.OwnConfig"}
        names["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
        config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
        (folder / "config.json").write_text(json.dumps(config))
        if folder.name == "base" or where != "base":
            for name, text in CODE.items():
                (folder / name).write_text(trap + text)
    store = import_checkpoints(
        tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base", encoding="exact"
    ).store
    out = checkout(store, 3, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert {name: (out / name).read_text() for name in CODE} == {
        name: trap + text for name, text in CODE.items()
    }
    if where != "base":
        reference = tmp_path / "run/checkpoint-3"
        found = logits(out, trust_remote_code=True)
        torch.testing.assert_close(found, logits(reference, trust_remote_code=True))


# -- adapters --------------------------------------------------------------------------------------

LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "tied, elsewhere": ("gemma", {"target_modules": ["q_proj"]}),
    "tied embedding": ("gemma", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding, saved": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True},
    ),
    "tied head": ("llama_tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head, saved": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "mixture": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
    "vision": ("qwen2_5_vl", {"target_modules": r".*language_model.*q_proj"}),
    "old vision names": ("llava", {"target_modules": r".*language_model.*q_proj"}),
}
QUICK_LORA = {"tied embedding", "tied embedding, saved", "tied head", "vision"}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied and of saved modules in many ways
@pytest.mark.parametrize("flag", ["kept", "absent"])
@pytest.mark.parametrize(
    "name", [n if n in QUICK_LORA else pytest.param(n, marks=pytest.mark.slow) for n in LORA]
)
def test_adapters_load_merged_and_as_adapters(name: str, flag: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    architecture, settings = LORA[name]
    if flag == "absent" and architecture not in ("gemma", "gpt2"):
        pytest.skip("ties by the flag only")
    save(ARCHITECTURES[architecture](), tmp_path / "base", "base", "<eos>")
    config = json.loads((tmp_path / "base/config.json").read_text())
    if flag == "absent":
        config.pop("tie_word_embeddings", None)
        (tmp_path / "base/config.json").write_text(json.dumps(config))
    kind: Any = AutoModelForCausalLM
    if "vision_config" in config:
        kind = transformers.AutoModelForImageTextToText

    def base() -> Any:
        return kind.from_pretrained(tmp_path / "base")

    for step in (1, 2):
        torch.manual_seed(step)
        lora = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings)
        model = get_peft_model(base(), lora)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / f"run/checkpoint-{step}")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    store = import_checkpoints(
        tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base", encoding="exact"
    ).store
    merged = logits(checkout(store, 2, tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)  # products in another order
    out = checkout_adapter(store, 2, tmp_path / "adapter")
    with torch.no_grad():
        found = PeftModel.from_pretrained(base(), out).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    shutil.rmtree(tmp_path)
