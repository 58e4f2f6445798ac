"""Group relative policy optimisation (GRPO, arXiv 2402.03300): prompts, rollouts, rewards,
advantages, steps, recording.

    relexkit train CONFIG.yaml [--key value ...]

leaves in the output folder ``config.yaml`` (resolved), ``run.zarr`` (the trajectory store, from the
float32 master weights), ``rollouts/`` (every rollout, one table), ``metrics.jsonl``, ``events/``
(TensorBoard, unless ``report_to`` says otherwise), ``state/`` (for a resume) and ``final/`` (the
trained model).

The order of the prompts, the noise of every rollout and dropout are functions of the seed and the
step, so a run that is killed and started again goes on from its last state to the same bits on a
CPU, and the number of processes changes rounding only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np

from relexkit import Recorder, RelexkitError, TrajectoryStore
from relexkit.extension import Jumper, LiveAdvice, NotAStoreError, Processes
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.evaluation.evaluate import evaluate
from relexkit.trainer.evaluation.settings import EvaluationSettings, kept_files
from relexkit.trainer.loop.engine import open_engine
from relexkit.trainer.loop.folder import claim_folder, save_model
from relexkit.trainer.loop.generation import Generation, log_rollouts, roll_out
from relexkit.trainer.loop.loggers import LOGGERS, logger_names
from relexkit.trainer.loop.rollout_log import truncate_after
from relexkit.trainer.loop.run_log import RunLog
from relexkit.trainer.loop.state import last_state, load_state, save_state
from relexkit.trainer.loop.step import optimizer_step
from relexkit.trainer.policy.setup import (
    Policy,
    choose_device,
    load_policy,
    own_dropout,
    process_group,
)
from relexkit.trainer.tasks import Task, load_task, task_name

_WARN_STEPS = 10  # without any difference between the rewards of a group


def train(config: GRPOConfig, *, trust_remote_code: bool = False) -> Path:
    """Run or resume a training; returns its folder.

    Code that lies beside the model runs only with ``trust_remote_code``.

    With ``torchrun`` every process calls this. Memory: the weights in float32, as much for
    gradients, twice as much for the optimizer, one copy for the recorder, a reference if ``beta``
    is not 0, and the activations and logits of a micro-batch.

    Raises:
        RelexkitError: the folder holds a run with other options, the task or a prompt cannot be
            used, a reward function fails, or the loss is not finite; what was recorded before
            stays, and the same call goes on from the last state.
    """
    device = choose_device(config)
    with process_group(device) as processes, ExitStack() as stack:
        folder = Path(config.output)
        check_processes(config, processes)
        loggers = logger_names(config.report_to)
        processes.lead(lambda: claim_folder(folder, config))
        task = load_task(config.task)
        problems = list(task.problems("train"))
        policy = load_policy(config, device, processes, trust_remote_code=trust_remote_code)
        engine = open_engine(config, policy)
        step = last_state(folder / "state") or 0
        recorder, lost = _resume(config, folder, policy, step, stack)
        processes.lead(lambda: truncate_after(folder / "rollouts", step))
        advice = None if recorder is None else stack.enter_context(closing(LiveAdvice(recorder)))
        log = stack.enter_context(
            RunLog(
                folder,
                step,
                config.max_steps,
                loggers=[partial(LOGGERS[name], folder, step, config) for name in loggers],
                active=processes.rank == 0,
            )
        )
        if step:
            log.say(f"going on after step {step}{lost}")
        sample = partial(roll_out, config, policy, task, problems, engine=engine)
        jumper = Jumper(config.jump_rule, recorder, policy.model)
        generation: Generation | None = None
        without_signal = 0
        while step < config.max_steps:
            number = (step - jumper.skipped) // config.generation_interval
            if jumper.due(step, config.max_steps - step):
                landed, generation = jumper.attempt(
                    step,
                    config.max_steps - step,
                    partial(_rewarded, sample, number, processes),
                    log.say,
                )
                if landed > step:
                    step, metrics = landed, jumper.landing
                    if _is_evaluated(config, step):
                        metrics |= _validate(config, policy, task)
                    log.write(step, metrics)
                    continue
            if generation is None:
                generation = sample(number)
            first = step + 1
            for index in range(min(config.generation_interval, config.max_steps - step)):
                began = time.monotonic()
                metrics = optimizer_step(
                    config, policy, generation, index % config.steps_per_generation, step + 1
                )
                step += 1
                metrics |= jumper.take_told()
                if recorder is not None:
                    recorder.record(step, metrics)
                    metrics |= recorder.live
                if _is_evaluated(config, step):
                    metrics |= _validate(config, policy, task)
                speed = _speed(config, metrics, generation, time.monotonic() - began)
                log.write(step, metrics | speed, None if advice is None else advice.update())
            log_rollouts(folder / "rollouts", first, generation, processes)
            generation = None
            without_signal = _warn_without_signal(log, metrics, step, first, without_signal)
            if (
                config.save_steps
                and step // config.save_steps > (first - 1) // config.save_steps
                and step < config.max_steps
            ):
                _keep(folder, policy, recorder, log, step)
        _keep(folder, policy, recorder, log, step)
        save_model(folder / "final", policy.model, policy.tokenizer, processes)
    return folder


# -- preparing -------------------------------------------------------------------------------------


def check_processes(config: GRPOConfig, processes: Processes) -> None:
    """Refuse what cannot be done by so many processes."""
    if config.engine is not None and processes.size > 1:
        raise RelexkitError("engine: cannot take over sharded weights; expected one process")
    unit = processes.size * config.num_generations * config.steps_per_generation
    if config.generation_batch_size % unit:
        raise RelexkitError(
            f"generation_batch_size: {config.generation_batch_size} does not split over"
            f" {processes.size} processes; expected a multiple of {unit}"
        )
    groups = config.generation_batch_size // unit
    if config.gradient_noise_parts > groups:
        raise RelexkitError(
            f"gradient_noise_parts: {config.gradient_noise_parts} parts of {groups} groups in each"
            f" of {processes.size} processes leave some empty; expected at most as many"
        )


def _resume(
    config: GRPOConfig, folder: Path, policy: Policy, step: int, stack: ExitStack
) -> tuple[Recorder | None, str]:
    """Bring the policy to the state after ``step`` (0: as it is) and the store to the same step;
    returns the recorder, and in words what the store has lost.

    A state is written once the store holds its step, so whatever a crash leaves, the store has it
    too. If somebody removed the store or put an older copy back, the weights of the state are
    recorded again, over the base that the run began with.
    """

    def load() -> None:
        if step:
            load_state(folder / "state", step, policy.model, policy.optimizer, policy.processes)

    if not config.record_every:
        load()
        return None, ""
    path = folder / "run.zarr"
    recorded = policy.processes.gather(_recorded(path))[0]
    due = step - step % config.record_every
    lacking = due > 0 and due not in (recorded or ())
    if lacking and config.jump_rule is not None:
        raise RelexkitError(
            f"{path}: lacks step {due}, from which jumps are predicted; restore the store from a"
            f" copy, or remove {folder / 'state'} to begin again"
        )
    open_recorder = partial(
        Recorder,
        policy.model,
        path,
        every=config.record_every,
        mantissa_bits=config.mantissa_bits,
        tokenizer=policy.tokenizer,
        files=kept_files(config),
        source=f"GRPO of {config.model} on {task_name(config.task)}",
        sketch=config.jump_rule is None,  # jumps are no part of a trajectory
    )
    with own_dropout(policy.model):
        if recorded is None and step:
            open_recorder().close()  # its base: the weights that the run began with
        load()
        begun = recorded is not None or step > 0
        recorder = open_recorder(resume_from=step if begun else None, compare=not lacking)
    stack.enter_context(recorder)
    if not lacking:
        return recorder, ""
    before = max((s for s in recorded or () if s < due), default=0)
    if due == step:
        recorder.record(step, {})
        recorder.flush()
    there = "was missing" if recorded is None else f"ended with step {before}"
    return recorder, f"; {path} {there}, so it lacks what was recorded between {before} and {step}"


def _recorded(path: Path) -> list[int] | None:
    """The steps of a store; None if there is none, or one whose creation was interrupted, which the
    recorder starts again.
    """
    try:
        return [int(step) for step in TrajectoryStore(path).steps]
    except NotAStoreError:
        return None


def _warn_without_signal(
    log: RunLog, metrics: dict[str, float], step: int, first: int, before: int
) -> int:
    """Steps in a row in which no group had a difference to learn from, up to this one; warns about
    every tenth.
    """
    if metrics["frac_reward_zero_std"] < 1:
        return 0
    count = before + step + 1 - first
    if count // _WARN_STEPS > before // _WARN_STEPS:
        advice = (
            "all were right: take harder problems"
            if metrics["accuracy"] == 1
            else (
                "none was right: take easier problems or a better start, raise num_generations or"
                " temperature, or give credit for partial answers"
                if metrics["accuracy"] == 0
                else (
                    "every prompt is either always or never solved: take problems in between, or"
                    " raise num_generations"
                )
            )
        )
        log.say(
            f"step {step}: nothing to learn from for {count} steps, the rewards of every group"
            f" agree ({advice})"
        )
    return count


def _speed(
    config: GRPOConfig, metrics: dict[str, float], generation: Generation, seconds: float
) -> dict[str, float]:
    """Seconds of a step with its share of the generation, and completion tokens a second; kept
    apart from the other metrics because they differ between equal runs.
    """
    whole = seconds + generation.seconds / config.generation_interval
    tokens = (
        metrics["completions/mean_length"]
        * config.generation_batch_size
        / config.steps_per_generation
    )
    return {"step_seconds": whole, "tokens_per_second": tokens / whole}


def _rewarded(
    sample: Callable[[int], Generation], number: int, processes: Processes
) -> tuple[Generation, np.ndarray]:
    """A generation, and its rewards ``[P, G]`` over all processes."""
    generation = sample(number)
    return generation, np.concatenate(processes.gather(generation.reward_PG.numpy()))


def _is_evaluated(config: GRPOConfig, step: int) -> bool:
    return config.eval_steps > 0 and (step % config.eval_steps == 0 or step == config.max_steps)


def _validate(config: GRPOConfig, policy: Policy, task: Task) -> dict[str, float]:
    """Greedy accuracy on validation problems, the same ones every time."""
    evaluation = evaluate(
        policy.model,
        policy.tokenizer,
        task,
        EvaluationSettings(
            num_problems=config.eval_num_problems,
            max_completion_length=config.max_completion_length,
            seed=config.seed,
            batch_size=config.generation_rows,
        ),
    )
    return {"eval/accuracy": evaluation.accuracy}


def _keep(folder: Path, policy: Policy, recorder: Recorder | None, log: RunLog, step: int) -> None:
    """The full state, once the store and the log hold the step too, on the disk."""
    if recorder is not None:
        recorder.flush()
    log.sync()
    save_state(folder / "state", step, policy.model, policy.optimizer, policy.processes)
