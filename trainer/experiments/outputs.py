"""``relexkit probe``: are the outputs linear in the step (arXiv 2601.04537), and what do two steps'
logits say of a later one?

The log-probability of every token of fixed probe texts is computed at recorded steps, one after the
other put in place into one loaded model. A token's R^2 on the step says how straight it moves; the
lines are continued and compared with what a predicted checkpoint really gives. Logit extrapolation
continues the logits of two recorded steps while generating, token by token, without any predicted
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from relexkit import Prediction, RelexkitError, TrajectoryStore, gram, predict_weights
from relexkit.extension import ProgressCallback, r_squared
from relexkit.trainer.policy.loading import IN_FLOAT32, Loading
from relexkit.trainer.policy.sampling import encode_prompt, end_tokens
from relexkit.trainer.policy.stored_model import StoredModel
from relexkit.trainer.tasks import Problem, prompt_text

MODEL = Prediction(method="model")
"""What tokens are compared with where no other prediction is asked for."""

_MOST_STEPS = 20  # recorded steps that are evaluated, evenly spread
_MOVED = 1e-3  # nats over the run: tokens that moved less have no line worth a name


@dataclass(frozen=True)
class OutputLinearity:
    """K tokens of the probe texts at T evaluated steps.

    Attributes:
        steps: ``int64 [T]``.
        logprobs: ``float64 [T, K]``.
        r2: ``float64 [K]``, of each token's log-probability on the step; NaN where it moved by less
            than a thousandth of a nat.
        targets: ``float64 [J]``, predicted steps.
        continued: ``float64 [J, K]``, the tokens' least-squares lines at the targets.
        predicted: ``float64 [J, K]``, what the predicted checkpoints give.
    """

    steps: np.ndarray
    logprobs: np.ndarray
    r2: np.ndarray
    targets: np.ndarray
    continued: np.ndarray
    predicted: np.ndarray


Probe = str | tuple[str, str]
"""A text, or a prompt as the model reads it and what follows it."""


def _probe(text: str | Problem, tokenizer: Any) -> Probe:
    """A problem with its worked solution, or else its answer."""
    if isinstance(text, str):
        return text
    return prompt_text(text, tokenizer), text.reference or text.answer


def text_logprobs(model: Any, tokenizer: Any, texts: Sequence[Probe]) -> np.ndarray:
    """Log-probability of every token but the first of every text, and of every token that follows
    a prompt, given what precedes it, ``float64 [K]``.
    """
    logprobs = []
    with torch.no_grad():
        for text in texts:
            numbers, first = _encoded(tokenizer, text)
            tokens = torch.tensor([numbers], device=model.device)
            logits = model(tokens[:, :-1], use_cache=False).logits.float()
            logprobs.append(
                logits.log_softmax(dim=-1)
                .gather(-1, tokens[:, 1:, None])
                .flatten()[first - 1 :]
                .double()
                .cpu()
                .numpy()
            )
    return np.concatenate(logprobs)


def _encoded(tokenizer: Any, text: Probe) -> tuple[list[int], int]:
    """Token numbers, and the place of the first one that counts."""
    if isinstance(text, str):
        return encode_prompt(tokenizer, text), 1
    prompt, following = text
    before = encode_prompt(tokenizer, prompt)
    after = tokenizer(following, add_special_tokens=False)["input_ids"]
    return before + after, max(1, len(before))


def output_linearity(
    store: TrajectoryStore,
    texts: Sequence[str] | Sequence[Problem],
    *,
    targets: Sequence[float] = (),
    prediction: Prediction = MODEL,
    loading: Loading = IN_FLOAT32,
    progress: ProgressCallback | None = None,
) -> OutputLinearity:
    """How linear the log-probabilities of probe texts are over at most 20 recorded steps up to
    ``prediction.until``, and at predicted ones.

    Args:
        texts: texts, or problems, of which the answers count.

    Raises:
        RelexkitError: no text with two tokens, fewer than three recorded steps, or a prediction
            that cannot be made.
    """
    observed = gram(store, progress=progress).until(prediction.until)
    if len(observed.steps) < 3:
        raise RelexkitError(
            f"{len(observed.steps)} recorded steps fit every line; expected at least 3: record more"
        )
    stored = StoredModel(store, loading)
    model, tokenizer = stored.model.eval(), stored.tokenizer
    probes = [_probe(t, tokenizer) for t in texts if not isinstance(t, str) or t.strip()]
    if not any(
        len(numbers) > first for numbers, first in map(partial(_encoded, tokenizer), probes)
    ):
        raise RelexkitError(
            "the probe texts hold no token to predict; expected lines of text of at least two"
            " tokens"
        )
    rows = np.unique(np.linspace(0, len(observed.steps) - 1, _MOST_STEPS).round().astype(int))
    recorded = []
    for done, row in enumerate(rows, 1):
        stored.put_step(int(observed.steps[row]))
        recorded.append(text_logprobs(model, tokenizer, probes))
        if progress:
            progress("probing", done, len(rows) + len(targets))
    steps, logprobs = observed.steps[rows], np.array(recorded)
    predicted = []
    from_all = replace(prediction, until=None)  # of those that are looked at
    for weights in predict_weights(observed, list(targets), from_all) if len(targets) else ():
        stored.put(weights)
        predicted.append(text_logprobs(model, tokenizer, probes))
    r2 = r_squared(logprobs, steps)
    r2[np.ptp(logprobs, axis=0) < _MOVED] = np.nan
    slope, height = np.polyfit(steps, logprobs, 1)
    at = np.asarray(targets, np.float64)
    continued = height + at[:, None] * slope
    empty = np.zeros((0, logprobs.shape[1]))
    return OutputLinearity(
        steps, logprobs, r2, at, continued, np.array(predicted) if predicted else empty
    )


def extrapolated_completion(
    earlier: Any,
    later: Any,
    tokenizer: Any,
    prompt: str,
    *,
    factor: float,
    max_completion_length: int,
) -> str:
    """Greedy completion from the logits ``later + factor (later - earlier)`` of two models, with a
    cache each.

    ``factor`` is ``(t - s_j) / (s_j - s_i)`` for models of the steps ``s_i < s_j`` and a step
    ``t``; 0 is the later model.
    """
    tokens = torch.tensor([encode_prompt(tokenizer, prompt)], device=later.device)
    ends, caches, completion = set(end_tokens(later, tokenizer)), [None, None], []
    with torch.no_grad():
        for _ in range(max_completion_length):
            logits = []
            for place, model in enumerate((earlier, later)):
                output = model(tokens, past_key_values=caches[place], use_cache=True)
                caches[place] = output.past_key_values
                logits.append(output.logits[:, -1].float())
            tokens = (logits[1] + factor * (logits[1] - logits[0])).argmax(dim=-1, keepdim=True)
            if int(tokens) in ends:
                break
            completion.append(int(tokens))
    return tokenizer.decode(completion, skip_special_tokens=True)


def logit_extrapolation(
    store: TrajectoryStore,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    steps: tuple[int, int],
    target: float,
    max_completion_length: int,
    loading: Loading = IN_FLOAT32,
) -> list[str]:
    """Greedy completions from the logits of two recorded steps, continued to ``target``. Prompts
    are put through the tokenizer's chat template if it has one. Memory: two models in float32.

    Raises:
        RelexkitError: a step is not recorded, or the steps do not ascend.
    """
    first, second = steps
    if not 0 <= first < second:
        raise RelexkitError(
            f"steps {first} and {second}: expected an earlier recorded step (or 0, the base) and a"
            " later one"
        )
    stored = StoredModel(store, loading)
    stored.put_step(first)
    earlier, later, tokenizer = (
        copy.deepcopy(stored.model).eval(),
        stored.model.eval(),
        stored.tokenizer,
    )
    stored.put_step(second)
    factor = (target - second) / (second - first)
    return [
        extrapolated_completion(
            earlier,
            later,
            tokenizer,
            prompt_text(Problem(key="", prompt=prompt, answer=""), tokenizer),
            factor=factor,
            max_completion_length=max_completion_length,
        )
        for prompt in prompts
    ]
