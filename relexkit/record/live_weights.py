"""The weights of a live model, one whole tensor at a time, however a trainer has sharded them.

Plain and DDP models hold whole tensors. FSDP2 holds ``DTensor``, FSDP1 flat pieces of several
parameters, DeepSpeed partitions or 16-bit copies of float32 masters. Gathering is collective: every
process walks through the same tensors in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by their ``state_dict`` names, without the prefixes of
    wrappers; shared ones once.
    """
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[plain_name(name)] = tensor
    return weights


def plain_name(name: str) -> str:
    """A name without what FSDP, ``torch.compile`` and activation checkpointing put into it, and DDP
    in front of it.
    """
    pieces = [piece for piece in name.split(".") if piece not in _WRAPPERS]
    while len(pieces) > 1 and pieces[0] == "module":
        del pieces[0]
    return ".".join(pieces)


def whole_weights(
    model: torch.nn.Module, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole tensor of every weight, or of the ``wanted`` ones, the same on every process;
    each is good until the next one is asked for. Collective if they are sharded.

    Under DeepSpeed these are the float32 masters of what is trained, whatever precision the model
    itself has.
    """
    if _fsdp_modules(model):
        yield from (
            (name, whole)
            for name, whole in _fsdp_weights(model)
            if wanted is None or name in wanted
        )
        return
    for name, weight in named_weights(model).items():
        if wanted is not None and name not in wanted:
            continue
        if _of_deepspeed(weight):
            yield name, _deepspeed_whole(weight)
        else:
            yield name, weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def are_whole(model: torch.nn.Module) -> bool:
    """True if this process holds every weight whole, with nothing to gather."""
    return not _fsdp_modules(model) and not any(
        _of_deepspeed(weight) or hasattr(weight, "full_tensor")
        for weight in named_weights(model).values()
    )


def are_in_place(model: torch.nn.Module) -> bool:
    """True if what is written into the model's own tensors, whole or as FSDP2's shards, is what it
    trains on with.
    """
    return not _fsdp_modules(model) and not any(
        _of_deepspeed(weight) for weight in named_weights(model).values()
    )


def describe_weights(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, whole shape and dtype of every weight, as ``whole_weights`` gives them. Gathers only
    where there is no other way.
    """
    weights = named_weights(model) if not _fsdp_modules(model) else {}
    if weights and not any(_of_deepspeed(weight) for weight in weights.values()):
        return [(name, tuple(weight.shape), weight.dtype) for name, weight in weights.items()]
    return [(name, tuple(weight.shape), weight.dtype) for name, weight in whole_weights(model)]


def frozen_names(model: torch.nn.Module) -> set[str]:
    """Parameters that are not trained. Under FSDP1 with flat parameters a whole module counts as
    trained if any of it is.
    """
    return {
        plain_name(name)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


# -- FSDP1 -----------------------------------------------------------------------------------------


def _fsdp_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FullyShardedDataParallel)
    ]


def _fsdp_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of one wrapped module at a time, so that no process ever holds the whole
    model.

    Within ``summon_full_params`` a module names its parameters without the prefixes of wrappers.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = _fsdp_modules(model)
    names = {prefix for prefix, _ in wrapped}
    seen: set[int] = set()
    for name, tensor in _persistent(model, names):  # outside every wrapped module, and buffers
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield plain_name(name), tensor
    given: set[str] = set()
    for prefix, module in wrapped:
        own = plain_name(f"{prefix}." if prefix else "")
        inner = tuple(
            plain_name(f"{name}.")
            for name in names
            if name != prefix and name.startswith(f"{prefix}." if prefix else "")
        )
        with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
            for name, parameter in module.named_parameters():
                plain = own + plain_name(name)
                if not plain.startswith(inner) and plain not in given:
                    given.add(plain)
                    yield plain, parameter


def _persistent(model: torch.nn.Module, wrapped: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    inside = tuple(f"{name}." if name else "" for name in wrapped)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if not name.startswith(inside):
                yield name, parameter


# -- DeepSpeed -------------------------------------------------------------------------------------


def _of_deepspeed(weight: Any) -> bool:
    """A partitioned parameter (ZeRO-3), or one with a float32 master elsewhere (ZeRO-1 and 2)."""
    return hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping")


def _deepspeed_whole(weight: torch.Tensor) -> torch.Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(weight) if weight.requires_grad else None
    if master is not None:
        return master.reshape(getattr(weight, "ds_shape", weight.shape))
    if not hasattr(weight, "ds_id"):
        return weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=None):
        return weight.detach().clone()
