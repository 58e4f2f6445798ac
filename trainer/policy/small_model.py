"""The small embedded model: a Llama of 1.3 million parameters that reads and writes characters,
half-way to a skill.

    python -m relexkit.trainer.policy.small_model -o FOLDER

makes it in seconds: supervised steps on a task, stopped while the model is right on part of the
problems only. ``trainer/data/sorting`` was made so, with the
default settings, and is where ``relexkit demo`` starts. It is stored in bfloat16, so that both
precisions start from exactly the same weights. No validation problem is seen.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from relexkit.extension import ProgressCallback, progress_bar, say
from relexkit.trainer.policy.log_probabilities import make_batch, token_logprobs
from relexkit.trainer.policy.sampling import Completion, encode_prompt
from relexkit.trainer.tasks import Problem, load_task
from relexkit.trainer.tasks.arithmetic import CHARACTERS

FOLDER = Path(__file__).parents[1] / "data" / "sorting"
"""The model that comes with the package."""

SPECIAL_TOKENS = ("<pad>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Settings of the supervised part.

    Attributes:
        task: what ``load_task`` takes.
        characters: of its prompts and answers, a token each.
        phrases: texts in its prompts that are one token each.
        hidden_size, num_layers: of the model; heads have 32 dimensions.
        steps, batch_size, learning_rate: of AdamW, after a warm-up of 20 steps.
        seed: of the weights and the order of the problems.
    """

    task: Mapping[str, Any] = field(
        default_factory=lambda: {"name": "arithmetic", "family": "sorting", "digits": 8}
    )
    characters: str = CHARACTERS
    phrases: tuple[str, ...] = ()
    hidden_size: int = 160
    num_layers: int = 4
    steps: int = 45
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


def build_tokenizer(
    characters: str = CHARACTERS, phrases: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """One token for each of the ``characters`` and ``phrases``, padding and an end; saved, it loads
    with ``AutoTokenizer``.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(settings: WarmStart) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(settings.characters) + len(settings.phrases),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 11 // 4,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.hidden_size // 32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def warm_start(
    settings: WarmStart, progress: ProgressCallback | None = None
) -> tuple[LlamaForCausalLM, Any]:
    """A model after the supervised steps, float32, and its tokenizer. The same settings give the
    same bits on one thread.
    """
    problems = list(load_task(settings.task).problems("train"))
    random.Random(settings.seed).shuffle(problems)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_model(settings)
    tokenizer = build_tokenizer(settings.characters, settings.phrases)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (step + 1) / 20)
        chosen = [
            problems[(step * settings.batch_size + row) % len(problems)]
            for row in range(settings.batch_size)
        ]
        batch = make_batch(
            [_solved(problem, tokenizer) for problem in chosen], tokenizer.pad_token_id, "cpu"
        )
        logp_BT, _ = token_logprobs(model, batch, 1.0, False)
        optimizer.zero_grad()
        (-(logp_BT * batch.mask).sum() / batch.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress:
            progress("warm start", step + 1, settings.steps)
    return model, tokenizer


def _solved(problem: Problem, tokenizer: Any) -> Completion:
    """The right answer as if the model had given it."""
    answer = tokenizer(problem.answer)["input_ids"] + [tokenizer.eos_token_id]
    return Completion(encode_prompt(tokenizer, str(problem.prompt)), answer, problem.answer, False)


def make(
    folder: Path, settings: WarmStart | None = None, progress: ProgressCallback | None = None
) -> None:
    """Write the model, in bfloat16, and its tokenizer as a Hugging Face folder."""
    model, tokenizer = warm_start(settings or WarmStart(), progress)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the model that comes with the package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with progress_bar() as progress:
        make(options.out, progress=progress)
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
