"""The folder of a run: whose it is, and the trained model in it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import yaml

from relexkit import RelexkitError
from relexkit.extension import Processes, named_weights, replace_folder, write_file
from relexkit.trainer.config import GRPOConfig, dump_config
from relexkit.trainer.policy.setup import own_dropout, quiet

CONFIG = "config.yaml"
_BEGUN = f"{CONFIG}.partial"  # all there is if the first moment of a run was its last
_FREE = (
    "output",
    "save_steps",
    "eval_steps",
    "eval_num_problems",
    "generation_rows",
    "report_to",
)
"""Options that a run may change when it goes on."""


def claim_folder(folder: Path, config: GRPOConfig) -> None:
    """Make ``folder`` the folder of the run with the configuration ``config``, or find that it is.

    A longer ``max_steps`` of a run with a constant learning rate is the same run, and so is another
    logging or saving rhythm. An option that the folder's configuration lacks is newer than the run
    and has its default there.

    Raises:
        RelexkitError: it holds something else, or a run with other options; the message names them.
    """
    path = folder / CONFIG
    if path.exists():
        try:
            options = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RelexkitError(
                f"{path}: cannot be read ({error}); choose another output"
            ) from None
        if not isinstance(options, dict):
            raise RelexkitError(
                f"{path}: holds no options; expected those of the run: restore it from a copy, or"
                " choose another output"
            )
        wanted = dataclasses.asdict(config)
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        begun = {name: options.get(name, defaults[name]) for name in wanted}
        free = set(_FREE)
        if config.lr_scheduler_type == "constant" and config.max_steps >= begun["max_steps"]:
            free.add("max_steps")
        other = [
            f"{name} {begun[name]} instead of {value}"
            for name, value in wanted.items()
            if name not in free and begun[name] != value
        ]
        if other:
            raise RelexkitError(
                f"{folder}: holds a run with other options ({', '.join(other)}); choose another"
                " output"
            )
    elif folder.is_dir() and any(inside.name != _BEGUN for inside in folder.iterdir()):
        raise RelexkitError(
            f"{folder}: exists and is not the folder of a run; choose another output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, dump_config(config).encode())


def save_model(folder: Path, model: Any, tokenizer: Any, processes: Processes) -> None:
    """Write the model as a Hugging Face folder in the precision of its training, under a temporary
    name first; a collective call.

    Sharded weights are gathered one by one; the first process holds them all while it writes.
    """
    weights = {}
    for name, tensor in named_weights(model).items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if processes.rank == 0:
            weights[name] = whole.detach().cpu()
    temporary = folder.with_name(f".{folder.name}.partial")

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with quiet(), own_dropout(model):
                model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            replace_folder(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    processes.lead(write)
