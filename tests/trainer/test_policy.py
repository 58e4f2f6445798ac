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
