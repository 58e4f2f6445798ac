"""lm-evaluation-harness on steps of a store: in place with one loaded model, against a written
folder for each step.

    python tests/benchmarks/harness.py --model DIR [--steps N] [--documents N] [--json FILE]

The store is made by recording the model while its weights drift by 1e-5 a step. The task is a
local file: sums with four choices. Wall and processor seconds of all processes of a part, the
highest resident memory of one of them, and the bytes of the folders.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "What is {{{{a}}}} + {{{{b}}}}?"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def make_task(folder: Path, documents: int) -> Path:
    folder.mkdir()
    rows = [
        {"a": n, "b": 3 * n % 41, "choices": [str(n + 3 * n % 41 + k) for k in range(4)]}
        for n in range(10, 10 + documents)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(data=data))
    return folder


def make_store(model_folder: str, path: Path, steps: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from relexkit import Recorder

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(0)
    with Recorder(model, path, tokenizer=tokenizer) as recorder:
        for step in range(1, steps + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 1e-5 * torch.randn(parameter.shape, generator=generator)
            recorder.record(step)


def measured(commands: list[list[str]]) -> dict[str, float]:
    """Wall and processor seconds of all, and the largest memory of one."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    peak = 0
    for command in commands:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = after.ru_maxrss * 1024
    return {
        "wall_seconds": time.monotonic() - began,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": peak,
    }


def part(name: str, root: Path, steps: int) -> list[list[str]]:
    """The commands of a way to evaluate every step."""
    relexkit = [sys.executable, "-m", "relexkit"]
    numbers = [str(step) for step in range(1, steps + 1)]
    common = ["--include-path", str(root / "tasks"), "--batch-size", "8", "--harness", "sums"]
    if name == "in place":
        return [[*relexkit, "evaluate", str(root / "run.zarr"), *common, "--step", *numbers]]
    folders = [str(root / "steps" / number) for number in numbers]
    written = [
        [*relexkit, "checkout", str(root / "run.zarr"), "--step", number, "-o", folder]
        for number, folder in zip(numbers, folders, strict=True)
    ]
    return written + [
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"),
            f"pretrained={folder},dtype=float32",
            *("--tasks", "sums", "--include_path", str(root / "tasks"), "--batch_size", "8"),
            *("--device", "cpu"),
        ]
        for folder in folders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("in place", "folders"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measured(part(options.part, options.root, options.steps))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_task(root / "tasks", options.documents)
        make_store(options.model, root / "run.zarr", options.steps)
        for name in ("in place", "folders"):
            command = [sys.executable, __file__, "--model", options.model, "--part", name]
            command += ["--root", folder, "--steps", str(options.steps)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name] = json.loads(done.stdout)
        size = sum(path.stat().st_size for path in (root / "steps").rglob("*") if path.is_file())
        found["folders"]["bytes"] = size
    for name, numbers in found.items():
        print(
            f"{name:10} {numbers['wall_seconds']:7.1f} s, {numbers['processor_seconds']:7.1f}"
            f" processor seconds, {numbers['peak_bytes'] / 1e9:.2f} GB of memory,"
            f" {numbers.get('bytes', 0) / 1e9:.2f} GB of folders"
        )
    print(f"on {os.cpu_count()} cores; the load before was {os.getloadavg()[2]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
