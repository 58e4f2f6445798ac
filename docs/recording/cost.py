"""What the callback costs a TRL step on SmolLM2-135M-Instruct: see README.md beside this file.

The recorder alone on the model, moved a little between steps: seconds that the trainer waits,
seconds until the step is committed, processor seconds, and memory. Then a few GRPO steps without a
recorder: wall and processor seconds of each. On a machine whose processor also trains, the
processor seconds of both compete, so their ratio bounds the slowdown there.

    python docs/recording/cost.py OUT        # OUT/base from three_ways.py, or it is written
"""

import argparse
import ctypes
import gc
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from relexkit import Recorder

sys.path.insert(0, str(Path(__file__).parents[1] / "smollm2-run"))
from make_run import additions, last_number_is_right, write_base


class Clock(TrainerCallback):
    """Wall and processor seconds of every step."""

    def __init__(self):
        self.wall, self.processor = [], []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        self.wall.append(time.perf_counter() - self.began[0])
        self.processor.append(time.process_time() - self.began[1])


def train(out: Path, steps: int, rollouts: int) -> Clock:
    clock = Clock()
    config = GRPOConfig(
        output_dir=str(out / "cost"),
        max_steps=steps,
        per_device_train_batch_size=rollouts,
        num_generations=8,
        max_completion_length=12,
        learning_rate=3e-6,
        beta=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(out / "base"),
        reward_funcs=last_number_is_right,
        args=config,
        train_dataset=additions(1, rollouts // 8 * steps),
        callbacks=[clock],
    ).train()
    return clock


def record(out: Path, sketch: bool, steps: int) -> dict:
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    for parameter in model.parameters():  # memory of its own, not pages of the file
        parameter.data = parameter.data.clone()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = {"waits": [], "until committed": [], "processor": [], "peak bytes": []}
    before = memory("VmRSS")
    path = out / f"cost-{'sketch' if sketch else 'plain'}.zarr"
    shutil.rmtree(path, ignore_errors=True)
    restart_peak()
    with Recorder(model, path, sketch=sketch) as recorder:
        found["peak bytes at the start"] = memory("VmHWM") - before
        for step in range(1, steps + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    for piece in parameter.view(-1).split(2**18):
                        piece += 3e-6 * torch.randn_like(piece)
            restart_peak()
            wall, processor = time.perf_counter(), time.process_time()
            recorder.record(step)
            found["waits"].append(time.perf_counter() - wall)
            recorder.flush()
            found["until committed"].append(time.perf_counter() - wall)
            found["processor"].append(time.process_time() - processor)
            found["peak bytes"].append(memory("VmHWM") - before)
    found["weights"] = sum(p.numel() * 4 for p in model.parameters())
    return found


def memory(kind: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` the most since ``restart_peak``. Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(kind)))


def restart_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3, help="GRPO steps; 0 for the recorder alone")
    parser.add_argument("--rollouts", type=int, default=16)
    options = parser.parse_args()
    if not (options.out / "base").exists():
        write_base(options.out / "base")
    with Recorder(
        torch.nn.Linear(2, 2), options.out / "warm.zarr"
    ) as recorder:  # what is loaded once does not count
        recorder.record(1)
    shutil.rmtree(options.out / "warm.zarr")
    result = {}
    for name, sketch in (("recorder", False), ("recorder with sketch", True)):
        result[name] = record(options.out, sketch, 4)
    if options.steps:
        clock = train(options.out, options.steps, options.rollouts)
        result["TRL step"] = {
            "wall": clock.wall,
            "processor": clock.processor,
            "rollouts": options.rollouts,
        }
    (options.out / "cost.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
