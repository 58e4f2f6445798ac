"""LoRA in a trainer's own shards: the float32 factors that the optimizer trains, among the frozen
weights of the base.

verl's FSDP shards of a LoRA run have PEFT's names, and rank and alpha lie beside them in
``lora_train_meta.json``; DeepSpeed's partitions hold the float32 factors of the adapter that
Trainer saves beside them, often in bfloat16. In both they are the only float32 copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints.formats.deepspeed import DeepSpeedCheckpoint
from relexkit.checkpoints.formats.peft import PREFIX, Adapter
from relexkit.checkpoints.formats.peft_config import CONFIG, read_config
from relexkit.checkpoints.formats.verl import VerlCheckpoint
from relexkit.checkpoints.protocol import Checkpoint
from relexkit.checkpoints.small_files import read_small
from relexkit.errors import CheckpointError
from relexkit.weights.dtypes import FLOAT_DTYPES, bits_dtype, widen_bits

_META = "lora_train_meta.json"
_TRAINED = (".lora_", ".modules_to_save.")
_COMPARED = 2**16  # elements of each frozen tensor; training moves nearly all of a tensor


class AdapterShards(Adapter):
    """The adapter in a trainer's shards; see ``relexkit.checkpoints.Checkpoint``.

    Args:
        inner: the shards, with PEFT's names.
        config: as in ``adapter_config.json``.
    """

    def __init__(self, inner: Checkpoint, config: Mapping[str, Any], where: str):
        self._inner, self._config = inner, dict(config)
        self.description = f"LoRA factors in {inner.description}"
        self.base_name = config.get("base_model_name_or_path")
        self.metrics, self.close = inner.metrics, inner.close
        trained = {n: i for n, i in inner.tensors.items() if any(t in n for t in _TRAINED)}
        self._frozen = {
            name.removeprefix(PREFIX)
            .replace(".base_layer.", ".")
            .replace(".original_module.", "."): name
            for name in inner.tensors
            if name not in trained
        }
        super().__init__(where, config, trained)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``relexkit.checkpoints.Checkpoint``."""
        self._inner.read_into(name, start, out)

    def files(self) -> dict[str, bytes]:
        """What lies beside the shards, and the adapter's configuration."""
        return {**self._inner.files(), CONFIG: json.dumps(self._config, indent=2).encode()}

    def check_base(self, base: Checkpoint) -> None:
        """The frozen weights begin as those of the base do, where precision allows to compare."""
        for name, key in self._frozen.items():
            info, own = base.tensors.get(name), self._inner.tensors[key]
            if info is None or own.dtype not in (info.dtype, "float32"):
                continue
            if own.dtype not in FLOAT_DTYPES or info.dtype not in FLOAT_DTYPES:
                continue
            count = min(own.numel, _COMPARED)
            bits = np.empty(count, bits_dtype(own.dtype))
            original = np.empty(count, bits_dtype(info.dtype))
            if own.shape == info.shape:
                self._inner.read_into(key, 0, bits)
                base.read_into(name, 0, original)
            if own.shape != info.shape or not np.array_equal(
                bits, widen_bits(original, info.dtype, own.dtype)
            ):
                raise CheckpointError(
                    f"{self.where}: the frozen {name!r} differs from the base; the adapter was"
                    " trained on another one"
                )


def open_verl(folder: Path) -> Checkpoint:
    """The shards of verl, as an adapter if they hold one."""
    checkpoint = VerlCheckpoint(folder)
    return (
        AdapterShards(checkpoint, _verl_config(checkpoint), str(folder))
        if (_holds_factors(checkpoint))
        else checkpoint
    )


def open_deepspeed(folder: Path) -> Checkpoint:
    """The partitions of DeepSpeed, as an adapter if they hold one."""
    checkpoint = DeepSpeedCheckpoint(folder)
    if not _holds_factors(checkpoint):
        return checkpoint
    place = next((p for p in (folder, folder.parent) if (p / CONFIG).is_file()), None)
    if place is None:
        raise CheckpointError(
            f"{folder}: holds LoRA factors but no {CONFIG} lies beside; copy it there from the"
            " adapter that the training saved"
        )
    return AdapterShards(checkpoint, read_config(place), str(folder))


def _holds_factors(checkpoint: Checkpoint) -> bool:
    return any(".lora_A." in name or ".lora_embedding_A" in name for name in checkpoint.tensors)


def _verl_config(checkpoint: VerlCheckpoint) -> dict[str, Any]:
    """What ``adapter_config.json`` would say."""
    folder = checkpoint.folder
    path = next(
        (p / _META for p in (folder, folder / "huggingface") if (p / _META).is_file()), None
    )
    if path is None:
        raise CheckpointError(
            f"{folder}: holds LoRA factors but no {_META}, which newer releases of verl write; put"
            ' one there with the rank and alpha of the run, such as {"r": 32, "lora_alpha": 16}'
        )
    try:
        meta = json.loads(read_small(path))
        rank, alpha = meta["r"], meta["lora_alpha"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: does not name r and lora_alpha ({error})") from None
    modules = {
        name.partition(".lora_")[0].rpartition(".")[2]
        for name in checkpoint.tensors
        if ".lora_" in name
    }
    return {
        "peft_type": "LORA",
        "task_type": meta.get("task_type"),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }
