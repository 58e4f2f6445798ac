"""Sampled completions: the distribution, the random streams, the ends, the padding."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

from relexkit import RelexkitError
from relexkit.trainer.policy.sampling import Sampling, generate, stream_seed

EOS = VOCABULARY.index("<eos>")
PROMPTS = ["12>", "3+4=", "98765>", "1>", "22+1="]


def sample(prompts=PROMPTS, keys=None, batch_size=8, model=None, **options):
    sampling = Sampling(**{"max_completion_length": 6, "batch_size": batch_size, **options})
    return generate(
        model or tiny_model(),
        tiny_tokenizer(),
        prompts,
        keys or range(len(prompts)),
        sampling,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_completion_does_not_depend_on_its_batch(batch_size):
    assert sample(batch_size=batch_size) == sample(batch_size=8)


def test_prompts_that_repeat_are_read_once_and_complete_as_if_they_had_not():
    prompts = [prompt for prompt in (*PROMPTS, PROMPTS[1]) for _ in range(3)]
    alone = sample(prompts=prompts, batch_size=1)
    assert len({tuple(c.completion_ids) for c in alone}) > len(PROMPTS)
    model, shapes = tiny_model(), []
    model.register_forward_pre_hook(
        lambda *call: shapes.append(tuple(call[-1]["input_ids"].shape)), with_kwargs=True
    )
    assert sample(prompts=prompts, model=model, batch_size=len(prompts)) == alone
    longest = max(len(c.prompt_ids) for c in alone)
    assert shapes[:2] == [(len(PROMPTS), longest - 1), (len(prompts), 1)]


def test_a_longer_completion_begins_like_a_shorter_one(monkeypatch):
    monkeypatch.setattr(
        "relexkit.trainer.policy.sampling._NOISE_BLOCK", 2 * len(VOCABULARY)
    )  # the noise of two tokens at a time
    short, long = sample(max_completion_length=3), sample(max_completion_length=25)
    assert [c.completion_ids for c in short] == [c.completion_ids[:3] for c in long]
    assert max(len(c.completion_ids) for c in long) > 4


def test_streams_belong_to_keys_and_seeds():
    again = sample(prompts=PROMPTS[:1] * 3, keys=["a", "b", "a"])
    assert again[0] == again[2] != again[1]
    assert sample(seed=1) != sample(seed=0) == sample(seed=0)
    assert stream_seed(0, 1) != stream_seed(0, "1")


def test_sampling_draws_from_the_models_distribution():
    """Frequencies of the first token against the softmax at temperature 1.5: chi-squared below its
    99.9 % point.
    """
    model, tokenizer, count = tiny_model(), tiny_tokenizer(), 2000
    drawn = sample(
        prompts=["12>"] * count,
        keys=range(count),
        batch_size=500,
        max_completion_length=1,
        temperature=1.5,
    )
    with torch.no_grad():
        logits = model(
            **tokenizer(["12>"], return_tensors="pt", return_token_type_ids=False)
        ).logits[0, -1]
    expected = count * (logits / 1.5).softmax(-1)
    found = Counter(c.completion_ids[0] for c in drawn)
    likely = [token for token in range(len(VOCABULARY)) if expected[token] >= 5]
    rest = count - float(expected[likely].sum())
    terms = [
        (found[token] - float(expected[token])) ** 2 / float(expected[token]) for token in likely
    ]
    others = sum(n for token, n in found.items() if token not in likely)
    statistic = sum(terms) + ((others - rest) ** 2 / rest if rest > 1 else 0.0)
    freedom = len(likely)
    assert freedom >= 5
    assert (
        statistic < freedom + 3.1 * math.sqrt(2 * freedom) + 5
    )  # above the 99.9 % point for 5 to 15 degrees


def test_greedy_is_the_likeliest_token_each_time_and_needs_no_key():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for completion in sample(temperature=0.0, max_completion_length=5):
        tokens = list(completion.prompt_ids)
        for token in completion.completion_ids:
            with torch.no_grad():
                assert int(model(torch.tensor([tokens])).logits[0, -1].argmax()) == token
            tokens.append(token)
        assert tokenizer.decode(completion.prompt_ids).replace(" ", "") in PROMPTS


def test_completions_end_with_the_end_token_or_are_truncated():
    completions = sample(
        prompts=["12>"] * 60, keys=range(60), max_completion_length=8, temperature=2.0
    )
    assert {c.truncated for c in completions} == {True, False}
    for c in completions:
        assert len(c.completion_ids) == 8 if c.truncated else c.completion_ids[-1] == EOS
        assert c.completion_ids.count(EOS) == (not c.truncated)
        assert "<eos>" not in c.text


@pytest.mark.parametrize(
    ("cut", "most"), [({"top_k": 1}, 1), ({"top_k": 3}, 3), ({"top_p": 1e-6}, 1)]
)
def test_cuts_leave_only_the_likeliest_tokens(cut, most):
    drawn = sample(
        prompts=["12>"] * 100, keys=range(100), max_completion_length=1, temperature=3.0, **cut
    )
    assert 1 <= len({c.completion_ids[0] for c in drawn}) <= most


def test_the_models_own_generation_settings_do_not_count_and_stay():
    model = tiny_model()
    plain = sample(model=model, temperature=0.0)
    model.generation_config.repetition_penalty = 50.0
    model.train()
    assert sample(model=model, temperature=0.0) == plain
    assert model.generation_config.repetition_penalty == 50.0
    assert model.training


def test_a_prompt_that_does_not_fit_is_named():
    with pytest.raises(
        RelexkitError,
        match=r"prompt '12345678901234567890>' has 21 tokens, with max_completion_length 12",
    ):
        sample(prompts=["12345678901234567890>"], max_completion_length=12)
    with pytest.raises(RelexkitError, match="prompt '' has no tokens"):
        sample(prompts=[""])
