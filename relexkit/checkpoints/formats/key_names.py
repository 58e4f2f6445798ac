"""Names of tensors as the model has them, from the keys under which trainers save them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from relexkit.errors import CheckpointError

_T = TypeVar("_T")

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def model_names(keys: Iterable[str]) -> dict[str, str]:
    """Key -> name: without what wrappers and savers put around, which is ``module.``, ``model.`` or
    ``app.model.``.

    Names of Hugging Face models themselves begin with ``model.``: it goes only if every key has it
    and if below it are again ``model.`` or ``lm_head``, or names that no Hugging Face module has.

    >>> model_names(["model.model.norm.weight", "model.lm_head.weight"])["model.lm_head.weight"]
    'lm_head.weight'
    """
    names = {key: without_wrappers(key) for key in keys}
    for prefix in ("app.model.", "module.", "model."):
        if names and all(name.startswith(prefix) for name in names.values()):
            inner = {key: name.removeprefix(prefix) for key, name in names.items()}
            if prefix != "model." or any(
                name.startswith(("model.", "lm_head.")) for name in inner.values()
            ):
                names = inner
    return names


def without_wrappers(key: str) -> str:
    """A key without what ``torch.compile``, FSDP and activation checkpointing put into it."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def renamed(tensors: Mapping[str, _T], where: str) -> dict[str, _T]:
    """Tensors by ``model_names``.

    Raises:
        CheckpointError: two keys mean the same tensor.
    """
    names = model_names(tensors)
    by_name = {name: tensors[key] for key, name in names.items()}
    if len(by_name) != len(tensors):
        raise CheckpointError(
            f"{where}: several keys mean the same tensor; expected one model in a checkpoint"
        )
    return by_name
