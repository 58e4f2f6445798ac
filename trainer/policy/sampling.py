"""Rollouts: completions sampled from a model, each from a random stream of its own.

Sampling is the Gumbel-max form of drawing from a softmax: the noise of a row is a function of
``(seed, key)`` alone. A completion does not depend on what else is in its batch or on the number of
processes, a resumed run repeats it without any saved random state, and models that are given the
same keys see common random numbers, so that their differences are less noisy. (Logits of another
batch shape differ in their last bits and now and then move an arg-max: equality is up to that.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from relexkit import RelexkitError
from relexkit.trainer.policy.shared_prompts import prompt_cache

_NOISE_BLOCK = 1024  # numbers that a row's stream gives at a time: part of what the stream is


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_completion_length: tokens, the end-of-sequence token included.
        temperature: of the softmax; 0 is greedy.
        top_k, top_p: keep only the most likely tokens; None keeps all.
        seed: of the random streams, together with each row's key.
        batch_size: rows that are generated at once.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True, slots=True)
class Completion:
    """One rollout: token numbers of prompt and completion (with the end-of-sequence token if it
    came), and the text.

    ``truncated`` is true if the length ran out before an end-of-sequence token.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    truncated: bool


class Watcher(Protocol):
    """Sees what the model computes while it generates; ``trainer.credit.token_states`` has one."""

    def batch(self) -> AbstractContextManager[None]:
        """Around the generation of one batch."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores ``[B, V]`` of the next token, which are returned as they are."""

    def finish(self, tokens_BT: torch.Tensor, lengths: Sequence[int]) -> None:
        """The tokens that were drawn, and how many of each row belong to its completion."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    keys: Sequence[Any],
    sampling: Sampling,
    *,
    watcher: Watcher | None = None,
) -> list[Completion]:
    """One completion for every prompt, in order; left-padded batches with a key-value cache.

    Args:
        model: a transformers model for causal language modelling; its mode and generation settings
            are left as they were.
        keys: names of the rows' random streams: anything whose ``repr`` is stable. Equal keys draw
            equal noise.
        watcher: told what the model computes on the way.

    Raises:
        RelexkitError: a prompt is empty, or does not fit the model's context together with its
            completion.
    """
    encoded = {prompt: encode_prompt(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
    _check_lengths(model, encoded, sampling)
    prompt_ids = [encoded[prompt] for prompt in prompts]
    completions: list[Completion] = []
    with _inference(model, tokenizer, sampling):
        for begin in range(0, len(prompts), sampling.batch_size):
            rows = slice(begin, begin + sampling.batch_size)
            completions += _generate_batch(
                model, tokenizer, prompt_ids[rows], keys[rows], sampling, watcher
            )
    return completions


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token numbers of a prompt. A chat template has written the special tokens already; else the
    tokenizer adds them.

    Raises:
        RelexkitError: the tokenizer has no tokens for it.
    """
    plain = getattr(tokenizer, "chat_template", None) is None
    try:
        return tokenizer(prompt, add_special_tokens=plain)["input_ids"]
    except Exception as error:  # tokenizers raise plain exceptions
        shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
        raise RelexkitError(
            f"prompt {shown!r} cannot be encoded by the tokenizer"
            f" ({' '.join(str(error).split())}); expected characters of its vocabulary: leave this"
            " prompt out, or take another model"
        ) from error


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Numbers of the tokens that end a completion: the tokenizer's and those of the model's
    generation settings.

    Raises:
        RelexkitError: there is none.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = {
        *(configured if isinstance(configured, list) else [configured]),
        tokenizer.eos_token_id,
    } - {None}
    if not ends:
        raise RelexkitError(
            "the tokenizer has no end-of-sequence token; expected one, or no completion would"
            " ever end"
        )
    return sorted(ends)


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows of different lengths as ``int64 [B, L]`` with padding on the left, and their mask,
    ``int64 [B, L]``.
    """
    length = max(len(row) for row in rows)
    tokens = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


def pad_token(tokenizer: Any) -> int:
    """Number of the padding token, or else of the end-of-sequence token: padding is masked, so that
    any token will do.
    """
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def stream_seed(seed: int, key: Any) -> int:
    """Seed of the random stream of ``(seed, key)``: 63 bits of a hash, so that neighbouring keys
    are unrelated.
    """
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}/{key!r}".encode(), digest_size=8).digest(), "big")
        >> 1
    )


class _GumbelNoise:
    """Adds each row's noise to its scores, so that the arg-max of the sum is a draw from their
    softmax.

    With a small vocabulary the noise of several tokens is drawn at once; how many depends on its
    size alone.
    """

    def __init__(self, seed: int, keys: Sequence[Any], device: torch.device):
        self._generators = [
            torch.Generator(device).manual_seed(stream_seed(seed, key)) for key in keys
        ]
        self._noise_KBV = torch.empty(0)
        self._used = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._used == len(self._noise_KBV):
            self._draw(scores)
        self._used += 1
        return scores.float() + self._noise_KBV[self._used - 1]

    def _draw(self, scores: torch.Tensor) -> None:
        rows, vocabulary = scores.shape
        shape = rows, max(1, _NOISE_BLOCK // vocabulary), vocabulary
        exponential = torch.empty(shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(exponential.unbind(), self._generators, strict=True):
            row.exponential_(generator=generator)
        self._noise_KBV, self._used = exponential.log_().neg_().transpose(0, 1), 0


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    keys: Sequence[Any],
    sampling: Sampling,
    watcher: Watcher | None,
) -> list[Completion]:
    tokens, mask = left_padded(prompts, pad_token(tokenizer), model.device)
    processors = LogitsProcessorList([] if watcher is None else [watcher])
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None and sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(sampling.seed, keys, tokens.device))
    shared = prompt_cache(model, tokens, mask)
    with nullcontext() if watcher is None else watcher.batch():
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=model.generation_config,
            logits_processor=processors,
            past_key_values=shared,
        )
    ends = set(model.generation_config.eos_token_id)
    completions = []
    for prompt, row in zip(prompts, output[:, tokens.shape[1] :].tolist(), strict=True):
        stop = next((index for index, token in enumerate(row) if token in ends), None)
        completion = row[: sampling.max_completion_length if stop is None else stop + 1]
        text = tokenizer.decode(completion, skip_special_tokens=True)
        completions.append(Completion(prompt, completion, text, stop is None))
    if watcher is not None:
        watcher.finish(output[:, tokens.shape[1] :], [len(c.completion_ids) for c in completions])
    return completions


@contextmanager
def _inference(model: Any, tokenizer: Any, sampling: Sampling) -> Iterator[None]:
    """No gradients, no dropout, a cache, and none of the sampling settings that a model brings
    along.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=pad_token(tokenizer),
        use_cache=True,
    )
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config  # generate() fills gaps from here: a repetition penalty, say
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        model.train(training)


def _check_lengths(model: Any, encoded: dict[str, list[int]], sampling: Sampling) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    for prompt, ids in encoded.items():
        shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
        if not ids:
            raise RelexkitError(
                f"prompt {shown!r} has no tokens; expected at least one: leave empty prompts out of"
                " the task"
            )
        if context is not None and len(ids) + sampling.max_completion_length > context:
            raise RelexkitError(
                f"prompt {shown!r} has {len(ids)} tokens, with max_completion_length"
                f" {sampling.max_completion_length} more than the model's context of {context};"
                " give --max-completion-length (max_completion_length in a configuration) of at"
                f" most {max(0, context - len(ids))}, or leave out long prompts"
            )
