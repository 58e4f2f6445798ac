"""What a run starts from: device and processes, the model in float32 (sharded over several
processes), the optimizer.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from relexkit import RelexkitError
from relexkit.extension import Processes

if TYPE_CHECKING:
    from trainer.config import G2DConfig, GRPOConfig


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What takes part in every step: the model that learns, the frozen one it is held to (or None),
    and how both compute.
    """

    model: Any
    reference: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    autocast: bool
    processes: Processes

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.processes.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        total = torch.tensor(self.processes.gather(total.tolist()), dtype=torch.float64).sum(dim=0)
        return total.tolist()


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """The processes that ``torchrun`` has started, joined for the time of the block; this one alone
    otherwise.

    Raises:
        RelexkitError: another process was lost while this one waited for it.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if several:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes()
    except RuntimeError as error:
        if not several or not re.search(
            "gloo|nccl|connection|socket|process group", str(error), re.IGNORECASE
        ):
            raise
        raise RelexkitError(
            f"process {os.environ.get('RANK')} lost the others ({str(error).splitlines()[0]}); what"
            " was recorded stays: start all of them again to go on from the last state"
        ) from error
    finally:
        if several:
            dist.destroy_process_group()


def choose_device(config: GRPOConfig | G2DConfig) -> torch.device:
    """``config.device``; each process takes the GPU of its local rank.

    Raises:
        RelexkitError: ``cuda`` was asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RelexkitError(
            "device: cuda was asked for but PyTorch sees no GPU; give --device cpu, or install a"
            " CUDA build"
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers for each file that it loads or saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(folder: str, device: torch.device) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a Hugging Face folder.

    Raises:
        RelexkitError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    if not Path(folder).is_dir():
        raise RelexkitError(
            f"{folder}: no such folder; expected a Hugging Face model: config.json, weights and"
            " tokenizer"
        )
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise RelexkitError(f"{folder}: cannot be loaded as a model ({error})") from error
    return model.to(device), load_tokenizer(folder)


def load_tokenizer(folder: str) -> Any:
    """Tokenizer of a Hugging Face folder.

    Raises:
        RelexkitError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RelexkitError(f"{folder}: has no tokenizer that can be loaded ({error})") from error


def shard(model: Any, processes: Processes, device: torch.device) -> Any:
    """Shard a model's parameters, in place, over the processes with FSDP2: its blocks one by one,
    then the rest.

    Blocks stay gathered between forward and backward pass, and so during a generation, which
    therefore needs no communication.
    """
    if processes.size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.size,))
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def load_policy(config: GRPOConfig, device: torch.device, processes: Processes) -> Policy:
    """Everything that takes part in the steps of a run, ready for the first.

    Raises:
        RelexkitError: the model cannot be loaded.
    """
    model, tokenizer = load_model(config.model, device)
    model.train()
    if config.gradient_checkpointing:
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )  # its name until v6
        enable({"use_reentrant": False})
    reference = None
    if config.beta:
        reference = shard(
            load_model(config.model, device)[0].requires_grad_(False), processes, device
        )
    shard(model, processes, device)
    return Policy(
        model=model,
        reference=reference,
        tokenizer=tokenizer,
        optimizer=build_optimizer(model, config),
        autocast=config.bf16 if config.bf16 is not None else device.type == "cuda",
        processes=processes,
    )


def build_optimizer(model: Any, config: GRPOConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; ``learning_rate`` is set before each step."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: GRPOConfig, step: int) -> float:
    """Learning rate of optimizer step ``step``, from 1, by transformers' definitions: the first
    step counts as 0.
    """
    return config.learning_rate * schedule_factor(
        config.lr_scheduler_type, step - 1, config.warmup_steps, config.max_steps
    )


def schedule_factor(schedule: str, done: int, warmup: int, total: int) -> float:
    """Share of the learning rate of the step after ``done`` of ``total`` steps."""
    if schedule != "constant" and done < warmup:
        return done / warmup
    progress = (done - warmup) / max(1, total - warmup)
    factor = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}.get(
        schedule, 1.0
    )
    return max(0.0, factor)
