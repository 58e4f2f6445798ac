"""Layouts that cannot be read here, recognised so that the message can name the command that
converts them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from relexkit.errors import CheckpointError

_ITERATION = re.compile(r"iter_\d{7}")


def _verl_megatron(folder: Path) -> str | None:
    actor = next((p for p in (folder / "actor", folder) if (p / "dist_ckpt").is_dir()), None)
    if actor is None:
        return None
    return (
        f"{actor}: is a Megatron distributed checkpoint of verl, with fused and renamed tensors;"
        " convert it with: python -m verl.model_merger merge --backend megatron --local_dir"
        f" {actor} --target_dir {actor / 'huggingface'}"
    )


def _megatron(folder: Path) -> str | None:
    below = folder / "policy" / "weights"
    places = [
        folder,
        *(
            sorted(p for p in below.iterdir() if _ITERATION.fullmatch(p.name))
            if below.is_dir()
            else ()
        ),
    ]
    for place in places:
        distributed = (place / "metadata.json").is_file() and (place / "common.pt").is_file()
        if not distributed and not any(place.glob("mp_rank_*/model_optim_rng.pt")):
            continue
        if place is not folder:
            return (
                f"{place}: is a Megatron checkpoint of NeMo-RL; convert it with: uv run --extra"
                " mcore python examples/converters/convert_megatron_to_hf.py --config"
                f" {folder / 'config.yaml'} --megatron-ckpt-path {place} --hf-ckpt-path"
                f" {folder / 'huggingface'}"
            )
        return (
            f"{place}: is a Megatron checkpoint, with fused and renamed tensors; convert it with"
            ' Megatron Bridge: python -c "from megatron.bridge import AutoBridge;'
            f" AutoBridge.from_hf_pretrained('BASE').export_ckpt('{place}',"
            f" '{folder / 'huggingface'}')\""
        )
    return None


def _accelerate_local(folder: Path) -> str | None:
    if not any(folder.glob("pytorch_model_fsdp*_rank*.bin")):
        return None
    return (
        f"{folder}: is a file for each rank that does not describe the whole (LOCAL_STATE_DICT, or"
        " use_dcp=False); only the run itself can load it: resume and save with"
        " fsdp_state_dict_type SHARDED_STATE_DICT"
    )


_LAYOUTS: tuple[Callable[[Path], str | None], ...] = (_verl_megatron, _megatron, _accelerate_local)


def find(folder: Path) -> Path | None:
    """The folder, if it is one of these layouts."""
    return folder if any(layout(folder) for layout in _LAYOUTS) else None


def refusal(folder: Path) -> CheckpointError:
    """What to say of a folder that ``find`` returned: with the command that converts it."""
    return CheckpointError(
        next(filter(None, (layout(folder) for layout in _LAYOUTS)), f"{folder}: holds no weights")
    )
