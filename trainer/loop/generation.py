"""One generation: which prompts, their rollouts, rewards, advantages and token coefficients, and
their log.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from relexkit.extension import Processes
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.credit.assignment import (
    advantages,
    open_watcher,
    rouge_l,
    token_share_metrics,
    token_weights,
)
from relexkit.trainer.credit.importance import importance_metrics, importance_ratios
from relexkit.trainer.loop.engine import Engine, generate_with
from relexkit.trainer.loop.rollout_log import Rollout, write_step
from relexkit.trainer.policy.log_probabilities import sampled_logprobs
from relexkit.trainer.policy.sampling import Completion, Sampling, generate, pad_token, stream_seed
from relexkit.trainer.policy.setup import Policy
from relexkit.trainer.tasks import Problem, Task, prompt_text, score_all


@dataclass(kw_only=True)
class Generation:
    """Rollouts of this process for ``P`` prompts, ``G`` of each, row ``p * G + g``.

    ``right`` says of each row whether the task calls it right. ``token_weights`` are the
    coefficients of its tokens, None where all are 1, and ``token_norms`` their ``|v|`` where
    measured (``trainer.credit.token_states``); ``shares`` are metrics of these and of
    single reward functions. ``old_logp`` and
    ``ref_logp`` hold the log-probabilities of each row's completion tokens under the sampling
    policy and under the reference; None where they are not needed. ``importance`` multiplies the
    surrogate of each token that an engine sampled (``trainer.credit.importance``). ``counts`` is 0
    for a completion that is masked out. ``seconds`` is how long sampling and scoring took.
    """

    problems: list[Problem]
    prompts: list[str]
    completions: list[Completion]
    reward_PG: torch.Tensor
    advantage_PG: torch.Tensor
    counts: list[int]
    right: list[bool]
    token_weights: list[torch.Tensor] | None
    token_norms: list[torch.Tensor] | None
    shares: dict[str, float]
    seconds: float
    old_logp: list[torch.Tensor] | None
    ref_logp: list[torch.Tensor] | None
    importance: list[torch.Tensor] | None = None

    @property
    def surrogate_weights(self) -> list[torch.Tensor] | None:
        """What multiplies the surrogate of each token, or None where it is 1."""
        if self.importance is None or self.token_weights is None:
            return self.token_weights or self.importance
        pairs = zip(self.importance, self.token_weights, strict=True)
        return [ratio * weight for ratio, weight in pairs]


def prompt_numbers(num_problems: int, config: GRPOConfig, generation: int) -> list[int]:
    """Which problems a generation takes: every problem once an epoch, in an order drawn anew for
    each epoch.
    """
    first = generation * config.num_prompts
    places = [
        divmod(position, num_problems) for position in range(first, first + config.num_prompts)
    ]
    orders = {}
    for epoch in {epoch for epoch, _ in places}:
        orders[epoch] = list(range(num_problems))
        random.Random(stream_seed(config.seed, ("order", epoch))).shuffle(orders[epoch])
    return [orders[epoch][index] for epoch, index in places]


def roll_out(
    config: GRPOConfig,
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    generation: int,
    engine: Engine | None = None,
) -> Generation:
    """Sample, score and compare the rollouts of this process for one generation; an engine samples
    if there is one.
    """
    began = time.monotonic()
    numbers = prompt_numbers(len(problems), config, generation)
    share = config.num_prompts // policy.processes.size
    begin = policy.processes.rank * share
    chosen = [problems[number] for number in numbers[begin : begin + share]]
    rows = [problem for problem in chosen for _ in range(config.num_generations)]
    prompts = [prompt_text(problem, policy.tokenizer) for problem in rows]
    keys = [
        (generation, begin + position, sample)
        for position in range(share)
        for sample in range(config.num_generations)
    ]
    sampling = Sampling(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.generation_rows,
    )
    states = open_watcher(config, policy.model)
    sampled = None
    if engine is not None:
        completions, sampled = generate_with(engine, policy, prompts, keys, sampling)
    else:
        completions = generate(
            policy.model,
            policy.tokenizer,
            prompts,
            keys,
            sampling,
            watcher=states,
        )
    right, rewards, parts = policy.processes.agree(lambda: _scores(config, task, rows, completions))
    reward_PG = torch.tensor(rewards, dtype=torch.float32).view(share, config.num_generations)
    advantage_PG = advantages(config, reward_PG, states, policy.processes)
    counts = [0 if config.mask_truncated_completions and c.truncated else 1 for c in completions]
    weights = token_weights(config, policy, states, completions, advantage_PG, counts)
    measured = states if config.token_shares else None
    result = Generation(
        problems=rows,
        prompts=prompts,
        completions=completions,
        reward_PG=reward_PG,
        advantage_PG=advantage_PG,
        counts=counts,
        right=right,
        token_weights=weights,
        token_norms=None if measured is None else measured.norms,
        shares=_part_means(policy, parts)
        | (
            {}
            if measured is None
            else token_share_metrics(
                measured, completions, advantage_PG, weights, policy.tokenizer, policy.processes
            )
        ),
        seconds=time.monotonic() - began,
        old_logp=None,
        ref_logp=None,
    )
    shared = (
        completions,
        config.temperature,
        config.micro_batch_tokens,
        pad_token(policy.tokenizer),
        policy.autocast,
    )
    if config.generation_interval > 1 or not config.disable_dropout or sampled is not None:
        result.old_logp = sampled_logprobs(policy.model, *shared)
    if sampled is not None:
        assert result.old_logp is not None
        if config.vllm_importance_sampling_correction:
            result.importance = importance_ratios(result.old_logp, sampled, config)
        result.shares |= importance_metrics(result.old_logp, sampled, result.importance)
    if policy.reference is not None:
        result.ref_logp = sampled_logprobs(policy.reference, *shared)
    return result


def _scores(
    config: GRPOConfig, task: Task, rows: Sequence[Problem], completions: Sequence[Completion]
) -> tuple[list[bool], list[float], list[Mapping[str, float | None]]]:
    """Which rollouts are right, their rewards, and what each of several functions says of them."""
    scores = score_all(task, rows, [c.text for c in completions])
    rewards = [score.reward for score in scores]
    if config.rouge_weight:
        shared = [rouge_l(problem, c.text) for problem, c in zip(rows, completions, strict=True)]
        rewards = [
            reward + config.rouge_weight * overlap
            for reward, overlap in zip(rewards, shared, strict=True)
        ]
    return [score.right for score in scores], rewards, [score.parts for score in scores]


def _part_means(policy: Policy, parts: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each of several reward functions where it applies, named as in TRL."""
    means = {}
    for name in parts[0]:
        said = [value for row in parts if (value := row[name]) is not None]
        total, count = policy.sum(sum(said), float(len(said)))
        means[f"rewards/{name}/mean"] = total / count if count else float("nan")
    return means


def log_rollouts(folder: Path, step: int, generation: Generation, processes: Processes) -> None:
    """Write the rollouts of the generation that ``step`` began, once their log-probabilities are
    known; a collective call.
    """
    assert generation.old_logp is not None, (
        "the first step on a generation fills in its log-probabilities"
    )
    nothing = [None] * len(generation.problems)
    rows = [
        Rollout(
            step=step,
            problem=problem.key,
            prompt=prompt,
            text=c.text,
            prompt_ids=c.prompt_ids,
            completion_ids=c.completion_ids,
            logprobs=logp.tolist(),
            truncated=c.truncated,
            reward=float(reward),
            right=right,
            advantage=float(advantage),
            token_norms=None if norms is None else norms.tolist(),
            token_weights=None if weights is None else weights.tolist(),
        )
        for problem, prompt, c, logp, reward, right, advantage, norms, weights in zip(
            generation.problems,
            generation.prompts,
            generation.completions,
            generation.old_logp,
            generation.reward_PG.view(-1),
            generation.right,
            generation.advantage_PG.view(-1),
            generation.token_norms or nothing,
            generation.token_weights or nothing,
            strict=True,
        )
    ]
    processes.agree(lambda: write_step(folder, step, rows, process=processes.rank))
