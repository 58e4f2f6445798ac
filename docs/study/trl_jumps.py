"""A TRL run of the small model with adaptive jumps beside the same run without, for docs/jumps.md.

    python docs/study/trl_jumps.py OUT [--steps 75] [--rate 3e-6]

Sorting digits, 32 prompts of 8 rollouts a step, constant rate. Prints, for each of both runs,
reward by stretches of 25 trained steps and greedy accuracy on the study's 512 problems at the end,
and what was decided; keeps both in docs/study/results/trl-jumps.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import SORTING
from datasets import Dataset
from study import RESULTS, Models, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from relexkit import TrajectoryStore
from relexkit.assess.jump_decision import Jumps
from relexkit.gram_matrix.jumps import attempts
from relexkit.record.callback import RecorderCallback
from relexkit.trainer.policy.small_model import FOLDER
from relexkit.trainer.tasks import load_task, prompt_text


def run(place: Path, jumps: Jumps | None, steps: int, rate: float) -> dict[str, Any]:
    """One run; its rewards, decisions and accuracy."""
    task = load_task(SORTING.task)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    problems = list(task.problems("train"))[: 32 * steps]
    by_key = {problem.key: problem for problem in problems}

    def reward(completions: list[str], key: list[str], **_: Any) -> list[float]:
        return [task.reward(by_key[k], text) for k, text in zip(key, completions, strict=True)]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32),
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(
            {
                "prompt": [prompt_text(problem, tokenizer) for problem in problems],
                "key": [problem.key for problem in problems],
            }
        ),
        args=GRPOConfig(
            output_dir=str(place / "trl"),
            max_steps=steps,
            per_device_train_batch_size=256,
            num_generations=8,
            max_completion_length=10,
            learning_rate=rate,
            lr_scheduler_type="constant",
            beta=0.0,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.add_callback(RecorderCallback(place / "run.zarr", jumps=jumps, trainer=trainer))
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    store = TrajectoryStore(place / "run.zarr")
    return {
        "reward": [float(np.mean(rewards[i : i + 25])) for i in range(0, steps, 25)],
        "greedy": Models(store).recorded(int(store.steps[-1]))["greedy"],
        "trained": steps,
        "last_step": int(store.steps[-1]),
        "jumps": [attempt.document() for attempt in attempts(store)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--rate", type=float, default=3e-6)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found = {
        name: run(asked.out / name, rule, asked.steps, asked.rate)
        for name, rule in (("jumps", Jumps()), ("plain", None))
    }
    write_json(asked.results / "trl-jumps.json", found)
    for name, result in found.items():
        print(name, result)


if __name__ == "__main__":
    main()
