"""A generation engine beside the policy: another program that samples with the policy's weights.

    engine: FILE.py:FUNCTION

calls ``FUNCTION(config, tokenizer)``, which gives an ``Engine``. Before every generation it takes
over the weights; then it samples tokens and says how likely each one was to it. Where that differs
from what the policy says of the same tokens, as it always does a little with other kernels and
precisions, the loss is corrected (``trainer.credit.importance``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from relexkit import RelexkitError
from relexkit.extension import named_weights
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.policy.sampling import (
    Completion,
    Sampling,
    encode_prompt,
    end_tokens,
    stream_seed,
)
from relexkit.trainer.policy.setup import Policy
from relexkit.trainer.tasks.problems import load_function


@dataclass(frozen=True, slots=True)
class Sampled:
    """What an engine gives for one prompt.

    Attributes:
        token_ids: of the completion, the end-of-sequence token included if it came.
        logprobs: of each of them at the sampling temperature, without the cuts of ``top_k`` and
            ``top_p``; NaN where the engine cannot say.
    """

    token_ids: list[int]
    logprobs: list[float]


class Engine(Protocol):
    """Samples completions with the weights that it was given last."""

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take over the policy's weights: ``state_dict`` names, whole tensors on its device, good
        until the next step.
        """

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        ends: Sequence[int],
    ) -> list[Sampled]:
        """One completion of each prompt, in order, of at most ``sampling.max_completion_length``
        tokens; one of ``ends`` ends it. Equal seeds (63 bits) and weights must give equal tokens if
        the run is to be repeatable.
        """


def open_engine(config: GRPOConfig, policy: Policy) -> Engine | None:
    """The engine that the configuration names; None where the policy samples itself.

    Raises:
        RelexkitError: there is no such function, or what it gives is no engine.
    """
    if config.engine is None:
        return None
    engine = load_function(config.engine)(config, policy.tokenizer)
    for name in ("load", "generate"):
        if not callable(getattr(engine, name, None)):
            raise RelexkitError(
                f"engine {config.engine}: gave {type(engine).__name__} without {name}(); expected"
                " what relexkit.trainer.loop.engine.Engine describes"
            )
    return engine


def generate_with(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[str],
    keys: Sequence[Any],
    sampling: Sampling,
) -> tuple[list[Completion], list[torch.Tensor]]:
    """Completions of an engine that has taken over the policy's weights, and the log-probabilities
    that it gives, ``float32 [tokens]`` each.

    Raises:
        RelexkitError: it gives other numbers of completions or of log-probabilities than of
            prompts or tokens.
    """
    prompt_ids = [encode_prompt(policy.tokenizer, prompt) for prompt in prompts]
    ends = end_tokens(policy.model, policy.tokenizer)
    with torch.no_grad():
        engine.load((name, weight.detach()) for name, weight in named_weights(policy.model).items())
    seeds = [stream_seed(sampling.seed, key) for key in keys]
    generated = engine.generate(prompt_ids, seeds, sampling, ends)
    if len(generated) != len(prompts):
        raise RelexkitError(
            f"the engine gave {len(generated)} completions of {len(prompts)} prompts"
        )
    completions = []
    for ids, sampled in zip(prompt_ids, generated, strict=True):
        tokens = list(sampled.token_ids)
        if not 0 < len(tokens) <= sampling.max_completion_length or len(tokens) != len(
            sampled.logprobs
        ):
            raise RelexkitError(
                f"the engine gave {len(tokens)} tokens and {len(sampled.logprobs)}"
                f" log-probabilities; expected 1 to {sampling.max_completion_length} tokens and one"
                " for each"
            )
        text = policy.tokenizer.decode(tokens, skip_special_tokens=True)
        completions.append(Completion(ids, tokens, text, tokens[-1] not in ends))
    return completions, [torch.tensor(s.logprobs, dtype=torch.float32) for s in generated]
