"""What DelTA and LamPO cost: CPU time of a whole GRPO step against plain GRPO, and peak memory as
the batch grows.

    python tests/benchmarks/credit.py [--model DIR] [--steps N] [--rollouts N] [--length N]
    [--memory N...] [--json FILE]

Steps of all arms alternate in one process, on the same model and prompts, in float32 on one thread
of a CPU; the ratio is of neighbouring steps. Memory is the peak of a process for one step of each
number of rollouts in ``--memory``. Without ``--model`` it is the small model that comes with the
package, on its task.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "DelTA": {"token_weighting": "delta"},
    "LamPO": {"advantage": "lampo"},
    "LamPO + DelTA": {"advantage": "lampo", "token_weighting": "delta"},
    "token shares": {"token_shares": True},
    "gradient noise, 4 parts": {"gradient_noise_parts": 4},
}


def open_run(options: argparse.Namespace, rollouts: int) -> Any:
    """A function that takes step ``n`` of an arm."""
    import torch

    from relexkit.processes import Processes
    from relexkit.trainer.config import GRPOConfig
    from relexkit.trainer.loop.generation import roll_out
    from relexkit.trainer.loop.step import optimizer_step
    from relexkit.trainer.policy.setup import Policy, build_optimizer, load_model
    from relexkit.trainer.policy.small_model import FOLDER
    from relexkit.trainer.tasks import load_task

    torch.set_num_threads(1)
    place = options.model or str(FOLDER)
    common: dict[str, Any] = {
        "model": place,
        "task": "arithmetic",
        "output": "unused",
        "generation_batch_size": rollouts,
        "num_generations": 8,
        "max_completion_length": options.length,
        "generation_rows": 128,
        "micro_batch_tokens": 4096,
        "device": "cpu",
    }
    configs = {arm: GRPOConfig(**common, **more) for arm, more in ARMS.items()}
    model, tokenizer = load_model(place, torch.device("cpu"))
    optimizer = build_optimizer(model.train(), configs["GRPO"])
    policy = Policy(
        model=model,
        reference=None,
        tokenizer=tokenizer,
        optimizer=optimizer,
        autocast=False,
        processes=Processes(),
    )
    task = load_task("arithmetic")
    problems = list(task.problems("train"))

    def step(arm: str, number: int) -> None:
        generation = roll_out(configs[arm], policy, task, problems, number)
        optimizer_step(configs[arm], policy, generation, 0, number + 1)

    return step


def speed(options: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of every step of each arm; every round takes the same prompts."""
    step = open_run(options, options.rollouts)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(options.steps + 1):
        for arm in ARMS:
            began = time.process_time()
            step(arm, number)
            if number:  # the first round warms up
                found[arm].append(time.process_time() - began)
    return found


def peak(arm: str, rollouts: int, options: argparse.Namespace) -> int:
    """Peak bytes of a process that takes one step."""
    command = [
        sys.executable,
        __file__,
        "--part",
        arm,
        "--rollouts",
        str(rollouts),
        "--length",
        str(options.length),
    ]
    command += ["--model", options.model] if options.model else []
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face folder (default: the small model)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--length", type=int, default=10, help="longest completion")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[128, 1024, 4096], help="numbers of rollouts"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        open_run(options, options.rollouts)(options.part, 0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    seconds = speed(options)
    for arm, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["GRPO"], strict=True)]
        print(
            f"{arm:24} {statistics.median(values):.3f} CPU s a step,"
            f" {statistics.median(ratios):.3f} times GRPO ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    memory = {
        str(n): {arm: peak(arm, n, options) for arm in ("GRPO", "DelTA")} for n in options.memory
    }
    for count, peaks in memory.items():
        print(
            f"{count:>6} rollouts: peak {peaks['GRPO'] / 1e6:.0f} MB, with DelTA"
            f" {peaks['DelTA'] / 1e6:.0f} MB"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"seconds": seconds, "peak_bytes": memory}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
