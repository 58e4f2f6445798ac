"""Speed of a GRPO step against TRL's ``GRPOTrainer``, and the cost of recording: whole runs in
turn, each in its own process.

    python tests/benchmarks/training.py [--model DIR] [--steps N] [--repeats N] [--rollouts N]
    [--length N] [--mixed SHARE]
                                         [--json FILE]

Both train the same model on the same prompts with the same rewards, numbers of rollouts and longest
completion, float32, AdamW, one on-policy step per generation, on a CPU. A step is generation,
rewards, loss and update; the first step of a run is left out. Without ``--model`` a small untrained
Llama is made, which seldom ends a completion. ``--mixed`` is the share of prompts whose rollouts
get different rewards (a hash of the text); the others teach nothing, and our trainer takes no
backward pass for them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = ("relexkit", "relexkit, not recording", "TRL")


def make_model(folder: Path) -> Path:
    """A Llama of 1.3 million parameters with the tests' tokenizer."""
    sys.path.insert(0, str(HERE.parent))
    import torch
    from tiny_models import VOCABULARY, tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=160,
        intermediate_size=440,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts(chat: bool) -> list[str]:
    """Sums of two numbers."""
    return [
        f"What is {n} + {2 * n}? Answer with just the number." if chat else f"{n}+{2 * n}="
        for n in range(10, 74)
    ]


def reward(number: int, completion: str, mixed: float) -> float:
    """0 or 1 by a hash of the text, for ``mixed`` of the problem numbers; 0 for the others."""
    return float(number % 10 < 10 * mixed and zlib.crc32(completion.encode()) % 2)


@dataclass(frozen=True)
class Hashed:
    """The task for our trainer."""

    name: str
    splits: Any
    mixed: float

    def problems(self, split: str) -> Any:
        return self.splits.of(split)

    def reward(self, problem: Any, completion: str) -> float:
        return reward(int(problem.key), completion, self.mixed)


def make_task(chat: bool, mixed: float) -> Hashed:
    """See ``docs/tasks.md``."""
    from relexkit.trainer.tasks import Problem, split_fixed

    problems = [Problem(key=str(n), prompt=text, answer="") for n, text in enumerate(prompts(chat))]
    return Hashed("hashed", split_fixed(problems, 4, 0), mixed)


def ours(options: argparse.Namespace, record: bool) -> dict[str, float]:
    """One run of our trainer; seconds and completion tokens of each step but the first."""
    import resource

    from relexkit.trainer.config import GRPOConfig
    from relexkit.trainer.loop.run_log import read_log
    from relexkit.trainer.loop.train import train

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            model=options.model,
            output=f"{folder}/run",
            max_steps=options.steps + 1,
            generation_batch_size=options.rollouts,
            task={"name": f"{__file__}:make_task", "chat": options.chat, "mixed": options.mixed},
            save_steps=0,
            max_completion_length=options.length,
            learning_rate=1e-6,
            micro_batch_tokens=10**9,
            device="cpu",
            generation_rows=options.rollouts,
            record_every=int(record),
        )
        entries = read_log(train(config))[1:]
    seconds = [entry["step_seconds"] for entry in entries]
    tokens = [entry["completions/mean_length"] * options.rollouts for entry in entries]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "peak_bytes": peak,
    }


def theirs(options: argparse.Namespace) -> dict[str, float]:
    """One run of TRL's trainer, measured by a callback between the beginning and the end of its
    steps.
    """
    import resource

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lengths: list[int] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.monotonic() - self.began)

    def scores(completions: Any, completion_ids: Any, number: Any, **_: Any) -> list[float]:
        lengths.append(sum(len(ids) for ids in completion_ids))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [reward(n, text, options.mixed) for n, text in zip(number, texts, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        texts = prompts(options.chat)
        shown = [[{"role": "user", "content": text}] for text in texts] if options.chat else texts
        rows = Dataset.from_dict({"prompt": shown, "number": list(range(len(texts)))})
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            reward_funcs=scores,
            processing_class=AutoTokenizer.from_pretrained(options.model),
            train_dataset=rows,
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=options.steps + 1,
                per_device_train_batch_size=options.rollouts,
                num_generations=8,
                max_completion_length=options.length,
                learning_rate=1e-6,
                beta=0.0,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": statistics.median(seconds[1:]),
        "tokens_per_second": sum(lengths[1:]) / sum(seconds[1:]),
        "peak_bytes": peak,
    }


def run_part(part: str, options: argparse.Namespace) -> dict[str, float]:
    """One part in a process of its own; the last line that it prints is its result."""
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--model",
        options.model,
        "--steps",
        str(options.steps),
    ]
    command += [
        "--rollouts",
        str(options.rollouts),
        "--length",
        str(options.length),
        "--mixed",
        str(options.mixed),
    ]
    command += ["--chat"] if options.chat else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face folder (default: a small model)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--length", type=int, default=16, help="longest completion")
    parser.add_argument(
        "--chat", action="store_true", help="prompts in words, for a model with a chat template"
    )
    parser.add_argument(
        "--mixed",
        type=float,
        default=1.0,
        help="share of prompts with different rewards, in tenths",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(
            json.dumps(
                theirs(options)
                if options.part == "TRL"
                else ours(options, options.part == "relexkit")
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or str(make_model(Path(folder) / "model"))
        found: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
        for _ in range(options.repeats):
            for part in PARTS:
                found[part].append(run_part(part, options))
    for part, runs in found.items():
        speeds, times = ([run[key] for run in runs] for key in ("tokens_per_second", "seconds"))
        print(
            f"{part:26} {statistics.median(speeds):8.1f} completion tokens a second"
            f" ({min(speeds):.1f} to {max(speeds):.1f}), {statistics.median(times):.3f} s a step"
            f" ({min(times):.3f} to {max(times):.3f}), peak"
            f" {max(run['peak_bytes'] for run in runs) / 1e6:.0f} MB"
        )
    for name, first, second in (
        ("against TRL", PARTS[0], PARTS[2]),
        ("not recording against recording", PARTS[1], PARTS[0]),
    ):
        ratios = [
            a["tokens_per_second"] / b["tokens_per_second"]
            for a, b in zip(found[first], found[second], strict=True)
        ]
        print(
            f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            " times the tokens a second"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
