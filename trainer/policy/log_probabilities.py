"""What the model says of rollouts: padded batches under a token budget, log-probabilities and
entropies of completion tokens.

Shapes: ``B`` rows, ``L`` tokens of prompt and completion with padding, ``T`` of the longest
completion, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from relexkit.trainer.policy.sampling import Completion
from relexkit.trainer.policy.shared_prompts import prompt_cache

_LOGITS_BLOCK = 2**22  # logits whose exponentials are held at a time


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rollouts as tensors: prompts padded on the left, completions on the right.

    Attributes:
        input_ids, attention_mask, position_ids: ``int64 [B, L]``; positions count from each row's
            first token.
        completion_ids, mask: ``int64 [B, T]``, and ``float32 [B, T]`` with 1 for completion tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    completion_ids: torch.Tensor
    mask: torch.Tensor


def make_batch(completions: Sequence[Completion], pad: int, device: Any) -> Batch:
    """Pad rollouts into one batch; a completion may be empty."""
    prompt_length = max(len(c.prompt_ids) for c in completions)
    length = max(1, max(len(c.completion_ids) for c in completions))
    rows, masks = [], []
    for c in completions:
        left, right = prompt_length - len(c.prompt_ids), length - len(c.completion_ids)
        rows.append([pad] * left + c.prompt_ids + c.completion_ids + [pad] * right)
        masks.append([0] * left + [1] * (len(c.prompt_ids) + len(c.completion_ids)) + [0] * right)
    input_ids, attention_mask = (
        torch.tensor(rows, device=device),
        torch.tensor(masks, device=device),
    )
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        completion_ids=input_ids[:, prompt_length:],
        mask=attention_mask[:, prompt_length:].float(),
    )


def micro_batches(completions: Sequence[Completion], max_tokens: int) -> list[list[int]]:
    """Row numbers in groups whose padded size is at most ``max_tokens`` (a longer row is alone),
    similar lengths together.
    """

    def lengths(row: int) -> tuple[int, int]:
        return len(completions[row].prompt_ids), len(completions[row].completion_ids)

    groups: list[list[int]] = []
    prompt = completion = 0
    for row in sorted(range(len(completions)), key=lambda r: (sum(lengths(r)), r)):
        longest = max(prompt, lengths(row)[0]), max(completion, lengths(row)[1])
        if groups and (len(groups[-1]) + 1) * sum(longest) <= max_tokens:
            groups[-1].append(row)
            prompt, completion = longest
        else:
            groups.append([row])
            prompt, completion = lengths(row)
    return groups


def token_logprobs(
    model: Any,
    batch: Batch,
    temperature: float,
    autocast: bool,
    *,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability, with gradient, and entropy of every completion token, ``float32 [B, T]``
    each; the entropy with a gradient if ``entropy_gradient``.

    Both of the distribution at ``temperature``. Where the mask is 0 the values mean nothing.
    Memory: the logits ``[B, T + 1, V]`` and, in float32, 16 MiB or one copy of those of a row; with
    a
    gradient of the entropy three more copies of them.
    """
    length = batch.completion_ids.shape[1]
    prompt = batch.input_ids.shape[1] - length
    with autocast_for(batch.input_ids.device, autocast):
        cache = prompt_cache(model, batch.input_ids[:, :prompt], batch.attention_mask[:, :prompt])
        begin = 0 if cache is None else prompt - 1
        logits_BTV = model(
            input_ids=batch.input_ids[:, begin:],
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids[:, begin:],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=length + 1,
        ).logits[:, :-1]
    logits_BTV = logits_BTV.float()
    if temperature != 1:
        logits_BTV = logits_BTV / temperature
    selected_BT = logits_BTV.gather(-1, batch.completion_ids[..., None])[..., 0]
    rows = max(1, _LOGITS_BLOCK // logits_BTV[0].numel())
    blocks = logits_BTV.split(rows)
    normaliser_BT = torch.cat([block.logsumexp(dim=-1) for block in blocks])
    if entropy_gradient:
        probability_BTV = (logits_BTV - normaliser_BT[..., None]).exp()
        entropy_BT = normaliser_BT - (probability_BTV * logits_BTV).sum(dim=-1)
        return selected_BT - normaliser_BT, entropy_BT
    with torch.no_grad():
        norms = normaliser_BT.split(rows)
        expected_BT = torch.cat(
            [
                ((block - norm[..., None]).exp_() * block).sum(dim=-1)
                for block, norm in zip(blocks, norms, strict=True)
            ]
        )
    return selected_BT - normaliser_BT, normaliser_BT.detach() - expected_BT


def autocast_for(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """bfloat16 autocast on ``device``, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if enabled else nullcontext()


@torch.no_grad()
def sampled_logprobs(
    model: Any,
    completions: Sequence[Completion],
    temperature: float,
    max_tokens: int,
    pad: int,
    autocast: bool,
) -> list[torch.Tensor]:
    """Log-probabilities of every rollout's completion tokens, ``float32 [tokens]`` each, without
    gradient and without dropout, as the model samples; in micro-batches.
    """
    training = model.training
    model.eval()
    logprobs: list[torch.Tensor] = [torch.empty(0)] * len(completions)
    for rows in micro_batches(completions, max_tokens):
        batch = make_batch([completions[row] for row in rows], pad, model.device)
        logp_BT, _ = token_logprobs(model, batch, temperature, autocast)
        for row, logp_T in zip(rows, logp_BT, strict=True):
            logprobs[row] = logp_T[: len(completions[row].completion_ids)]
    model.train(training)
    return logprobs


def padded(rows: Sequence[torch.Tensor], like_BT: torch.Tensor) -> torch.Tensor:
    """Per-token values of rows as one ``[B, T]`` tensor of the shape of ``like_BT``, zero where
    there is no token.
    """
    out_BT = torch.zeros_like(like_BT)
    for row, values in zip(out_BT, rows, strict=True):
        row[: len(values)] = values
    return out_BT
