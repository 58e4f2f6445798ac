"""The clipped surrogate and its aggregations, under TRL's names and equal to TRL's on equal inputs.

With ``d = logp - old_logp`` the importance ratio is ``w = exp(d)`` of each token, or, at the
``sequence`` level (GSPO), ``exp`` of the mean of ``d`` over the completion. The loss of a token is
``-min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A)``, the first ``w`` capped at ``delta`` if that
is given, plus ``beta`` times the KL divergence to the reference by the k3 estimator, ``exp(ref -
logp) - (ref - logp) - 1``, times ``w`` with ``use_bias_correction_kl`` (its gradient is then that
of the reverse divergence, arXiv 2512.02556; TRL's default since 1.16, not ours). Sums run over the
completion tokens that count:

    grpo     mean over sequences of the mean over their tokens
    bnpo     sum over tokens / tokens of the optimizer step
    dapo     sum over tokens / (tokens of the generation / its steps)
    dr_grpo  sum over tokens / (sequences x max_completion_length)

``dapo`` is ``bnpo`` if a generation is one step.

With ``entropy_coef`` so many times the mean entropy over the tokens of the optimizer step is
subtracted, whatever ``loss_type`` is.

Where we differ from TRL: the denominators are those of the whole optimizer step over all processes,
so that splitting a step into micro-batches or processes does not change it (TRL averages ``bnpo``,
``grpo`` and the entropy over micro-batches).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from relexkit.trainer.config import GRPOConfig

_MAX_LOG_RATIO = 20.0  # exp of more is useless as a weight and overflows in the end


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """What sums are divided by: counts of the whole optimizer step, over all processes.

    ``sequences`` and ``tokens`` of the step, ``generation_tokens`` of the generation that it
    belongs to.
    """

    sequences: float
    tokens: float
    generation_tokens: float


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """A micro-batch of ``B`` completions of at most ``T`` tokens.

    Attributes:
        logp_BT: float32 log-probabilities of the completion tokens under the model, with gradient.
        mask_BT: 1 where a token counts.
        advantage_B: of the rollouts.
        old_logp_BT: those under the policy that sampled them; ``logp_BT`` itself, detached, if the
            batch is on-policy.
        ref_logp_BT: those under the reference; needed if ``beta`` is not 0.
        weight_BT: coefficients of the tokens, which multiply the surrogate (not the divergence); 1
            if None.
        entropy_BT: entropies of the tokens, with gradient; needed if ``entropy_coef`` is not 0.
    """

    logp_BT: torch.Tensor
    mask_BT: torch.Tensor
    advantage_B: torch.Tensor
    old_logp_BT: torch.Tensor | None = None
    ref_logp_BT: torch.Tensor | None = None
    weight_BT: torch.Tensor | None = None
    entropy_BT: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    """``loss``, a scalar with gradient: this micro-batch's share of the step's. ``sums``: detached
    sums over its tokens.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def policy_loss(inputs: LossInputs, denominators: Denominators, config: GRPOConfig) -> LossOutputs:
    """The loss of a micro-batch: its share of that of the optimizer step."""
    logp_BT, mask_BT, advantage_B1 = inputs.logp_BT, inputs.mask_BT, inputs.advantage_B[:, None]
    old = logp_BT.detach() if inputs.old_logp_BT is None else inputs.old_logp_BT
    difference_BT = logp_BT - old
    if config.importance_sampling_level == "sequence":
        mean_B = (difference_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
        difference_BT = mean_B[:, None].expand_as(logp_BT)
    ratio_BT = difference_BT.clamp(max=_MAX_LOG_RATIO).exp()
    low, high = 1 - config.epsilon, 1 + config.upper_epsilon
    capped_BT = ratio_BT if config.delta is None else ratio_BT.clamp(max=config.delta)
    gain_BT = torch.minimum(capped_BT * advantage_B1, ratio_BT.clamp(low, high) * advantage_B1)
    token_loss_BT = -gain_BT if inputs.weight_BT is None else -gain_BT * inputs.weight_BT
    zero = torch.zeros((), device=logp_BT.device)
    sums = {"kl": zero}
    if config.beta:
        assert inputs.ref_logp_BT is not None, "beta needs the reference's log-probabilities"
        kl_BT = k3_divergence(logp_BT, inputs.ref_logp_BT)
        kl_BT = kl_BT * ratio_BT if config.use_bias_correction_kl else kl_BT
        token_loss_BT = token_loss_BT + config.beta * kl_BT
        sums["kl"] = (kl_BT.detach() * mask_BT).sum()
    clipped_low = (ratio_BT.detach() < low) & (advantage_B1 < 0)
    clipped_high = (ratio_BT.detach() > high) & (advantage_B1 > 0)
    sums["clip_low"] = (clipped_low * mask_BT).sum().float()
    sums["clip_high"] = (clipped_high * mask_BT).sum().float()
    loss = aggregate(token_loss_BT, mask_BT, denominators, config)
    if config.entropy_coef:
        assert inputs.entropy_BT is not None, "entropy_coef needs the entropies"
        mean = (inputs.entropy_BT * mask_BT).sum() / max(1.0, denominators.tokens)
        loss = loss - config.entropy_coef * mean
    return LossOutputs(loss=loss, sums=sums)


def k3_divergence(logp_BT: torch.Tensor, ref_logp_BT: torch.Tensor) -> torch.Tensor:
    """Non-negative estimate of the KL divergence to the reference at each sampled token, ``[B, T]``
    (Schulman's k3).
    """
    difference_BT = (ref_logp_BT - logp_BT).clamp(max=_MAX_LOG_RATIO)
    return difference_BT.exp() - difference_BT - 1


def aggregate(
    token_loss_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    denominators: Denominators,
    config: GRPOConfig,
) -> torch.Tensor:
    """One number of the token losses of a micro-batch; over the micro-batches of a step these add
    up to its loss.
    """
    return AGGREGATIONS[config.loss_type](token_loss_BT, mask_BT, denominators, config)


def _grpo(
    token_loss_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    denominators: Denominators,
    config: GRPOConfig,
) -> torch.Tensor:
    mean_B = (token_loss_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
    return mean_B.sum() / max(1.0, denominators.sequences)


def _bnpo(
    token_loss_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    denominators: Denominators,
    config: GRPOConfig,
) -> torch.Tensor:
    return (token_loss_BT * mask_BT).sum(dim=1).sum() / max(1.0, denominators.tokens)


def _dapo(
    token_loss_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    denominators: Denominators,
    config: GRPOConfig,
) -> torch.Tensor:
    share = denominators.generation_tokens / config.steps_per_generation
    return (token_loss_BT * mask_BT).sum(dim=1).sum() / max(1.0, share)


def _dr_grpo(
    token_loss_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    denominators: Denominators,
    config: GRPOConfig,
) -> torch.Tensor:
    most = denominators.sequences * config.max_completion_length
    return (token_loss_BT * mask_BT).sum(dim=1).sum() / max(1.0, most)


AGGREGATIONS = {"grpo": _grpo, "bnpo": _bnpo, "dr_grpo": _dr_grpo, "dapo": _dapo}
"""How token losses become one number, by ``loss_type``."""
