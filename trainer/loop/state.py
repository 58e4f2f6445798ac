"""The full state of a run for a resume: weights and optimizer of every process, under a name that
says the step.

Random numbers and the position in the data are functions of seed and step, so there is nothing else
to keep. A state is written beside the former one, renamed once it is on the disk, and only then
replaces it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from relexkit import RelexkitError
from relexkit.extension import Processes, replace_folder

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

    def publish() -> None:
        replace_folder(temporary, final)
        for other in folder.iterdir():
            if other != final and (_NAME.fullmatch(other.name) or other.name.endswith(".partial")):
                shutil.rmtree(other)

    with _said_of(folder), _removed_if_it_fails(temporary, processes):
        processes.lead(prepare)
        processes.agree(write)
        processes.lead(publish)


def last_state(folder: Path) -> int | None:
    """The step of the last complete state in ``folder``, or None."""
    if not folder.is_dir():
        return None
    steps = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return max(steps, default=None)


def load_state(
    folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """Bring model and optimizer to the state after ``step``, in place.

    Raises:
        RelexkitError: it was saved by another number of processes, or for another model, or is
            damaged.
    """
    place = folder / f"step-{step}"
    count = len(list(place.glob("process-*.pt")))
    if count != processes.size:
        raise RelexkitError(
            f"{place}: was saved by {count} processes, but this run has {processes.size}; start as"
            " many as then"
        )
    weights, moments = _read(place / f"process-{processes.rank}.pt")
    held = {name: _local(tensor) for name, tensor in model.state_dict().items()}
    if {n: t.shape for n, t in held.items()} != {n: t.shape for n, t in weights.items()}:
        raise RelexkitError(
            f"{place}: holds another model than {type(model).__name__}; choose another output"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(weights[name])
        for name, parameter in model.named_parameters():
            if name in moments:
                optimizer.state[parameter] = {
                    key: _restored(parameter, v) for key, v in moments[name].items()
                }


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights and optimizer of one process; a file that is not such a state is refused by name."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights, moments = state["model"], state["optimizer"]
        tensors = [*weights.values(), *(v for kept in moments.values() for v in kept.values())]
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise TypeError("its values are no tensors")
    except FileNotFoundError:
        raise RelexkitError(
            f"{path}: is missing; restore it from a copy, or remove {path.parent} to begin again"
        ) from None
    except Exception as error:  # whatever torch makes of odd bytes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RelexkitError(
            f"{path}: is damaged ({reason}); restore it from a copy, or remove {path.parent} to"
            " begin again"
        ) from error
    return weights, moments


@contextmanager
def _removed_if_it_fails(temporary: Path, processes: Processes) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if processes.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    """Turns a failed write into an error that names the folder; torch's own names no file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RelexkitError):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise RelexkitError(
            f"{folder}: the state cannot be written ({reason}); the former one is intact: free"
            " space and run the command again"
        ) from error


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
