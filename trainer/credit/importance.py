"""Importance of tokens that were sampled under slightly other probabilities than the policy's, by
the rules and names of TRL 1.16.

With ``d = logp - sampled_logp`` the ratio is ``exp(d)`` of each token, or ``exp`` of the sum of
``d`` over the completion for all of its tokens (``sequence``). It is cut to ``[clip_min,
clip_max]`` (``truncate``), or set to 0 outside (``mask``), and multiplies the surrogate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from relexkit.trainer.config import GRPOConfig


def importance_ratios(
    logp: Sequence[torch.Tensor], sampled: Sequence[torch.Tensor], config: GRPOConfig
) -> list[torch.Tensor]:
    """Ratios of every completion's tokens, ``float32 [tokens]`` each.

    Args:
        logp, sampled: log-probabilities under the policy and under what sampled, ``[tokens]`` each;
            where the latter is NaN the ratio of the token is 1.
    """
    level, _, rule = config.vllm_importance_sampling_mode.partition("_")
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    ratios = []
    for own, other in zip(logp, sampled, strict=True):
        difference = (own - other.to(own.device)).nan_to_num(nan=0.0)
        if level == "sequence":
            difference = difference.sum().expand_as(difference)
        ratio = difference.exp()
        if rule == "truncate":
            ratio = ratio.clamp(min=low, max=high)
        else:
            outside = torch.zeros_like(ratio, dtype=torch.bool)
            outside |= ratio < low if low is not None else False
            outside |= ratio > high if high is not None else False
            ratio = ratio.masked_fill(outside, 0.0)
        ratios.append(ratio)
    return ratios


def importance_metrics(
    logp: Sequence[torch.Tensor],
    sampled: Sequence[torch.Tensor],
    ratios: Sequence[torch.Tensor] | None,
) -> dict[str, float]:
    """How far the policy and what sampled are apart, under TRL's names."""
    away = torch.cat(
        [(own - other.to(own.device)).abs() for own, other in zip(logp, sampled, strict=True)]
    )
    away = away[~away.isnan()]
    metrics = {
        "sampling/sampling_logp_difference/mean": float(away.mean()) if len(away) else 0.0,
        "sampling/sampling_logp_difference/max": float(away.max()) if len(away) else 0.0,
    }
    if ratios is not None:
        every = torch.cat(list(ratios))
        metrics |= {
            "sampling/importance_sampling_ratio/min": float(every.min()),
            "sampling/importance_sampling_ratio/mean": float(every.mean()),
            "sampling/importance_sampling_ratio/max": float(every.max()),
        }
    return metrics
