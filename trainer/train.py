"""Group relative policy optimisation (GRPO, arXiv 2402.03300): prompts, rollouts, rewards, advantages, steps, recording.

    relexkit train CONFIG.yaml [--key value ...]

leaves in the output folder ``config.yaml`` (resolved), ``run.zarr`` (the trajectory store, from the float32 master weights),
``rollouts/`` (every rollout, one table), ``metrics.jsonl``, ``events/`` (TensorBoard), ``state/`` (for a resume) and ``final/``
(the trained model).

The order of the prompts, the noise of every rollout and dropout are functions of the seed and the step, so a run that is
killed and started again goes on from its last state to the same bits on a CPU, and the number of processes changes rounding
only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relexkit import Recorder, RelexkitError, TrajectoryStore
from relexkit.live_advice import LiveAdvice
from relexkit.processes import Processes
from relexkit.store import NotAStoreError
from trainer.config import GRPOConfig, dump_config
from trainer.credit import (
    advantages,
    informativeness,
    is_right,
    open_watcher,
    rouge_l,
    token_share_metrics,
    token_weights,
)
from trainer.evaluate import evaluate
from trainer.folder import claim_folder, save_model
from trainer.gradient_noise import GradientParts
from trainer.loss import Denominators, policy_loss
from trainer.policy import make_batch, micro_batches, padded, sampled_logprobs, token_logprobs
from trainer.regrounding import is_due, jump, last_jump
from trainer.rollout import Completion, Sampling, generate, pad_token, stream_seed
from trainer.rollout_log import Rollout, truncate_after, write_step
from trainer.run_log import RunLog
from trainer.setup import build_optimizer, choose_device, learning_rate, load_model, process_group, shard
from trainer.state import last_state, load_state, save_state
from trainer.tasks import Problem, Task, load_task, prompt_text, score

_WARN_STEPS = 10  # without any difference between the rewards of a group


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What takes part in every step: the model that learns, the frozen one it is held to (or None), and how both compute."""

    model: Any
    reference: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    autocast: bool
    processes: Processes

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.processes.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        total = torch.tensor(self.processes.gather(total.tolist()), dtype=torch.float64).sum(dim=0)
        return total.tolist()


@dataclass(kw_only=True)
class Generation:
    """Rollouts of this process for ``P`` prompts, ``G`` of each, row ``p * G + g``.

    ``right`` says of each row whether the task calls it right. ``token_weights`` are the coefficients of its tokens, None where
    all are 1, and ``token_norms`` their ``|v|`` where measured (``trainer.token_states``); ``shares`` are metrics of these.
    ``old_logp`` and ``ref_logp`` hold the log-probabilities of each row's completion tokens under the sampling policy and
    under the reference; None where they are not needed. ``counts`` is 0 for a completion that is masked out. ``seconds`` is
    how long sampling and scoring took.
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


def train(config: GRPOConfig) -> Path:
    """Run or resume a training; returns its folder.

    With ``torchrun`` every process calls this. Memory: the weights in float32, as much for gradients, twice as much for the
    optimizer, one copy for the recorder, a reference if ``beta`` is not 0, and the activations and logits of a micro-batch.

    Raises:
        RelexkitError: the folder holds a run with other options, the task or a prompt cannot be used, a reward function fails,
            or the loss is not finite; what was recorded before stays, and the same call goes on from the last state.
    """
    device = choose_device(config)
    with process_group(device) as processes, ExitStack() as stack:
        folder = Path(config.output)
        check_processes(config, processes)
        processes.lead(lambda: claim_folder(folder, dump_config(config)))
        task = load_task(config.task)
        problems = list(task.problems("train"))
        policy = _load_policy(config, device, processes)
        step = last_state(folder / "state") or 0
        if step:
            load_state(folder / "state", step, policy.model, policy.optimizer, processes)
        processes.lead(lambda: truncate_after(folder / "rollouts", step))
        recorder = _open_recorder(config, folder, policy, step, stack)
        advice = None if recorder is None else stack.enter_context(closing(LiveAdvice(recorder)))
        log = stack.enter_context(RunLog(folder, step, config.max_steps, active=processes.rank == 0))
        if step:
            log.say(f"going on after step {step}")
        rule, without_signal = config.regrounding_rule, 0
        start = 0 if rule is None or recorder is None else last_jump(recorder)
        while step < config.max_steps:
            if rule is not None and recorder is not None and is_due(rule, step, start, config.max_steps):
                log.say(f"step {step}: jumps to what {rule.method} predicts for step {step + rule.jump_steps}")
                step, metrics = jump(rule, recorder, policy.model, step, start)
                start = step
                log.write(step, metrics)
                continue
            generation = roll_out(config, policy, task, problems, step // config.steps_of_generation)
            first = step + 1
            for index in range(min(config.steps_of_generation, config.max_steps - step)):
                began = time.monotonic()
                metrics = optimizer_step(config, policy, generation, index % config.steps_per_generation, step + 1)
                step += 1
                if recorder is not None:
                    recorder.record(step, metrics)
                    metrics |= recorder.live
                if config.eval_steps and (step % config.eval_steps == 0 or step == config.max_steps):
                    metrics |= _validate(config, policy, task)
                speed = _speed(config, metrics, generation, time.monotonic() - began)
                log.write(step, metrics | speed, None if advice is None else advice.update())
            _log_rollouts(folder / "rollouts", first, generation, processes)
            without_signal = _warn_without_signal(log, metrics, step, first, without_signal)
            if config.save_steps and step // config.save_steps > (first - 1) // config.save_steps and step < config.max_steps:
                _keep(config, folder, policy, recorder, step)
        _keep(config, folder, policy, recorder, step)
        save_model(folder / "final", policy.model, policy.tokenizer, processes)
    return folder


# -- preparing --------------------------------------------------------------------------------------------------------


def check_processes(config: GRPOConfig, processes: Processes) -> None:
    """Refuse what cannot be done by so many processes."""
    if config.regrounding is not None and processes.size > 1:
        raise RelexkitError("regrounding: writes predictions into a model that is whole; expected one process")
    unit = processes.size * config.num_generations * config.steps_per_generation
    if config.generation_batch_size % unit:
        raise RelexkitError(
            f"generation_batch_size: {config.generation_batch_size} does not split over {processes.size} processes; expected a "
            f"multiple of {unit}"
        )
    groups = config.generation_batch_size // unit
    if config.gradient_noise_parts > groups:
        raise RelexkitError(
            f"gradient_noise_parts: {config.gradient_noise_parts} parts of {groups} groups in each of {processes.size} "
            "processes leave some empty; expected at most as many"
        )


def _load_policy(config: GRPOConfig, device: torch.device, processes: Processes) -> Policy:
    model, tokenizer = load_model(config.model, device)
    model.train()
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name until v6
        enable({"use_reentrant": False})
    reference = None
    if config.beta:
        reference = shard(load_model(config.model, device)[0].requires_grad_(False), processes, device)
    shard(model, processes, device)
    return Policy(
        model=model, reference=reference, tokenizer=tokenizer, optimizer=build_optimizer(model, config),
        autocast=config.bf16 if config.bf16 is not None else device.type == "cuda", processes=processes,
    )  # fmt: skip


def _open_recorder(config: GRPOConfig, folder: Path, policy: Policy, step: int, stack: ExitStack) -> Recorder | None:
    if not config.record_every:
        return None
    store = folder / "run.zarr"
    begun = any(policy.processes.gather(_is_store(store)))
    recorder = Recorder(
        policy.model, store, every=config.record_every, mantissa_bits=config.mantissa_bits, tokenizer=policy.tokenizer,
        resume_from=step if begun else None, source=f"GRPO of {config.model}",
        sketch=config.regrounding is None,  # jumps are no part of a trajectory
    )  # fmt: skip
    return stack.enter_context(recorder)


def _is_store(path: Path) -> bool:
    try:
        TrajectoryStore(path)
    except NotAStoreError:  # nothing, or a creation that was interrupted, which the recorder starts again
        return False
    return True


def prompt_numbers(num_problems: int, config: GRPOConfig, generation: int) -> list[int]:
    """Which problems a generation takes: every problem once an epoch, in an order drawn anew for each epoch."""
    first = generation * config.num_prompts
    places = [divmod(position, num_problems) for position in range(first, first + config.num_prompts)]
    orders = {}
    for epoch in {epoch for epoch, _ in places}:
        orders[epoch] = list(range(num_problems))
        random.Random(stream_seed(config.seed, ("order", epoch))).shuffle(orders[epoch])
    return [orders[epoch][index] for epoch, index in places]


# -- one generation ---------------------------------------------------------------------------------------------------


def roll_out(config: GRPOConfig, policy: Policy, task: Task, problems: Sequence[Problem], generation: int) -> Generation:
    """Sample, score and compare the rollouts of this process for one generation."""
    began = time.monotonic()
    numbers = prompt_numbers(len(problems), config, generation)
    share = config.num_prompts // policy.processes.size
    begin = policy.processes.rank * share
    chosen = [problems[number] for number in numbers[begin : begin + share]]
    rows = [problem for problem in chosen for _ in range(config.num_generations)]
    prompts = [prompt_text(problem, policy.tokenizer) for problem in rows]
    keys = [
        (generation, begin + position, sample) for position in range(share) for sample in range(config.num_generations)
    ]  # fmt: skip
    sampling = Sampling(
        max_completion_length=config.max_completion_length, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, seed=config.seed,
    )  # fmt: skip
    states = open_watcher(config, policy.model)
    completions = generate(
        policy.model, policy.tokenizer, prompts, keys, sampling, batch_size=config.generation_rows, watcher=states
    )
    right, rewards = policy.processes.agree(lambda: _scores(config, task, rows, completions))
    reward_PG = torch.tensor(rewards, dtype=torch.float32).view(share, config.num_generations)
    advantage_PG = advantages(config, reward_PG, states, policy.processes)
    counts = [0 if config.mask_truncated_completions and c.truncated else 1 for c in completions]
    weights = token_weights(config, policy, states, completions, advantage_PG, counts)
    measured = states if config.token_shares else None
    result = Generation(
        problems=rows, prompts=prompts, completions=completions, reward_PG=reward_PG, advantage_PG=advantage_PG,
        counts=counts, right=right, token_weights=weights, token_norms=None if measured is None else measured.norms,
        shares={} if measured is None else token_share_metrics(
            measured, completions, advantage_PG, weights, policy.tokenizer, policy.processes
        ),
        seconds=time.monotonic() - began, old_logp=None, ref_logp=None,
    )  # fmt: skip
    shared = (completions, config.temperature, config.micro_batch_tokens, pad_token(policy.tokenizer), policy.autocast)
    if config.steps_of_generation > 1:
        result.old_logp = sampled_logprobs(policy.model, *shared)
    if policy.reference is not None:
        result.ref_logp = sampled_logprobs(policy.reference, *shared)
    return result


def _scores(
    config: GRPOConfig, task: Task, rows: Sequence[Problem], completions: Sequence[Completion]
) -> tuple[list[bool], list[float]]:
    """Which rollouts are right, and their rewards."""
    rewards = [score(task, problem, c.text) for problem, c in zip(rows, completions, strict=True)]
    right = is_right(rewards)
    if config.rouge_weight:
        shared = [rouge_l(problem, c.text) for problem, c in zip(rows, completions, strict=True)]
        rewards = [reward + config.rouge_weight * overlap for reward, overlap in zip(rewards, shared, strict=True)]
    return right, rewards


def _log_rollouts(folder: Path, step: int, generation: Generation, processes: Processes) -> None:
    assert generation.old_logp is not None, "the first step on a generation fills in its log-probabilities"
    nothing = [None] * len(generation.problems)
    rows = [
        Rollout(
            step=step, problem=problem.key, prompt=prompt, text=c.text, prompt_ids=c.prompt_ids,
            completion_ids=c.completion_ids, logprobs=logp.tolist(), truncated=c.truncated, reward=float(reward),
            right=right, advantage=float(advantage), token_norms=None if norms is None else norms.tolist(),
            token_weights=None if weights is None else weights.tolist(),
        )
        for problem, prompt, c, logp, reward, right, advantage, norms, weights in zip(
            generation.problems, generation.prompts, generation.completions, generation.old_logp,
            generation.reward_PG.view(-1), generation.right, generation.advantage_PG.view(-1),
            generation.token_norms or nothing, generation.token_weights or nothing, strict=True,
        )
    ]  # fmt: skip
    processes.agree(lambda: write_step(folder, step, rows, process=processes.rank))


# -- one step ---------------------------------------------------------------------------------------------------------


def optimizer_step(config: GRPOConfig, policy: Policy, generation: Generation, part: int, step: int) -> dict[str, float]:
    """Take optimizer step ``step`` on one part of a generation, in place; returns what is logged, named as in TRL.

    Raises:
        RelexkitError: the loss or the gradient is not finite; the weights are those of the step before.
    """
    rows = _rows_of_part(config, generation, part)
    completions = [generation.completions[row] for row in rows]
    tokens = [len(c.completion_ids) * generation.counts[row] for c, row in zip(completions, rows, strict=True)]
    every_token = sum(len(c.completion_ids) * n for c, n in zip(generation.completions, generation.counts, strict=True))
    totals = policy.sum(float(len(rows)), float(sum(tokens)), float(every_token))
    denominators = Denominators(sequences=totals[0], tokens=totals[1], generation_tokens=totals[2])
    rate = learning_rate(config, step)
    for group in policy.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(stream_seed(config.seed, ("dropout", step, policy.processes.rank)))
    policy.optimizer.zero_grad(set_to_none=True)
    sums, fresh, noise = _accumulate(config, policy, generation, rows, denominators)
    names = sorted(sums)
    total = dict(zip(names, policy.sum(*(sums[name] for name in names)), strict=True))
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    for name, value in (("loss", total["loss"]), ("gradient norm", grad_norm)):
        if not torch.isfinite(torch.tensor(value)):
            raise RelexkitError(
                f"step {step}: the {name} is {value}; expected a finite number: the weights of step {step - 1} are recorded, "
                "lower learning_rate or max_grad_norm and resume from the last state, or start again"
            )
    policy.optimizer.step()
    if generation.old_logp is None:
        generation.old_logp = fresh
    return _step_metrics(config, policy, generation, rows, total, denominators) | {
        "grad_norm": grad_norm,
        "learning_rate": rate,
        **noise,
        **generation.shares,
    }


def _rows_of_part(config: GRPOConfig, generation: Generation, part: int) -> list[int]:
    """The rows of every ``steps_per_generation``-th prompt: whole groups."""
    prompts = range(part, generation.reward_PG.shape[0], config.steps_per_generation)
    return [prompt * config.num_generations + sample for prompt in prompts for sample in range(config.num_generations)]


def _accumulate(
    config: GRPOConfig, policy: Policy, generation: Generation, rows: list[int], denominators: Denominators
) -> tuple[dict[str, float], list[torch.Tensor], dict[str, float]]:
    """Gradients of the step's loss, micro-batch by micro-batch.

    Returns sums over its tokens, every row's log-probabilities, and what is logged of the gradient's noise.
    """
    device = policy.model.device
    completions = [generation.completions[row] for row in rows]
    advantage_B = generation.advantage_PG.view(-1)[rows].to(device)
    counts_B = torch.tensor([generation.counts[row] for row in rows], dtype=torch.float32, device=device)
    groups, lasts = _grouped(config, completions)
    parts = GradientParts(policy.model) if config.gradient_noise_parts else None
    sums = dict.fromkeys(("loss", "entropy", "kl", "clip_low", "clip_high"), 0.0)
    fresh: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for number, group in enumerate(groups):
        batch = make_batch([completions[index] for index in group], pad_token(policy.tokenizer), device)
        if policy.processes.size > 1:  # gradients are exchanged once, with the last micro-batch
            policy.model.set_requires_gradient_sync(number in lasts)
        logp_BT, entropy_BT = token_logprobs(policy.model, batch, config.temperature, policy.autocast)
        mask_BT = batch.mask * counts_B[group, None]
        old, ref, weight = (
            None if values is None else padded([values[rows[index]] for index in group], logp_BT)
            for values in (generation.old_logp, generation.ref_logp, generation.token_weights)
        )
        outputs = policy_loss(
            logp_BT, advantage_B[group], mask_BT, denominators, config, old_logp_BT=old, ref_logp_BT=ref, weight_BT=weight
        )  # fmt: skip
        (outputs.loss * policy.processes.size).backward()  # FSDP averages over processes
        sums["loss"] += float(outputs.loss.detach())
        sums["entropy"] += float((entropy_BT * mask_BT).sum())
        for name, value in outputs.sums.items():
            sums[name] += float(value)
        for index, logp_T in zip(group, logp_BT.detach(), strict=True):
            fresh[index] = logp_T[: len(completions[index].completion_ids)]
        if parts is not None and number in lasts:
            parts.end_part()
    prompts = denominators.sequences / config.num_generations
    return sums, fresh, {} if parts is None else parts.end_step(prompts, policy.sum)


def _grouped(config: GRPOConfig, completions: Sequence[Completion]) -> tuple[list[list[int]], set[int]]:
    """Micro-batches, and the numbers of those with which a part of the step ends, whose gradient is measured apart.

    Gradients are exchanged between processes where a part ends, so every process must have as many parts.
    """
    count = max(1, config.gradient_noise_parts)
    groups: list[list[int]] = []
    lasts = set()
    for part in range(count):
        own = [row for row in range(len(completions)) if row // config.num_generations % count == part]
        groups += [[own[i] for i in group] for group in micro_batches([completions[r] for r in own], config.micro_batch_tokens)]
        lasts.add(len(groups) - 1)
    return groups, lasts


def _step_metrics(
    config: GRPOConfig, policy: Policy, generation: Generation, rows: list[int], total: dict[str, float], counted: Denominators
) -> dict[str, float]:
    chosen = [generation.completions[row] for row in rows]
    reward_PG = generation.reward_PG.view(-1)[rows].view(-1, config.num_generations)
    spread_P = reward_PG.std(dim=1)
    lengths = [len(c.completion_ids) for c in chosen]
    groups, reward, spread, still, length, cut = policy.sum(
        float(len(spread_P)), float(reward_PG.sum()), float(spread_P.sum()), float((spread_P == 0).sum()),
        float(sum(lengths)), float(sum(c.truncated for c in chosen)),
    )  # fmt: skip
    tokens = max(1.0, counted.tokens)
    metrics = {
        "loss": total["loss"],
        "reward": reward / counted.sequences,
        "reward_std": spread / groups,
        "frac_reward_zero_std": still / groups,
        "entropy": total["entropy"] / tokens,
        "clip_ratio/low_mean": total["clip_low"] / tokens,
        "clip_ratio/high_mean": total["clip_high"] / tokens,
        "clip_ratio/region_mean": (total["clip_low"] + total["clip_high"]) / tokens,
        "completions/mean_length": length / counted.sequences,
        "completions/max_length": float(max(policy.processes.gather(max(lengths)))),
        "completions/clipped_ratio": cut / counted.sequences,
        **_informativeness(policy, generation, rows, reward_PG.shape, groups),
    }
    return metrics | ({"kl": total["kl"] / tokens} if config.beta else {})


def _informativeness(
    policy: Policy, generation: Generation, rows: list[int], shape: torch.Size, groups: float
) -> dict[str, float]:
    """Share of prompts with right and wrong rollouts, by how much the policy prefers the right ones, spread of the accuracy."""
    assert generation.old_logp is not None
    right_PG = torch.tensor([generation.right[row] for row in rows]).view(shape)
    sums = informativeness(right_PG, [generation.old_logp[row] for row in rows])
    total = dict(zip(sums, policy.sum(*sums.values()), strict=True))
    mean = total["rate"] / groups
    return {
        "accuracy": mean,
        "accuracy_spread": max(0.0, total["square"] / groups - mean**2) ** 0.5,
        "frac_groups_mixed": total["mixed"] / groups,
        "logp_margin": total["margin"] / total["mixed"] if total["mixed"] else float("nan"),
    }


def _warn_without_signal(log: RunLog, metrics: dict[str, float], step: int, first: int, before: int) -> int:
    """Steps in a row in which no group had a difference to learn from, up to this one; warns about every tenth."""
    if metrics["frac_reward_zero_std"] < 1:
        return 0
    count = before + step + 1 - first
    if count // _WARN_STEPS > before // _WARN_STEPS:
        advice = "all were right: take harder problems" if metrics["accuracy"] == 1 else (
            "none was right: take easier problems or a better start, raise num_generations or temperature, or give credit for "
            "partial answers" if metrics["accuracy"] == 0
            else "every prompt is either always or never solved: take problems in between, or raise num_generations"
        )  # fmt: skip
        log.say(f"step {step}: nothing to learn from for {count} steps, the rewards of every group agree ({advice})")
    return count


def _speed(config: GRPOConfig, metrics: dict[str, float], generation: Generation, seconds: float) -> dict[str, float]:
    """Seconds of a step with its share of the generation, and completion tokens a second; apart, since they never repeat."""
    whole = seconds + generation.seconds / config.steps_of_generation
    tokens = metrics["completions/mean_length"] * config.generation_batch_size / config.steps_per_generation
    return {"step_seconds": whole, "tokens_per_second": tokens / whole}


def _validate(config: GRPOConfig, policy: Policy, task: Task) -> dict[str, float]:
    """Greedy accuracy on validation problems, the same ones every time."""
    found = evaluate(
        policy.model, policy.tokenizer, task, num_problems=config.eval_num_problems,
        max_completion_length=config.max_completion_length, seed=config.seed, batch_size=config.generation_rows,
    )  # fmt: skip
    return {"eval/accuracy": found.accuracy}


def _keep(config: GRPOConfig, folder: Path, policy: Policy, recorder: Recorder | None, step: int) -> None:
    """The full state, once the store holds the step too."""
    if recorder is not None:
        recorder.flush()
    save_state(folder / "state", step, policy.model, policy.optimizer, policy.processes)
