"""Direct preference optimisation (DPO, arXiv 2305.18290) of a model on preference pairs, in place.

With ``s`` the log-probability of a completion, summed or averaged over its tokens, and ``s_ref``
that under the reference, the loss of a pair is ``-(1 - e) log sigmoid(beta z) - e log sigmoid(-beta
z)``, ``z = (s - s_ref)_chosen - (s - s_ref)_rejected`` and ``e`` the label smoothing: with ``e =
0`` TRL's ``sigmoid`` on sums and ``sigmoid_norm`` on averages.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from relexkit import RelexkitError
from relexkit.trainer.experiments.preferences import Pair
from relexkit.trainer.policy.log_probabilities import (
    make_batch,
    micro_batches,
    sampled_logprobs,
    token_logprobs,
)
from relexkit.trainer.policy.sampling import Completion, stream_seed
from relexkit.trainer.policy.setup import schedule_factor

if TYPE_CHECKING:
    from relexkit.trainer.config import G2DConfig


def dpo_loss(
    margin_B: torch.Tensor,
    reference_margin_B: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Losses ``float32 [B]`` of pairs from the margins ``s_chosen - s_rejected`` of the policy and
    of the reference.
    """
    z_B = beta * (margin_B - reference_margin_B)
    return -(1 - label_smoothing) * F.logsigmoid(z_B) - label_smoothing * F.logsigmoid(-z_B)


def reference_margins(
    model: Any, pairs: Sequence[Pair], config: G2DConfig, pad: int, autocast: bool
) -> torch.Tensor:
    """``s_chosen - s_rejected`` of every pair under ``model``, ``float32 [N]``, computed once,
    without gradient.
    """
    sides = []
    for completions in _sides(pairs):
        logps = sampled_logprobs(model, completions, 1.0, config.micro_batch_tokens, pad, autocast)
        sides.append(
            torch.stack([logp.mean() if config.average_log_prob else logp.sum() for logp in logps])
        )
    return sides[0] - sides[1]


def train_dpo(
    model: Any,
    pairs: Sequence[Pair],
    reference_margin_N: torch.Tensor,
    config: G2DConfig,
    pad: int,
    autocast: bool = False,
) -> Iterator[dict[str, float]]:
    """Train a model on pairs, in place, as far as it is iterated: the metrics of every step, named
    as in TRL.

    Pairs are shuffled anew for each epoch by the seed alone, so a run is repeatable bit for bit on
    a CPU. Memory: gradients and AdamW's moments beside the weights, and the activations of a
    micro-batch.

    Raises:
        RelexkitError: the loss is not finite; the weights are those of the step before.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    order = _order(len(pairs), config)
    model.train()
    for step, indices in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule_factor(
                config.lr_scheduler_type, step, 0, len(order)
            )
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(stream_seed(config.seed, ("dpo", step)))
        sums = _accumulate(
            model, [pairs[i] for i in indices], reference_margin_N[indices], config, pad, autocast
        )
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
        entry = {name: value / len(indices) for name, value in sums.items()} | {
            "grad_norm": norm,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        if not (torch.isfinite(torch.tensor([entry["loss"], norm])).all()):
            raise RelexkitError(
                f"DPO step {step + 1}: the loss is {entry['loss']}; expected a number: lower"
                " learning_rate"
            )
        optimizer.step()
        yield entry
    model.eval()


def _accumulate(
    model: Any,
    pairs: Sequence[Pair],
    reference_B: torch.Tensor,
    config: G2DConfig,
    pad: int,
    autocast: bool,
) -> dict[str, float]:
    """Gradients of the mean loss of a batch of pairs, micro-batch by micro-batch; sums over the
    pairs.
    """
    sums = dict.fromkeys(("loss", "rewards/accuracies", "rewards/margins"), 0.0)
    chosen, rejected = _sides(pairs)
    longest = [
        max(two, key=lambda c: len(c.completion_ids)) for two in zip(chosen, rejected, strict=True)
    ]
    for group in micro_batches(longest, max(1, config.micro_batch_tokens // 2)):
        rows = [chosen[i] for i in group] + [rejected[i] for i in group]
        batch = make_batch(rows, pad, model.device)
        logp_BT, _ = token_logprobs(model, batch, 1.0, autocast)
        total_B = (logp_BT * batch.mask).sum(dim=1)
        if config.average_log_prob:
            total_B = total_B / batch.mask.sum(dim=1).clamp(min=1)
        margin_B = total_B[: len(group)] - total_B[len(group) :]
        loss_B = dpo_loss(
            margin_B, reference_B[group].to(margin_B.device), config.beta, config.label_smoothing
        )
        (loss_B.sum() / len(pairs)).backward()
        reward_B = config.beta * (margin_B.detach() - reference_B[group].to(margin_B.device))
        sums["loss"] += float(loss_B.detach().sum())
        sums["rewards/accuracies"] += float((reward_B > 0).sum())
        sums["rewards/margins"] += float(reward_B.sum())
    return sums


def _sides(pairs: Sequence[Pair]) -> tuple[list[Completion], list[Completion]]:
    chosen = [Completion(pair.prompt_ids, pair.chosen_ids, pair.chosen, False) for pair in pairs]
    return chosen, [
        Completion(pair.prompt_ids, pair.rejected_ids, pair.rejected, False) for pair in pairs
    ]


def _order(count: int, config: G2DConfig) -> list[list[int]]:
    """The pairs of every optimizer step."""
    steps = []
    for epoch in range(config.num_train_epochs):
        indices = list(range(count))
        random.Random(stream_seed(config.seed, ("pairs", epoch))).shuffle(indices)
        steps += [
            indices[begin : begin + config.train_batch_size]
            for begin in range(0, count, config.train_batch_size)
        ]
    return steps
