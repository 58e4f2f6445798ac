"""The prompt of a group passes through the model once, not once for each of its rollouts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def prompt_cache(model: Any, tokens_BP: torch.Tensor, mask_BP: torch.Tensor) -> DynamicCache | None:
    """Keys and values of all prompt tokens but the last, computed once for equal prompts, and given
    to every row; None where that does not apply.

    It applies if prompts repeat (the rollouts of a group do) and if the model keeps plain keys and
    values, nothing else; not to a model that computes its activations again, which keeps none.
    Where gradients are on, they flow through the cache to the prompt, and it does not apply to a
    sharded model, which takes one forward pass to a backward pass.

    Args:
        model: a transformers model for causal language modelling.
        tokens_BP, mask_BP: prompts padded on the left, ``int64 [B, P]`` each.
    """
    rows_of: dict[tuple[int, ...], int] = {}
    shown_BP = torch.where(mask_BP > 0, tokens_BP, -1).tolist()
    first_B = [rows_of.setdefault(tuple(row), number) for number, row in enumerate(shown_BP)]
    if 2 * len(rows_of) > len(first_B) or tokens_BP.shape[1] == 1:
        return None
    if _recomputes(model) or (torch.is_grad_enabled() and _is_sharded(model)):
        return None
    empty = DynamicCache(config=model.config)
    if not _is_plain(empty):
        return None
    rows = list(rows_of.values())
    shown = mask_BP[rows, :-1]
    outputs = model(
        input_ids=tokens_BP[rows, :-1],
        attention_mask=shown,
        position_ids=(shown.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=empty,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = getattr(outputs, "past_key_values", None)
    if not _is_plain(cache):
        return None
    place = {row: index for index, row in enumerate(rows)}
    cache.batch_select_indices(
        torch.tensor([place[row] for row in first_B], device=tokens_BP.device)
    )
    return cache


def _is_plain(cache: Any) -> bool:
    return type(cache) is DynamicCache and all(type(e) is DynamicLayer for e in cache.layers)


def _is_sharded(model: Any) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # torch's FSDPModule


def _recomputes(model: Any) -> bool:
    return model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
