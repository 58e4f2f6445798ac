"""Engines for the tests: the same model in another object, which is told what to hold, in float32
or in bfloat16; and some that do not keep their word.
"""

from __future__ import annotations

from typing import Any

import torch

from relexkit.trainer.loop.engine import Sampled
from relexkit.trainer.policy.log_probabilities import sampled_logprobs
from relexkit.trainer.policy.sampling import generate, pad_token
from relexkit.trainer.policy.setup import load_model


class Other:
    """Keeps the weights that it was given, in ``loads``."""

    def __init__(self, config: Any, tokenizer: Any, dtype: torch.dtype):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.model = load_model(config.model, torch.device("cpu"))[0]

    def load(self, weights: Any) -> None:
        held = self.model.state_dict()
        with torch.no_grad():
            for name, weight in weights:
                held[name].copy_(weight.to(self.dtype))

    def generate(self, prompt_ids: Any, seeds: Any, sampling: Any, ends: Any) -> list[Sampled]:
        prompts = [self.tokenizer.decode(ids) for ids in prompt_ids]
        found = generate(self.model, self.tokenizer, prompts, seeds, sampling)
        pad = pad_token(self.tokenizer)
        logp = sampled_logprobs(self.model, found, sampling.temperature, 10**6, pad, False)
        return [
            Sampled(completion.completion_ids, row.tolist())
            for completion, row in zip(found, logp, strict=True)
        ]


def exact(config: Any, tokenizer: Any) -> Other:
    return Other(config, tokenizer, torch.float32)


def coarse(config: Any, tokenizer: Any) -> Other:
    return Other(config, tokenizer, torch.bfloat16)


def nothing(config: Any, tokenizer: Any) -> object:
    return object()


class Short(Other):
    def generate(self, *arguments: Any) -> list[Sampled]:
        return [Sampled([1, 2], [0.0])] * len(arguments[0])


def short(config: Any, tokenizer: Any) -> Other:
    return Short(config, tokenizer, torch.float32)
