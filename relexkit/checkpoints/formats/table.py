"""The table of formats. To add one, write a module with ``find`` and a checkpoint class, and add a
line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from relexkit.checkpoints.formats import (
    adapter_shards,
    dcp,
    deepspeed,
    flat_files,
    huggingface,
    peft,
    refused,
    sharded_safetensors,
    verl,
    weight_sync,
)
from relexkit.checkpoints.protocol import Checkpoint


@dataclass(frozen=True)
class Format:
    """One way in which trainers lay out a checkpoint.

    Attributes:
        name: as in ``--format``.
        title: as in messages.
        find: the place of such a checkpoint in or below a step's folder, or None; looks at names
            only.
        open: opens what ``find`` returned; reads headers, and raises ``CheckpointError`` if it is
            incomplete or damaged.
        of_files: a step is a file and not a folder.
    """

    name: str
    title: str
    find: Callable[[Path], Path | None]
    open: Callable[[Path], Checkpoint]
    of_files: bool = False


def _refuse(folder: Path) -> NoReturn:
    raise refused.refusal(folder)


FORMATS = [
    Format("peft", "PEFT adapters", peft.find, peft.AdapterCheckpoint),
    Format(
        "huggingface", "Hugging Face folders", huggingface.find, huggingface.HuggingFaceCheckpoint
    ),
    Format("verl", "verl FSDP shards", verl.find, adapter_shards.open_verl),
    Format("dcp", "torch.distributed.checkpoint folders", dcp.find, dcp.DcpCheckpoint),
    Format("deepspeed", "DeepSpeed ZeRO partitions", deepspeed.find, adapter_shards.open_deepspeed),
    Format(
        "sharded-safetensors",
        "safetensors shards",
        sharded_safetensors.find,
        sharded_safetensors.ShardedSafetensors,
    ),
    Format("flat", "files of one state dict", flat_files.find, flat_files.FlatFile, of_files=True),
    Format("weight-sync", "weight-sync deltas", weight_sync.find, weight_sync.refuse_single),
    Format("unsupported", "checkpoints to be converted first", refused.find, _refuse),
]
"""In the order of preference between equally precise ones."""
