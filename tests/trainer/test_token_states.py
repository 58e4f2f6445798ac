"""What is kept of a generation against a forward pass over the finished rollouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from relexkit.trainer.credit import token_states
from relexkit.trainer.credit.token_states import TokenStates
from relexkit.trainer.policy.log_probabilities import make_batch, token_logprobs
from relexkit.trainer.policy.sampling import Sampling, generate, pad_token

PROMPTS = ["1+2=", "7=", "33+21=", "9+9=", "40=", "5>", "12>", "8+1="]
MAX_TOKENS = 40


def rolled_out(temperature=1.5, keep_states=True, batch_size=2, **sampling):
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    states = TokenStates(model, temperature, keep_states=keep_states)
    options = Sampling(
        max_completion_length=12, temperature=temperature, batch_size=batch_size, **sampling
    )
    keys = list(range(len(PROMPTS)))
    completions = generate(model, tokenizer, PROMPTS, keys, options, watcher=states)
    assert generate(model, tokenizer, PROMPTS, keys, options) == completions
    return model, tokenizer, completions, states


def forward_pass(model, tokenizer, completion, temperature):
    """Log-probabilities and hidden states of one rollout by itself, from the model's own
    outputs.
    """
    tokens = torch.tensor([completion.prompt_ids + completion.completion_ids])
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    first = len(completion.prompt_ids) - 1
    logp = (output.logits[0].float() / temperature).log_softmax(-1)[first:-1]
    chosen = logp.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
    return chosen, output.hidden_states[-1][0, first:-1]


@pytest.mark.parametrize("sampling", [{}, {"top_k": 8}, {"top_p": 0.8}], ids=str)
def test_kept_states_are_those_of_a_forward_pass(sampling):
    model, tokenizer, completions, states = rolled_out(**sampling)
    lengths = {len(c.completion_ids) for c in completions}
    assert len(lengths) > 1, "rollouts of one length would hide a shift"
    proxies = {
        row: v
        for rows, block in states.blocks
        for row, v in zip(
            rows, block.split([len(completions[row].completion_ids) for row in rows]), strict=True
        )
    }
    assert not states.missing
    for row, completion in enumerate(completions):
        logp, hidden = forward_pass(model, tokenizer, completion, 1.5)
        expected = (1 - logp.exp())[:, None] * hidden
        np.testing.assert_allclose(states.logp[row], logp, atol=2e-5)
        np.testing.assert_allclose(proxies[row], expected, atol=2e-4)
        np.testing.assert_allclose(states.norms[row], expected.norm(dim=1), rtol=1e-3, atol=1e-4)


def test_the_proxy_is_the_gradient_at_the_row_of_the_head():
    model, tokenizer, completions, states = rolled_out(temperature=1.0)
    completion, block = completions[0], states.blocks[0][1]
    head = model.get_output_embeddings().weight
    batch = make_batch([completion], pad_token(tokenizer), "cpu")
    for position, token in enumerate(completion.completion_ids):
        logp = token_logprobs(model, batch, 1.0, False)[0][0, position]
        with torch.no_grad():
            hidden = forward_pass(model, tokenizer, completion, 1.0)[1][position]
        logits = (head.detach() @ hidden).requires_grad_()
        (gradient,) = torch.autograd.grad(logits.log_softmax(0)[token], logits)
        np.testing.assert_allclose(gradient[token] * hidden, block[position], atol=2e-4)
        assert logp.item() == pytest.approx(states.logp[0][position].item(), abs=2e-5)


def test_states_that_do_not_fit_are_computed_again(monkeypatch):
    *_, whole = rolled_out()
    monkeypatch.setattr(token_states, "KEPT_BYTES", 32 * 4 * 8)  # eight tokens
    model, tokenizer, completions, states = rolled_out()
    assert states.missing
    assert states.blocks

    def by_row(found):
        lengths = [len(c.completion_ids) for c in completions]
        return {
            row: v
            for rows, block in found
            for row, v in zip(rows, block.split([lengths[r] for r in rows]), strict=True)
        }

    again = by_row(states.sweep(model, completions, MAX_TOKENS, pad_token(tokenizer), False))
    assert sum(block.numel() * 4 for _, block in states.blocks) <= 32 * 4 * 8
    for row, v in by_row(whole.blocks).items():
        np.testing.assert_allclose(again[row], v, atol=2e-4)


def test_without_states_only_numbers_are_kept():
    *_, completions, states = rolled_out(keep_states=False)
    assert not states.blocks
    assert not states.missing
    assert [len(row) for row in states.logp] == [len(c.completion_ids) for c in completions]
