"""Names of tensors as the model has them, from the keys under which trainers save them."""

from __future__ import annotations

from collections.abc import Iterable

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def model_names(keys: Iterable[str]) -> dict[str, str]:
    """Key -> name: without what wrappers and savers put around, which is ``module.``, ``model.`` or
    ``app.model.``.

    Names of Hugging Face models themselves begin with ``model.``: it goes only if every key has it
    and if below it are again ``model.`` or ``lm_head``, or names that are no Hugging Face module's.

    >>> model_names(["model.model.norm.weight", "model.lm_head.weight"])["model.lm_head.weight"]
    'lm_head.weight'
    """
    names = {}
    for key in keys:
        name = key
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        names[key] = name
    for prefix in ("app.model.", "module.", "model."):
        if names and all(name.startswith(prefix) for name in names.values()):
            inner = {key: name.removeprefix(prefix) for key, name in names.items()}
            if prefix != "model." or any(
                name.startswith(("model.", "lm_head.")) for name in inner.values()
            ):
                names = inner
    return names
