"""Padded batches and log-probabilities against rows computed alone, without padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from relexkit.trainer.policy.log_probabilities import (
    make_batch,
    micro_batches,
    padded,
    sampled_logprobs,
    token_logprobs,
)
from relexkit.trainer.policy.sampling import Completion
from relexkit.trainer.policy.shared_prompts import prompt_cache

ROWS = [
    Completion([5, 6, 7], [8, 9, 1], "", False),
    Completion([5], [6, 7, 8, 9, 10], "", True),
    Completion([9, 9, 9, 9], [], "", True),
    Completion([7, 8], [1], "", False),
]


def alone(
    model: torch.nn.Module, row: Completion, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of a row by itself, in float64 after the logits."""
    tokens = torch.tensor([row.prompt_ids + row.completion_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0].double() / temperature
    logp = logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
    chosen = logp[
        torch.arange(len(row.completion_ids)), torch.tensor(row.completion_ids, dtype=torch.int64)
    ]
    return chosen, -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_padding_changes_nothing(temperature):
    model = tiny_model()
    batch = make_batch(ROWS, 0, "cpu")
    logp_BT, entropy_BT = token_logprobs(model, batch, temperature, False)
    assert batch.mask.sum(dim=1).tolist() == [3, 5, 0, 1]
    for row, logp_T, entropy_T in zip(ROWS, logp_BT, entropy_BT, strict=True):
        expected, entropy = alone(model, row, temperature)
        count = len(row.completion_ids)
        torch.testing.assert_close(logp_T[:count].double(), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(entropy_T[:count].double(), entropy, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_sampled_logprobs_are_in_the_order_of_the_rows_whatever_the_budget(max_tokens):
    model = tiny_model()
    found = sampled_logprobs(model, ROWS, 1.0, max_tokens, 0, False)
    for row, logp in zip(ROWS, found, strict=True):
        torch.testing.assert_close(logp.double(), alone(model, row, 1.0)[0], atol=2e-6, rtol=1e-5)
        assert not logp.requires_grad


def test_a_batch_of_empty_completions_works():
    batch = make_batch([ROWS[2]], 0, "cpu")
    logp_BT, _ = token_logprobs(tiny_model(), batch, 1.0, False)
    assert logp_BT.shape == (1, 1)
    assert batch.mask.tolist() == [[0.0]]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=40),
    st.integers(1, 300),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, max_tokens):
    rows = [Completion([0] * prompt, [0] * completion, "", True) for prompt, completion in lengths]
    groups = micro_batches(rows, max_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    for group in groups:
        longest = max(lengths[row][0] for row in group) + max(lengths[row][1] for row in group)
        assert len(group) == 1 or len(group) * longest <= max_tokens


def test_padded_rows_are_zero_where_there_is_no_token():
    out = padded([torch.tensor([1.0, 2.0]), torch.empty(0)], torch.ones(2, 3))
    assert out.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def grouped_rows() -> list[Completion]:
    """Three prompts of different lengths, of which two begin alike, with four rollouts each."""
    prompts = [[5, 6, 7, 8], [5, 6, 7], [9, 3, 9, 3, 9, 4]]
    return [
        Completion(prompt, [(3 * row + place) % 9 + 3 for place in range(length)], "", False)
        for row, prompt in enumerate(prompts)
        for length in (1, 4, 2, 0)
    ]


def test_the_prompt_of_a_group_passes_through_the_model_once(monkeypatch):
    """Log-probabilities and gradients are those of rows that are computed one by one."""
    model, rows = tiny_model(), grouped_rows()
    sizes: list[int] = []
    forward = model.model.forward

    def counted(*arguments, **options):
        sizes.append(options["input_ids"].numel())
        return forward(*arguments, **options)

    monkeypatch.setattr(model.model, "forward", counted)
    logp_BT, _ = token_logprobs(model, make_batch(rows, 0, "cpu"), 1.0, False)
    assert sizes == [3 * 5, 12 * 5]  # prompts but their last tokens; these and the completions
    loss = torch.zeros(())
    for weight, (row, logp_T) in enumerate(zip(rows, logp_BT, strict=True)):
        count = len(row.completion_ids)
        torch.testing.assert_close(
            logp_T[:count].double().detach(), alone(model, row, 1.0)[0], atol=2e-6, rtol=1e-5
        )
        loss = loss + (weight + 1) * logp_T[:count].sum()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for weight, row in enumerate(rows):
        batch = make_batch([row], 0, "cpu")
        single_BT, _ = token_logprobs(model, batch, 1.0, False)
        ((weight + 1) * single_BT * batch.mask).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("why", ["recomputes", "sharded", "no repetition", "slides"])
def test_a_prompt_is_not_shared_where_it_cannot_be(why, monkeypatch):
    model, rows = tiny_model(), grouped_rows()
    if why == "recomputes":
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
    elif why == "sharded":
        monkeypatch.setattr(model, "set_requires_gradient_sync", None, raising=False)
    elif why == "slides":
        model.config.sliding_window = 4
        model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
        monkeypatch.setattr(model, "forward", None)  # is not asked
    else:
        rows = rows[::4]
    batch = make_batch(rows, 0, "cpu")
    prompt = slice(0, batch.input_ids.shape[1] - batch.completion_ids.shape[1])
    shown = batch.input_ids[:, prompt], batch.attention_mask[:, prompt]
    assert prompt_cache(model, *shown) is None
    with torch.no_grad():
        assert (prompt_cache(model, *shown) is None) == (why != "sharded")
