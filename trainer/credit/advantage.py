"""Advantages: how much better a rollout is than the others of its prompt (GRPO, arXiv 2402.03300;
LamPO, arXiv 2605.21235).
"""

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
    """Advantages ``float32 [P, G]`` of ``G`` rollouts of each of ``P`` prompts: ``R -
    mean(group)``, divided or not.

    Args:
        scale_rewards: divide by the unbiased standard deviation of the ``group`` or of the whole
            ``batch``, plus 1e-4; or not.
        gather: rewards of all processes from those of this one, for ``batch``.

    A group whose rewards agree has advantages 0.
    """
    centred = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    if scale_rewards == "none":
        return centred
    spread = (
        reward_PG.std(dim=1, keepdim=True) if scale_rewards == "group" else gather(reward_PG).std()
    )
    return centred / (spread + STD_EPSILON)


def lampo_advantages(
    reward_PG: torch.Tensor, logp_PG: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Pairwise advantages ``float32 [P, G]``: ``A_i = 1/(G-1) sum_j w_ij (R_i - R_j)``, which sum
    to zero in a group.

    ``w_ij = sigmoid(-sign(R_i - R_j) (s_i - s_j) / temperature)`` is small where the policy prefers
    the better of two rollouts already. For high temperatures all weights are 1/2 and the advantages
    ``G / (2 (G - 1))`` times those that are only centred.

    The paper (LamPO, arXiv 2605.21235) has been withdrawn and no formula was released: this one
    follows its abstract.

    Args:
        logp_PG: ``s``, the rollouts' log-probabilities under the policy that sampled them, summed
            or averaged over tokens.
    """
    difference_PGG = reward_PG[:, :, None] - reward_PG[:, None, :]
    preference_PGG = logp_PG[:, :, None] - logp_PG[:, None, :]
    weight_PGG = torch.sigmoid(-difference_PGG.sign() * preference_PGG / temperature)
    return (weight_PGG * difference_PGG).sum(dim=2) / (reward_PG.shape[1] - 1)
