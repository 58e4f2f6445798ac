"""One optimizer step: the gradients of its micro-batches, the update, and what is logged of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relexkit import RelexkitError
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.credit.assignment import informativeness
from relexkit.trainer.credit.gradient_noise import GradientParts
from relexkit.trainer.credit.loss import Denominators, LossInputs, policy_loss
from relexkit.trainer.loop.generation import Generation
from relexkit.trainer.policy.bfloat16_adamw import BFloat16AdamW
from relexkit.trainer.policy.log_probabilities import (
    make_batch,
    micro_batches,
    padded,
    token_logprobs,
)
from relexkit.trainer.policy.sampling import Completion, pad_token, stream_seed
from relexkit.trainer.policy.setup import Policy, learning_rate


def optimizer_step(
    config: GRPOConfig, policy: Policy, generation: Generation, part: int, step: int
) -> dict[str, float]:
    """Take optimizer step ``step`` on one part of a generation, in place; returns what is logged,
    named as in TRL.

    Raises:
        RelexkitError: the loss or the gradient is not finite; the weights are those of the step
            before.
    """
    rows = _rows_of_part(config, generation, part)
    completions = [generation.completions[row] for row in rows]
    tokens = [
        len(c.completion_ids) * generation.counts[row]
        for c, row in zip(completions, rows, strict=True)
    ]
    every_token = sum(
        len(c.completion_ids) * n
        for c, n in zip(generation.completions, generation.counts, strict=True)
    )
    totals = policy.sum(float(len(rows)), float(sum(tokens)), float(every_token))
    denominators = Denominators(sequences=totals[0], tokens=totals[1], generation_tokens=totals[2])
    rate = learning_rate(config, step)
    for group in policy.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(stream_seed(config.seed, ("dropout", step, policy.processes.rank)))
    policy.optimizer.zero_grad(set_to_none=True)
    sums, fresh, noise = _accumulate(config, policy, generation, rows, denominators)
    names = sorted(sums)
    total = dict(zip(names, policy.sum(*(sums[name] for name in names)), strict=True))
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    for name, value in (("loss", total["loss"]), ("gradient norm", grad_norm)):
        if not torch.isfinite(torch.tensor(value)):
            raise RelexkitError(
                f"step {step}: the {name} is {value}; expected a finite number: the weights of step"
                f" {step - 1} are recorded, lower learning_rate or max_grad_norm and resume from"
                " the last state, or start again"
            )
    policy.optimizer.step()
    if generation.old_logp is None:
        generation.old_logp = fresh
    return _step_metrics(config, policy, generation, rows, total, denominators) | {
        "grad_norm": grad_norm,
        "learning_rate": rate,
        **_lost_updates(policy),
        **noise,
        **generation.shares,
    }


def _lost_updates(policy: Policy) -> dict[str, float]:
    """Share of the updates of bfloat16 weights that rounding to nearest loses."""
    if not isinstance(policy.optimizer, BFloat16AdamW):
        return {}
    lost, moved = policy.sum(*policy.optimizer.lost_and_moved())
    return {"lost_updates": lost / max(1.0, moved)}


def _rows_of_part(config: GRPOConfig, generation: Generation, part: int) -> list[int]:
    """The rows of every ``steps_per_generation``-th prompt: whole groups."""
    prompts = range(part, generation.reward_PG.shape[0], config.steps_per_generation)
    return [
        prompt * config.num_generations + sample
        for prompt in prompts
        for sample in range(config.num_generations)
    ]


def _accumulate(
    config: GRPOConfig,
    policy: Policy,
    generation: Generation,
    rows: list[int],
    denominators: Denominators,
) -> tuple[dict[str, float], list[torch.Tensor], dict[str, float]]:
    """Gradients of the step's loss, micro-batch by micro-batch.

    Returns sums over its tokens, every row's log-probabilities, and what is logged of the
    gradient's noise.
    """
    device = policy.model.device
    completions = [generation.completions[row] for row in rows]
    advantage_B = generation.advantage_PG.view(-1)[rows].to(device)
    counts_B = torch.tensor(
        [generation.counts[row] for row in rows], dtype=torch.float32, device=device
    )
    # What cannot move the weights takes no backward pass; processes exchange gradients, so there
    # each takes every row.
    may_skip = not config.beta and not config.entropy_coef and policy.processes.size == 1
    trains_B = ((advantage_B * counts_B != 0) | (not may_skip)).tolist()
    groups = _grouped(config, completions, trains_B)
    parts = GradientParts(policy.optimizer) if config.gradient_noise_parts else None
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip_low", "clip_high"), 0.0)
    fresh: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    token_weights = generation.surrogate_weights
    for group, ends_part in groups:
        batch = make_batch(
            [completions[index] for index in group], pad_token(policy.tokenizer), device
        )
        if policy.processes.size > 1:  # gradients are exchanged once, with the last micro-batch
            policy.model.set_requires_gradient_sync(ends_part)
        with torch.set_grad_enabled(trains_B[group[0]]):
            logp_BT, entropy_BT = token_logprobs(
                policy.model,
                batch,
                config.temperature,
                policy.autocast,
                entropy_gradient=config.entropy_coef > 0,
            )
        mask_BT = batch.mask * counts_B[group, None]
        old, ref, weight = (
            None if values is None else padded([values[rows[index]] for index in group], logp_BT)
            for values in (generation.old_logp, generation.ref_logp, token_weights)
        )
        inputs = LossInputs(
            logp_BT=logp_BT,
            mask_BT=mask_BT,
            advantage_B=advantage_B[group],
            old_logp_BT=old,
            ref_logp_BT=ref,
            weight_BT=weight,
            entropy_BT=entropy_BT,
        )
        outputs = policy_loss(inputs, denominators, config)
        if outputs.loss.requires_grad:
            (outputs.loss * policy.processes.size).backward()  # FSDP averages over processes
        sums["loss"] += float(outputs.loss.detach())
        sums["entropy"] += float((entropy_BT.detach() * mask_BT).sum())
        for name, value in outputs.sums.items():
            sums[name] += float(value)
        for index, logp_T in zip(group, logp_BT.detach(), strict=True):
            fresh[index] = logp_T[: len(completions[index].completion_ids)]
        if parts is not None and ends_part:
            parts.end_part()
    prompts = denominators.sequences / config.num_generations
    noise = {} if parts is None else parts.end_step(prompts, policy.sum)
    if not any(trains_B):  # the optimizer coasts on its momentum, as it does on a gradient of zero
        for parameter in policy.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return sums, fresh, noise


def _grouped(
    config: GRPOConfig, completions: Sequence[Completion], trains: Sequence[bool]
) -> list[tuple[list[int], bool]]:
    """Micro-batches of rows that all train or all do not, and whether a part of the step, whose
    gradient is measured, ends.

    Gradients are exchanged between processes where a part ends, so every process must have as many
    parts.
    """
    count = max(1, config.gradient_noise_parts)
    groups: list[tuple[list[int], bool]] = []
    for part in range(count):
        own = [
            row for row in range(len(completions)) if row // config.num_generations % count == part
        ]
        cut: list[list[int]] = []
        for alike in ([row for row in own if trains[row]], [row for row in own if not trains[row]]):
            cut += [
                [alike[i] for i in g]
                for g in micro_batches([completions[r] for r in alike], config.micro_batch_tokens)
            ]
        groups += [(group, number == len(cut) - 1) for number, group in enumerate(cut)]
    return groups


def _step_metrics(
    config: GRPOConfig,
    policy: Policy,
    generation: Generation,
    rows: list[int],
    total: dict[str, float],
    counted: Denominators,
) -> dict[str, float]:
    chosen = [generation.completions[row] for row in rows]
    reward_PG = generation.reward_PG.view(-1)[rows].view(-1, config.num_generations)
    spread_P = reward_PG.std(dim=1)
    lengths = [len(c.completion_ids) for c in chosen]
    groups, reward, spread, still, length, cut = policy.sum(
        float(len(spread_P)),
        float(reward_PG.sum()),
        float(spread_P.sum()),
        float((spread_P == 0).sum()),
        float(sum(lengths)),
        float(sum(c.truncated for c in chosen)),
    )
    tokens = max(1.0, counted.tokens)
    metrics = {
        "loss": total["loss"],
        "reward": reward / counted.sequences,
        "reward_std": spread / groups,
        "frac_reward_zero_std": still / groups,
        "entropy": total["entropy"] / tokens,
        "clip_ratio/low_mean": total["clip_low"] / tokens,
        "clip_ratio/high_mean": total["clip_high"] / tokens,
        "clip_ratio/region_mean": (total["clip_low"] + total["clip_high"]) / tokens,
        "completions/mean_length": length / counted.sequences,
        "completions/max_length": float(max(policy.processes.gather(max(lengths)))),
        "completions/clipped_ratio": cut / counted.sequences,
        **_informativeness(policy, generation, rows, reward_PG.shape, groups),
    }
    return metrics | ({"kl": total["kl"] / tokens} if config.beta else {})


def _informativeness(
    policy: Policy, generation: Generation, rows: list[int], shape: torch.Size, groups: float
) -> dict[str, float]:
    """Share of prompts with right and wrong rollouts, by how much the policy prefers the right
    ones, spread of the accuracy.
    """
    assert generation.old_logp is not None
    right_PG = torch.tensor([generation.right[row] for row in rows]).view(shape)
    sums = informativeness(right_PG, [generation.old_logp[row] for row in rows])
    total = dict(zip(sums, policy.sum(*sums.values()), strict=True))
    mean = total["rate"] / groups
    return {
        "accuracy": mean,
        "accuracy_spread": max(0.0, total["square"] / groups - mean**2) ** 0.5,
        "frac_groups_mixed": total["mixed"] / groups,
        "logp_margin": total["margin"] / total["mixed"] if total["mixed"] else float("nan"),
    }
