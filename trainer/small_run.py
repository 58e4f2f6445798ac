"""A small but real reinforcement-learning run, made in about a minute on a CPU.

The task has a verifiable reward: sort the digits of ``31525420>``, answer ``01223455`` and stop. A Llama of 0.6 million
parameters with a vocabulary of characters is warmed up by a few supervised steps on answers in both orders, the wrong one more
often, so that it is right now and then. Plain policy gradient with group-normalised advantages (those of GRPO, arXiv
2402.03300, with one on-policy step per batch, where the clipped ratio is 1) then makes it right more often. Every optimizer
step is saved twice, as the same weights in float32 and in bfloat16, so that what the stored precision hides can be seen. The
same settings give the same files on one machine.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = ("<pad>", "<eos>", ">", *"0123456789")
PRECISIONS = ("float32", "bfloat16")

Progress = Callable[[str, int, int], None]
Problem = tuple[str, str]
"""Prompt and right answer, one character for each token; the answer is followed by ``<eos>``."""


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """Settings of a run.

    Attributes:
        steps: optimizer steps of the policy gradient; each is saved.
        seed: of the weights, the problems and the rollouts.
        num_digits: length of a problem.
        hidden_size, num_layers: of the model; heads have 32 dimensions.
        warmup_steps, warmup_batch, warmup_learning_rate: the supervised part (cosine decay to zero).
        warmup_descending: share of its answers that are in descending order, which earns no reward later.
        num_prompts, num_generations: rollouts of a step are their product; ``num_generations`` of one prompt are a group.
        learning_rate: of the policy gradient, constant.
        max_grad_norm: gradients are scaled down to this norm, in both parts.
        num_held_out: problems that neither part ever sees.
    """

    steps: int = 50
    seed: int = 0
    num_digits: int = 8
    hidden_size: int = 128
    num_layers: int = 3
    warmup_steps: int = 90
    warmup_batch: int = 128
    warmup_learning_rate: float = 1e-3
    warmup_descending: float = 0.6
    num_prompts: int = 16
    num_generations: int = 16
    learning_rate: float = 2e-5
    max_grad_norm: float = 1.0
    num_held_out: int = 512


# -- the task ---------------------------------------------------------------------------------------------------------


def draw_problems(
    rng: random.Random, num_problems: int, num_digits: int, excluded: frozenset[str] = frozenset()
) -> list[Problem]:
    """Random problems whose digits, in any order, are not among ``excluded`` answers."""
    problems: list[Problem] = []
    while len(problems) < num_problems:
        digits = rng.choices("0123456789", k=num_digits)
        answer = "".join(sorted(digits))
        if answer not in excluded:
            problems.append(("".join(digits) + ">", answer))
    return problems


def held_out_problems(settings: SmallRun) -> list[Problem]:
    """The problems for evaluation: no problem of the training has the same answer as one of these."""
    return draw_problems(random.Random(f"held out {settings.seed}"), settings.num_held_out, settings.num_digits)


def reward(completion_BL: torch.Tensor, answer_BL: torch.Tensor) -> torch.Tensor:
    """1.0 where every token of a completion is right, the final ``<eos>`` included, else 0.0; ``float32 [B]``."""
    return (completion_BL == answer_BL).all(dim=1).float()


# -- the model --------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of ``VOCABULARY``, and ``<eos>``; saved, it loads with ``AutoTokenizer``."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build_model(settings: SmallRun) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=settings.hidden_size, intermediate_size=settings.hidden_size * 11 // 4,
        num_hidden_layers=settings.num_layers, num_attention_heads=settings.hidden_size // 32,
        max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=None, eos_token_id=VOCABULARY.index("<eos>"), pad_token_id=VOCABULARY.index("<pad>"),
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(problems: Sequence[Problem], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers of prompts and of answers with ``<eos>``, ``int64 [B, P]`` and ``[B, L]``."""
    prompts = tokenizer([prompt for prompt, _ in problems], return_tensors="pt")["input_ids"]
    answers = tokenizer([answer + "<eos>" for _, answer in problems], return_tensors="pt")["input_ids"]
    return prompts, answers


@torch.no_grad()
def complete(
    model: LlamaForCausalLM, prompt_BP: torch.Tensor, num_tokens: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Completions ``int64 [B, num_tokens]``: sampled at temperature 1 with a generator, greedy without."""
    tokens, cache, completion = prompt_BP, None, []
    for _ in range(num_tokens):
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_BV, cache = output.logits[:, -1], output.past_key_values
        if generator is None:
            tokens = logits_BV.argmax(dim=-1, keepdim=True)
        else:
            tokens = torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)
        completion.append(tokens)
    return torch.cat(completion, dim=1)


def answer_logprobs(model: LlamaForCausalLM, prompt_BP: torch.Tensor, answer_BL: torch.Tensor) -> torch.Tensor:
    """Log-probability of every answer token given what precedes it, ``float32 [B, L]``."""
    tokens = torch.cat([prompt_BP, answer_BL], dim=1)
    num_answer = answer_BL.shape[1]
    logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=num_answer).logits
    return logits.log_softmax(dim=-1).gather(-1, answer_BL[..., None])[..., 0]


def group_advantages(reward_PG: torch.Tensor, epsilon: float = 1e-4) -> torch.Tensor:
    """``(R - mean) / (std + epsilon)`` within each group, ``[prompts, generations]``; zero where all rewards agree."""
    return (reward_PG - reward_PG.mean(dim=1, keepdim=True)) / (reward_PG.std(dim=1, keepdim=True) + epsilon)


# -- the run ----------------------------------------------------------------------------------------------------------


def make_run(folder: Path, settings: SmallRun, progress: Progress | None = None) -> None:
    """Write a run into the new folder ``folder``.

    Leaves ``base/`` (bfloat16; training starts from exactly these values), ``float32/checkpoint-N`` and
    ``bfloat16/checkpoint-N`` for N from 1 to ``steps``, each a Hugging Face folder with tokenizer and
    ``trainer_state.json``, and ``settings.json``, written last. PyTorch's global random state is left as it was.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    excluded = frozenset(answer for _, answer in held_out_problems(settings))
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]), quiet_single_thread():
        torch.manual_seed(settings.seed)
        model = build_model(settings)
        warm_up(model, tokenizer, settings, rng, excluded, progress)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        save(model, tokenizer, folder / "base", "bfloat16")
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        history: list[dict[str, Any]] = []
        for step in range(1, settings.steps + 1):
            problems = draw_problems(rng, settings.num_prompts, settings.num_digits, excluded)
            entry = policy_gradient_step(model, optimizer, encode(problems, tokenizer), settings, generator)
            history.append({"step": step, **entry})
            for precision in PRECISIONS:
                checkpoint = folder / precision / f"checkpoint-{step}"
                save(model, tokenizer, checkpoint, precision)
                state = {"global_step": step, "max_steps": settings.steps, "log_history": history}
                (checkpoint / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")
            if progress:
                progress("policy gradient", step, settings.steps)
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: SmallRun,
    rng: random.Random,
    excluded: frozenset[str],
    progress: Progress | None = None,
) -> None:
    """Supervised steps on answers in both orders, stopped before the model is good; changes the model in place.

    A model that can sort either way and does not know which is wanted has, as a pretrained one, the skill and not the habit:
    what a few dozen steps of reinforcement learning can change.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warmup_learning_rate, weight_decay=0.0)
    for done in range(settings.warmup_steps):
        decay = 0.5 * (1 + math.cos(math.pi * done / settings.warmup_steps))
        optimizer.param_groups[0]["lr"] = settings.warmup_learning_rate * decay
        problems = [
            (prompt, answer[::-1] if rng.random() < settings.warmup_descending else answer)
            for prompt, answer in draw_problems(rng, settings.warmup_batch, settings.num_digits, excluded)
        ]
        descend(-answer_logprobs(model, *encode(problems, tokenizer)).mean(), model, optimizer, settings.max_grad_norm)
        if progress:
            progress("warm-up", done + 1, settings.warmup_steps)


def policy_gradient_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    problems: tuple[torch.Tensor, torch.Tensor],
    settings: SmallRun,
    generator: torch.Generator,
) -> dict[str, float]:
    """Roll out, score, take one optimizer step in place; returns what a trainer logs."""
    prompt_BP, answer_BL = (tokens.repeat_interleave(settings.num_generations, dim=0) for tokens in problems)
    completion_BL = complete(model, prompt_BP, answer_BL.shape[1], generator)
    reward_PG = reward(completion_BL, answer_BL).view(settings.num_prompts, settings.num_generations)
    advantage_B = group_advantages(reward_PG).view(-1)
    loss = -(advantage_B[:, None] * answer_logprobs(model, prompt_BP, completion_BL)).mean()
    grad_norm = descend(loss, model, optimizer, settings.max_grad_norm)
    spread_P = reward_PG.std(dim=1)
    return {
        "reward": float(reward_PG.mean()),
        "reward_std": float(spread_P.mean()),
        "frac_reward_zero_std": float((spread_P == 0).float().mean()),
        "loss": float(loss.detach()),
        "grad_norm": grad_norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
    }


def descend(loss: torch.Tensor, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """One optimizer step on a loss; returns the norm of the gradient before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return float(norm)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, precision: str) -> None:
    """Write a Hugging Face folder in ``precision``, rounded to nearest as every exporter does; the model stays float32."""
    copy.deepcopy(model).to(getattr(torch, precision)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def greedy_correct(folder: Path, problems: Sequence[Problem]) -> list[bool]:
    """Whether the checkpoint in ``folder`` answers each problem, greedily, its stored weights computed with in float32."""
    from transformers import AutoTokenizer

    with quiet_single_thread():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts, answers = encode(problems, AutoTokenizer.from_pretrained(folder))
        return [bool(r) for r in reward(complete(model, prompts, answers.shape[1]), answers)]


@contextmanager
def quiet_single_thread() -> Iterator[None]:
    """No bars and remarks of transformers for each of a hundred loads and saves, and one thread for PyTorch.

    One thread gives the same bits whatever the number of cores, and matrices this small gain little from a second one
    while threads that wait for each other on a busy machine cost a factor of ten.
    """
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    threads = torch.get_num_threads()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
