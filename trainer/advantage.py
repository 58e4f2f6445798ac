"""Advantages: how much better a rollout is than the others of its prompt (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

STD_EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


def group_advantages(
    reward_PG: torch.Tensor,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> torch.Tensor:
    """Advantages ``float32 [P, G]`` of ``G`` rollouts of each of ``P`` prompts: ``R - mean(group)``, divided or not.

    Args:
        scale_rewards: divide by the unbiased standard deviation of the ``group`` or of the whole ``batch``, plus 1e-4; or not.
        gather: rewards of all processes from those of this one, for ``batch``.

    A group whose rewards agree has advantages 0.
    """
    centred = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    if scale_rewards == "none":
        return centred
    spread = reward_PG.std(dim=1, keepdim=True) if scale_rewards == "group" else gather(reward_PG).std()
    return centred / (spread + STD_EPSILON)
