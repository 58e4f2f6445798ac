"""Make a run out of thin air: a Llama-shaped model whose weights drift and walk, saved after every
step.

    python tests/benchmarks/synthetic.py OUT --parameters 2e6 --steps 8 [--layers 30] [--dtypes
    bfloat16 float32]

leaves ``OUT/base`` (bfloat16) and ``OUT/DTYPE/checkpoint-N``, as ``docs/smollm2-run/make_run.py``
does. With ``--shards N`` every checkpoint is cut into N files of which each step rewrites one; the
others are hard links to the step before. That keeps 75 steps of 135M parameters within two
gigabytes, for measurements that depend on sizes and not on values.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

WEIGHT_SCALE = 0.02
UPDATE_SCALE = 1e-6
"""Of one step's noise. About one bfloat16 weight in a hundred then changes at a step, as in real
runs at small rates.
"""
DRIFT_SCALE = 3e-7


def model_config(num_parameters: float, num_layers: int) -> LlamaConfig:
    """A Llama configuration with tied embeddings and about so many parameters (within a few per
    cent for large ones).
    """
    # A layer has 13 h^2 weights (four attention matrices, three of width 3 h), the embeddings 16
    # h^2.
    hidden = max(16, round((num_parameters / (13 * num_layers + 16)) ** 0.5 / 16) * 16)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
        vocab_size=16 * hidden,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as Hugging Face stores such a model."""
    h, m = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, h)}
    for layer in range(config.num_hidden_layers):
        for name, shape in (
            ("input_layernorm", (h,)),
            ("mlp.down_proj", (h, m)),
            ("mlp.gate_proj", (m, h)),
            ("mlp.up_proj", (m, h)),
            ("post_attention_layernorm", (h,)),
            ("self_attn.k_proj", (h, h)),
            ("self_attn.o_proj", (h, h)),
            ("self_attn.q_proj", (h, h)),
            ("self_attn.v_proj", (h, h)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (h,)}


def write_run(
    out: Path,
    *,
    num_parameters: float,
    num_steps: int,
    num_layers: int,
    dtypes: list[str],
    num_shards: int,
    seed: int,
) -> int:
    """Write the base and all checkpoints; returns the exact number of parameters."""
    config = model_config(num_parameters, num_layers)
    shapes = tensor_shapes(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (
            torch.ones(shape)
            if len(shape) == 1
            else WEIGHT_SCALE * torch.randn(shape, generator=generator)
        )
        for name, shape in shapes.items()
    }
    # The base is bfloat16, and training starts from it.
    weights = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    shards = _shards(shapes, num_shards)
    _save(out / "base", config, weights, shards, "bfloat16", None, range(len(shards)))
    drift = (
        {}
        if num_shards > 1
        else {name: DRIFT_SCALE * torch.randn(s, generator=generator) for name, s in shapes.items()}
    )
    for step in range(1, num_steps + 1):
        fresh = range(len(shards)) if len(shards) == 1 else [step % len(shards)]
        for name in (name for shard in fresh for name in shards[shard]):
            scale = UPDATE_SCALE * (
                len(shards) if len(shards) > 1 else 1
            )  # the same number of changes in fewer weights
            weights[name] += scale * torch.randn(shapes[name], generator=generator)
            if name in drift:
                weights[name] += drift[name]
        for dtype in dtypes:
            folder = out / dtype / f"checkpoint-{step}"
            earlier = out / dtype / f"checkpoint-{step - 1}" if step > 1 else None
            _save(folder, config, weights, shards, dtype, earlier, fresh)
    return sum(tensor.numel() for tensor in weights.values())


def _shards(shapes: dict[str, tuple[int, ...]], num_shards: int) -> list[list[str]]:
    """Names, in order, cut into about equal shards (fewer if there are not enough tensors)."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    target = sum(sizes.values()) / num_shards
    shards: list[list[str]] = [[]]
    filled = 0.0
    for name, size in sizes.items():
        if shards[-1] and filled >= target * len(shards):
            shards.append([])
        shards[-1].append(name)
        filled += size
    return shards


def _save(
    folder: Path,
    config: LlamaConfig,
    weights: dict[str, torch.Tensor],
    shards: list[list[str]],
    dtype: str,
    earlier: Path | None,
    fresh: range | list[int],
) -> None:
    folder.mkdir(parents=True)
    config.dtype = getattr(torch, dtype)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    total = len(shards)
    files = (
        [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        if total > 1
        else ["model.safetensors"]
    )
    for index, (file, names) in enumerate(zip(files, shards, strict=True)):
        if earlier is not None and index not in fresh:
            os.link(earlier / file, folder / file)
            continue
        save_file(
            {name: weights[name].to(getattr(torch, dtype)) for name in names},
            folder / file,
            {"format": "pt"},
        )
    if total > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a synthetic run.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parameters", type=float, default=2e6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"]
    )
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    count = write_run(
        given.out,
        num_parameters=given.parameters,
        num_steps=given.steps,
        num_layers=given.layers,
        dtypes=given.dtypes,
        num_shards=given.shards,
        seed=given.seed,
    )
    print(count)


if __name__ == "__main__":
    main()
