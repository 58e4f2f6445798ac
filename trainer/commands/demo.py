"""``relexkit demo``: the whole story on a small model, from a training run to an honest table.

The model that comes with the package is trained by GRPO while its float32 weights are recorded.
Then everything is done as if the run had been stopped half-way: its geometry beside the null, the
errors of every method in the run's own past, predictions for the step where training really ended
and for twice as far. All models answer the same held-out problems, and a sweep looks for a better
one than the step that was reached. Each step is the ``relexkit`` command that is printed before it,
called in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from relexkit import RelexkitError
from relexkit.extension import console

PROBLEMS = 256
METHODS = ("relex", "model", "drift")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit demo``."""
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("demo-run"), metavar="DIR", help="default: demo-run"
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="optimizer steps of the run, at least 8 (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")


def answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the demo as the command line asks for it; returns what ``summary.json`` holds."""
    if arguments.steps < 8:
        raise RelexkitError(
            f"--steps {arguments.steps} is too small; expected at least 8: half of them are"
            " extrapolated"
        )
    began = time.monotonic()
    summary = tell_story(arguments.out, arguments.steps, arguments.seed)
    print(f"\nAll of it lies in {arguments.out}/ and took {time.monotonic() - began:.0f} s.")
    return summary


run = answer


def tell_story(folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """Do everything in ``folder`` and print it; a training that an earlier call began is continued.

    Returns what ``summary.json`` holds: ``until``, ``targets``, ``seconds`` of the training, and
    the ``models`` as ``relexkit evaluate --json`` prints them, each compared with the model at
    ``until``. ``sweep.json`` holds the sweep.

    Raises:
        RelexkitError: the folder holds a run with other settings, or a command failed.
    """
    until, targets = steps // 2, (steps, 2 * steps)
    store = folder / "run" / "run.zarr"
    _headline(
        f"1. Train: {steps} steps of GRPO on a model that sorts digits now and then, every step"
        " recorded in float32"
    )
    began = time.monotonic()
    _train(folder / "run", steps, seed)
    seconds = time.monotonic() - began
    _headline(f"2. Look at the first {until} steps: is it a line, or a walk?")
    _command("spectrum", store, "--until", until, "--scope", "module", "--plot", folder / "figures")
    _headline("3. Ask the run's own past how far each method may be trusted")
    _command("backtest", store, "--until", *sorted({max(2, until // 4), max(2, until // 2), until}))
    _command("advise", store)
    _headline(
        f"4. Extrapolate: steps 1 to {until} predict step {targets[0]}, which was trained too, and"
        f" step {targets[1]}"
    )
    for method in METHODS:
        _command(
            "extrapolate",
            store,
            "--until",
            until,
            "--to",
            *targets,
            "--method",
            method,
            "-o",
            folder / "predicted" / method,
        )
    _headline(
        f"5. Evaluate on {PROBLEMS} problems that no training saw, each model against step {until}"
    )
    summary = _evaluate(store, until, targets) | {
        "until": until,
        "targets": list(targets),
        "seconds": seconds,
    }
    _write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    for line in verdicts(summary):
        print(line)
    _headline(
        f"6. Search on the task, from step {until}: a few predictions, and the average of the"
        " latest steps"
    )
    found = _sweep(store, until, targets)
    _write_text(folder / "sweep.json", json.dumps(found, indent=2) + "\n")
    _headline("7. One page with all of it")
    _command("report", store, "--sweep", folder / "sweep.json", "-o", folder / "report.html")
    return summary


def verdicts(summary: dict[str, Any]) -> list[str]:
    """What happened, in sentences, also where extrapolation loses."""
    models = {model["name"]: model for model in summary["models"]}
    until, end = f"step {summary['until']}", f"step {summary['targets'][0]}"
    gain = models[end]["greedy"]["accuracy"] - models["base"]["greedy"]["accuracy"]
    lines = [
        f"Training gained {100 * gain:+.1f} points of greedy accuracy in {summary['targets'][0]}"
        " steps."
    ]
    for name, model in models.items():
        if "->" not in name:
            continue
        low, high = model["difference"]["interval"]
        word = "wins against" if low > 0 else "loses to" if high < 0 else "cannot be told from"
        lines.append(
            f"{name} {word} {until}, which it was predicted from"
            f" ({model['difference']['accuracy']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."
        )
    return lines


def _train(folder: Path, steps: int, seed: int) -> None:
    """Train in this process; a small model gains nothing from threads that wait for each other."""
    import torch

    from relexkit.trainer.policy.small_model import FOLDER

    options = {
        "task": "arithmetic",
        "seed": seed,
        "max_steps": steps,
        "generation_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 10,
        "generation_rows": 128,
        "micro_batch_tokens": 4096,
        "learning_rate": 1e-4,
        "save_steps": 10,
        "device": "cpu",
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        _command("train", "--model", FOLDER, "--output", folder, *words)
    finally:
        torch.set_num_threads(threads)


def _evaluate(store: Path, until: int, targets: tuple[int, ...]) -> dict[str, Any]:
    words = [
        "evaluate",
        store,
        "--task",
        "arithmetic",
        "--step",
        until,
        0,
        targets[0],
        "--to",
        *targets,
        "--until",
        until,
    ]
    words += [
        "--method",
        *METHODS,
        "--num-problems",
        PROBLEMS,
        "--samples",
        1,
        "--max-completion-length",
        10,
    ]
    from relexkit.trainer.commands import evaluate as evaluate_command

    given = [str(word) for word in (*words, "--batch-size", PROBLEMS)]
    print(f"\n$ {shlex.join(['relexkit', *given])}", flush=True)
    parser = argparse.ArgumentParser()
    evaluate_command.add_arguments(parser)
    arguments = parser.parse_args(given[1:])
    found = evaluate_command.evaluate_models(arguments)
    evaluate_command.print_table(found, arguments.pass_at)
    return evaluate_command.document(found, arguments)


def _sweep(store: Path, until: int, targets: tuple[int, ...]) -> dict[str, Any]:
    from relexkit.trainer.commands import sweep

    given = [
        str(word)
        for word in (
            "sweep",
            store,
            "--task",
            "arithmetic",
            "--until",
            until,
            "--to",
            *targets,
            "--num-problems",
            PROBLEMS,
            "--max-completion-length",
            10,
        )
    ]
    print(f"\n$ {shlex.join(['relexkit', *given])}", flush=True)
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    found, _ = sweep.race_candidates(parser.parse_args(given[1:]))
    sweep.print_table(found)
    return found


def _command(*words: object) -> None:
    """Print a command as one would type it, and run it in this process."""
    from relexkit.cli import main

    given = [str(word) for word in words]
    print(f"\n$ {shlex.join(['relexkit', *given])}", flush=True)
    if main(given) != 0:
        raise RelexkitError(
            f"the demo ends here because this command failed: {shlex.join(['relexkit', *given])}"
        )


def _headline(text: str) -> None:
    console().print(f"\n[bold]{text}[/bold]", highlight=False)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)
