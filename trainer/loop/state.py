"""The full state of a run for a resume: weights and optimizer of every process, under a name that
says the step.

Random numbers and the position in the data are functions of seed and step, so there is nothing else
to keep. A state is written beside the former one, renamed when complete, and only then replaces it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from relexkit import RelexkitError
from relexkit.extension import Processes

_NAME = re.compile(r"step-(\d+)")


def save_state(
    folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """Keep the state after ``step`` as ``folder/step-N``, one file a process; a collective call.
    Removes former ones.
    """
    temporary, final = folder / f".step-{step}.partial", folder / f"step-{step}"
    if final.exists():
        return

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        state = {
            "processes": processes.size,
            "model": {name: _local(tensor) for name, tensor in model.state_dict().items()},
            "optimizer": {
                names[parameter]: {key: _local(value) for key, value in values.items()}
                for parameter, values in optimizer.state.items()
            },
        }
        with open(temporary / f"process-{processes.rank}.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def publish() -> None:
        os.replace(temporary, final)
        for other in folder.iterdir():
            if other != final and (_NAME.fullmatch(other.name) or other.name.endswith(".partial")):
                shutil.rmtree(other)

    processes.lead(prepare)
    processes.agree(write)
    processes.lead(publish)


def last_state(folder: Path) -> int | None:
    """The step of the last complete state in ``folder``, or None."""
    if not folder.is_dir():
        return None
    found = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return max(found, default=None)


def load_state(
    folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """Bring model and optimizer to the state after ``step``, in place.

    Raises:
        RelexkitError: it was saved by another number of processes, or for another model.
    """
    place = folder / f"step-{step}"
    count = len(list(place.glob("process-*.pt")))
    if count != processes.size:
        raise RelexkitError(
            f"{place}: was saved by {count} processes, these are {processes.size}; start as many as"
            " then"
        )
    state = torch.load(
        place / f"process-{processes.rank}.pt", map_location="cpu", weights_only=True
    )
    held = model.state_dict()
    if held.keys() != state["model"].keys():
        raise RelexkitError(
            f"{place}: holds another model than {type(model).__name__}; choose another output"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            _local(tensor).copy_(state["model"][name])
        for name, parameter in model.named_parameters():
            if name in state["optimizer"]:
                optimizer.state[parameter] = {
                    key: _restored(parameter, v) for key, v in state["optimizer"][name].items()
                }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _restored(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An optimizer's value as it was: of the parameter's kind and device, or a count on that
    device.
    """
    if value.ndim == 0:
        return value.to(parameter.device)
    restored = torch.zeros_like(parameter, requires_grad=False)
    _local(restored).copy_(value)
    return restored
