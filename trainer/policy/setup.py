"""What a run starts from: device and processes, the model (sharded over several
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

from relexkit import RelexkitError
from relexkit.extension import Processes, joined
from relexkit.trainer.policy.bfloat16_adamw import BFloat16AdamW

if TYPE_CHECKING:
    from relexkit.trainer.config import G2DConfig, GRPOConfig
    from relexkit.trainer.policy.loading import Loading


PRECISIONS: dict[str, str | None] = {
    "float32": None,
    "bfloat16_nearest": "nearest",
    "bfloat16_stochastic": "stochastic",
    "bfloat16_compensated": "compensated",
}
"""How updates are rounded into bfloat16 weights, a key of ``bfloat16_adamw.ROUNDINGS``; None where
the weights are float32.
"""


_LOST = "gloo|nccl|connection|socket|process group"
"""What PyTorch says when another process is gone."""


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
    try:
        with joined("nccl" if device.type == "cuda" else "gloo") as processes:
            yield processes
    except RuntimeError as error:
        said = str(error)
        alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
        if alone or not re.search(_LOST, said, re.IGNORECASE):
            raise
        raise RelexkitError(
            f"process {os.environ['RANK']} lost the others ({said.splitlines()[0]}); what"
            " was recorded stays: start all of them again to go on from the last state"
        ) from error


def choose_device(config: GRPOConfig | G2DConfig | Loading) -> torch.device:
    """``config.device``; of ``cuda`` each process takes the GPU of its local rank.

    Raises:
        RelexkitError: it is unknown, or ``cuda`` was asked for and there is none.
    """
    if config.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise RelexkitError(
            f"device: {config.device!r} is unknown; expected auto, cpu, cuda or cuda:N"
        )
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise RelexkitError(
            "device: cuda was asked for but PyTorch sees no GPU; give --device cpu, or install a"
            " CUDA build"
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ":" in config.device:
        return torch.device(config.device)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers for every file that it loads or saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(
    folder: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    disable_dropout: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model, in ``dtype``, and tokenizer of a Hugging Face folder.

    Args:
        disable_dropout: every dropout rate is 0 in training too, so that the policy that is updated
            is the one that samples. ``own_dropout`` shows the model's own rates again, for
            what is saved.
        trust_remote_code: run the code that lies in the folder, if the model needs it.

    Raises:
        RelexkitError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not Path(folder).is_dir():
        raise RelexkitError(
            f"{folder}: no such folder; expected a Hugging Face model: config.json, weights and"
            " tokenizer"
        )
    try:
        with quiet():
            # said each time: transformers asks at a prompt where it is left open
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            rates = _dropout_rates(config) if disable_dropout else {}
            _set_rates(config, dict.fromkeys(rates, 0.0))
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        _refuse_untrusted(error, folder, trust_remote_code)
        raise RelexkitError(f"{folder}: cannot be loaded as a model ({error})") from error
    if disable_dropout:
        for module in model.modules():  # what a model's code sets whatever its configuration says
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.p = 0.0
    model.own_dropout_rates = rates
    return model.to(device), load_tokenizer(folder, trust_remote_code=trust_remote_code)


@contextmanager
def own_dropout(model: Any) -> Iterator[None]:
    """For the time of the block, the configuration of a model of ``load_model`` has the dropout
    rates of its folder: what is saved there is not changed by how it was trained.
    """
    rates = getattr(model, "own_dropout_rates", {})
    _set_rates(model.config, rates)
    try:
        yield
    finally:
        _set_rates(model.config, dict.fromkeys(rates, 0.0))


def _dropout_rates(config: Any) -> dict[str, float]:
    """The dropout rates of a configuration that are not 0, by their dotted names."""
    rates: dict[str, float] = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):  # of a part of the model
            rates |= {f"{name}.{inner}": rate for inner, rate in _dropout_rates(value).items()}
        elif "drop" in name and isinstance(value, float) and 0 < value <= 1:
            rates[name] = value
    return rates


def _set_rates(config: Any, rates: dict[str, float]) -> None:
    for place, rate in rates.items():
        *parts, name = place.split(".")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, rate)


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a Hugging Face folder; its code runs only with ``trust_remote_code``.

    Raises:
        RelexkitError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        _refuse_untrusted(error, folder, trust_remote_code)
        raise RelexkitError(f"{folder}: has no tokenizer that can be loaded ({error})") from error


def _refuse_untrusted(error: Exception, folder: str, trust_remote_code: bool) -> None:
    if not trust_remote_code and "trust_remote_code" in str(error):
        raise RelexkitError(
            f"{folder}: needs code of its own (auto_map), none of which was run; read it, and give"
            " --trust-remote-code if it may be run"
        ) from error


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


def load_policy(
    config: GRPOConfig,
    device: torch.device,
    processes: Processes,
    *,
    trust_remote_code: bool = False,
) -> Policy:
    """Everything that takes part in the steps of a run, ready for the first.

    Raises:
        RelexkitError: the model cannot be loaded.
    """
    rounding = PRECISIONS[config.precision]
    dtype = torch.float32 if rounding is None else torch.bfloat16
    model, tokenizer = load_model(
        config.model,
        device,
        dtype,
        disable_dropout=config.disable_dropout,
        trust_remote_code=trust_remote_code,
    )
    model.train()
    if config.gradient_checkpointing:
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )  # its name until v6
        enable({"use_reentrant": False})
    reference = None
    if config.beta:
        other, _ = load_model(config.model, device, dtype, trust_remote_code=trust_remote_code)
        reference = shard(other.requires_grad_(False), processes, device)
    shard(model, processes, device)
    return Policy(
        model=model,
        reference=reference,
        tokenizer=tokenizer,
        optimizer=build_optimizer(model, config),
        autocast=(
            rounding is None and device.type == "cuda" if config.bf16 is None else config.bf16
        ),
        processes=processes,
    )


def build_optimizer(model: Any, config: GRPOConfig) -> torch.optim.AdamW | BFloat16AdamW:
    """AdamW over all parameters; ``learning_rate`` is set before each step."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    rounding = PRECISIONS[config.precision]
    if rounding is None:
        return torch.optim.AdamW(model.parameters(), fused=True, **options)
    return BFloat16AdamW(model.named_parameters(), rounding=rounding, seed=config.seed, **options)


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
