"""Small runs for the tests, written with torch and safetensors only: writers that are independent
of relexkit.

``write_run`` makes a folder of checkpoints of a tiny Llama model (its ``config.json`` loads in
transformers) and keeps every tensor of every step, so that a test can compare with what was really
written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from safetensors.torch import save_file

from relexkit import TrajectoryStore

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 8,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
"""A model of about 1,800 parameters with odd sizes; ``write_run`` adds ``tie_word_embeddings`` and
the dtype.
"""

LLAMA_SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (53, 8),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (13, 8),
            "mlp.up_proj": (13, 8),
            "mlp.down_proj": (8, 13),
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
        }.items()
    },
    "model.norm.weight": (8,),
}
"""Every tensor of that model but the output head, in an order of their own (not alphabetical)."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SCALAR, EMPTY, BUFFER, MASK = "model.scale", "model.empty", "model.position_ids", "model.mask"

BITS: dict[str, torch.dtype] = {
    "float32": torch.int32,
    "bfloat16": torch.int16,
    "float16": torch.int16,
}
"""Signed integer type that carries the bits of a float format."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A run on disk and what was written.

    ``weights[step][name]`` are the tensors; ``weights[0]`` is the base. ``base`` is the folder of
    the base, or None if it was written as step 0 of the run. ``folders[step]`` holds the files of a
    step.
    """

    source: Path
    base: Path | None
    weights: dict[int, Weights]
    folders: dict[int, Path]

    @property
    def steps(self) -> list[int]:
        """Steps after the base, ascending."""
        return sorted(step for step in self.weights if step > 0)

    def delta(self, step: int, name: str) -> np.ndarray:
        """``theta_step - theta_0`` of one tensor, subtracted in float64, flattened."""
        pair = [self.weights[s][name].reshape(-1).to(torch.float64).numpy() for s in (step, 0)]
        return pair[0] - pair[1]


def write_run(
    folder: Path,
    *,
    steps: Sequence[int] = (1, 2, 3, 5, 9),
    dtype: str = "bfloat16",
    dtypes: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    density: float = 0.02,
    motion: str = "bits",
    seed: int = 0,
    layout: str = "hf",
    naming: str = "checkpoint-{}",
    inside: str = ".",
    head: str | None = None,
    extras: bool = True,
    buffers: bool = False,
    base: str = "folder",
    base_dtype: str | None = None,
    frozen: Sequence[str] = (),
    metrics: bool = False,
) -> Run:
    """Write ``folder/run/<step folders>`` and the base in ``folder/base``; returns everything that
    was written.

    Args:
        dtype: of all tensors, except those that ``dtypes`` (name -> dtype) names.
        shapes: tensors by name instead of ``LLAMA_SHAPES``.
        density: share of the elements that change at a step (0: nothing moves, 1: everything).
        motion: ``"bits"`` changes bit patterns between neighbouring steps by a few units, with some
            sign flips, zeros of both signs, subnormals and big jumps; ``"drift"`` moves a fixed
            random subset along a straight line in the step plus a small independent walk, rounded
            to the dtype.
        layout: ``"hf"`` (model.safetensors), ``"sharded"`` (three safetensors files and their
            index), ``"bin"`` (pytorch_model.bin) or ``"sharded-bin"``.
        naming: step folder, ``inside``: folder in it that holds the weights.
        head: None: no output head; ``"tied"``: ``lm_head.weight`` equal to the embedding in every
            step; ``"own"``: its own.
        extras: add a 0-d tensor and one without elements.
        buffers: add an int64 and a bool tensor that never change.
        base: ``"folder"`` or ``"step0"``; ``base_dtype``: dtype in which the base is stored (its
            values fit it).
        frozen: names of tensors that never move.
        metrics: write a ``trainer_state.json`` with ``reward = step / 10`` into every step.
    """
    random = np.random.default_rng(seed)
    kinds = tensor_kinds(dtype, dtypes, shapes, head=head, extras=extras)
    weights: dict[int, Weights] = {
        0: {n: _initial(random, shape, d, base_dtype or d) for n, (shape, d) in kinds.items()}
    }
    if motion == "drift":
        _drift(random, weights, steps, density, frozen)
    else:
        current = weights[0]
        for step in steps:
            current = {
                n: t.clone() if n in frozen else changed(random, t, density)
                for n, t in current.items()
            }
            weights[step] = current
    for tensors in weights.values():
        if head == "tied":
            tensors[HEAD] = tensors[EMBEDDING].clone()
        if buffers:
            tensors[BUFFER] = torch.arange(17).reshape(1, 17)
            tensors[MASK] = torch.tensor([True, False, True])
    config = LLAMA_CONFIG | {"tie_word_embeddings": head != "own", "dtype": dtype}
    folders = {}
    for step in weights:
        in_run = step > 0 or base == "step0"
        folders[step] = folder / "run" / naming.format(step) / inside if in_run else folder / "base"
        tensors = weights[step]
        if step == 0 and base_dtype is not None:
            tensors = {
                n: t.to(getattr(torch, base_dtype)) if t.is_floating_point() else t
                for n, t in tensors.items()
            }
        write_checkpoint(folders[step], tensors, layout=layout, config=config)
        if metrics and step:
            history = [
                {"step": step, "epoch": 0.5, "reward": step / 10},
                {"step": step - 1, "reward": -1.0},
            ]
            state = {"global_step": step, "log_history": history}
            (folders[step] / "trainer_state.json").write_text(json.dumps(state))
    return Run(folder / "run", None if base == "step0" else folder / "base", weights, folders)


def tensor_kinds(
    dtype: str,
    dtypes: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    head: str | None = None,
    extras: bool = False,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every float tensor that moves on its own."""
    all_shapes = dict(LLAMA_SHAPES if shapes is None else shapes)
    if extras:
        all_shapes |= {SCALAR: (), EMPTY: (0, 8)}
    if head == "own":
        all_shapes[HEAD] = all_shapes[EMBEDDING]
    return {name: (shape, (dtypes or {}).get(name, dtype)) for name, shape in all_shapes.items()}


def changed(random: np.random.Generator, tensor: torch.Tensor, density: float) -> torch.Tensor:
    """A copy in which about ``density`` of the elements have another bit pattern, always finite
    ones.
    """
    out = tensor.clone()
    flat = out.reshape(-1)
    if not flat.numel():
        return out
    chosen = torch.from_numpy(random.random(flat.numel()) < density)
    units = torch.from_numpy(random.choice([-3, -1, -1, 1, 1, 2, 40], flat.numel()))
    bits = flat.view(BITS[str(tensor.dtype).removeprefix("torch.")])
    moved = (bits + units.to(bits.dtype)).view(tensor.dtype)
    kind = torch.from_numpy(random.integers(0, 24, flat.numel()))
    moved = torch.where(kind == 0, -flat, moved)
    tiny = torch.finfo(tensor.dtype).smallest_normal
    specials = torch.tensor(
        [-0.0, 0.0, tiny / 4, -tiny / 2, torch.finfo(tensor.dtype).max / 2], dtype=tensor.dtype
    )
    moved = torch.where((kind >= 1) & (kind <= 5), specials[(kind - 1).clamp(0, 4)], moved)
    flat[chosen] = torch.where(torch.isfinite(moved), moved, torch.ones_like(moved))[chosen]
    return out


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """True if dtype, shape and every bit agree (-0.0 differs from 0.0)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    pair = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*pair)


def raw_bits(tensor: torch.Tensor) -> np.ndarray:
    """Bits of a float tensor as ``uint16`` or ``uint32 [numel]``, raw bytes ``uint8`` of any
    other.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.contiguous().reshape(-1)
    if name not in BITS:
        return flat.view(torch.uint8).numpy().copy()
    numpy_type = {torch.int16: np.uint16, torch.int32: np.uint32}[BITS[name]]
    return flat.view(BITS[name]).numpy().view(numpy_type).copy()


def store_content(path: Path) -> dict[str, Any]:
    """Every array of a store as bytes, but only the rows of recorded steps, and every attribute
    that a user can see.
    """
    group = zarr.open_group(str(path), mode="r")
    num_steps = len(TrajectoryStore(path).steps)
    found: dict[str, Any] = {"attributes": TrajectoryStore(path).attributes}
    for name, node in group.members(max_depth=None):
        if isinstance(node, zarr.Array):
            top = name.split("/")[0]
            if name.endswith(("/indices", "/data")):
                used = np.asarray(group[name.rsplit("/", 1)[0] + "/indptr"][:num_steps, -1])  # type: ignore[index]
                rows = [np.asarray(node[row, : used[row]]).tobytes() for row in range(num_steps)]
                found[name] = rows
            else:
                values = np.asarray(node[:] if top in ("base", "files") else node[:num_steps])
                found[name] = (values.shape, values.dtype, values.tobytes())
    return found


def write_checkpoint(
    folder: Path,
    tensors: Weights,
    *,
    layout: str = "hf",
    config: Mapping[str, Any] | None = None,
    shards: int = 3,
) -> None:
    """Write one folder with weights (see ``write_run`` for ``layout``) and, if given, its
    ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if layout == "hf":
        _save(tensors, folder / "model.safetensors")
    elif layout == "bin":
        _save(tensors, folder / "pytorch_model.bin")
    else:
        stem, ending = (
            ("pytorch_model", "bin") if layout == "sharded-bin" else ("model", "safetensors")
        )
        names = list(tensors)
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{ending}"
            piece = {n: tensors[n] for n in names[shard::shards]}
            weight_map |= dict.fromkeys(piece, file)
            _save(piece, folder / file)
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def _save(tensors: Weights, path: Path) -> None:
    separate = {n: t.clone().contiguous() for n, t in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(separate, path, metadata={"format": "pt"})
    else:
        torch.save(separate, path)


def _initial(
    random: np.random.Generator, shape: tuple[int, ...], dtype: str, through: str
) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(random.standard_normal(shape) * 0.05, np.float32))
    return values.to(getattr(torch, through)).to(getattr(torch, dtype))


def _drift(
    random: np.random.Generator,
    weights: dict[int, Weights],
    steps: Sequence[int],
    density: float,
    frozen: Sequence[str],
) -> None:
    direction, walk = {}, {}
    for name, tensor in weights[0].items():
        moves = 0.0 if name in frozen else random.random(tensor.shape) < density
        direction[name] = random.standard_normal(tensor.shape) * moves * 1e-3
        walk[name] = np.zeros(tensor.shape)
    earlier = 0
    for step in steps:
        weights[step] = {}
        for name, tensor in weights[0].items():
            noise = random.standard_normal(tensor.shape) * np.sqrt(step - earlier) * 3e-4
            walk[name] = walk[name] + noise * (direction[name] != 0)
            moved = tensor.to(torch.float64) + torch.from_numpy(
                np.asarray(direction[name] * step + walk[name])
            )
            weights[step][name] = moved.to(tensor.dtype)
        earlier = step
