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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from relexkit import RelexkitError
from relexkit.extension import console
from relexkit.options import option, parse

_T = TypeVar("_T")
PROBLEMS = 256
METHODS = ("relex", "model", "drift")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``relexkit demo``."""

    out: Path = option("-o", "--out", default=Path("demo-run"), metavar="DIR")
    """where everything is written"""
    steps: int = 60
    """optimizer steps of the run, at least 8"""
    seed: int = 0
    """of the run"""


def answer(options: Options) -> dict[str, Any]:
    """Run the demo as the command line asks for it; returns what ``summary.json`` holds."""
    if options.steps < 8:
        raise RelexkitError(
            f"--steps {options.steps} is too small; expected at least 8: half of them are"
            " extrapolated"
        )
    began = time.monotonic()
    summary = tell_story(options.out, options.steps, options.seed)
    print(f"\nAll of it lies in {options.out}/ and took {time.monotonic() - began:.0f} s.")
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
    from relexkit.trainer.commands import evaluate as command

    words = f"--task arithmetic --step {until} 0 {targets[0]} --to {_joined(targets)}"
    words += f" --until {until} --method {_joined(METHODS)} --num-problems {PROBLEMS} --samples 1"
    words += f" --max-completion-length 10 --batch-size {PROBLEMS}"
    options = _asked("evaluate", command.Options, store, *words.split())
    evaluations = command.evaluate_models(options)
    command.print_table(evaluations, options.pass_at)
    return command.document(evaluations, options)


def _sweep(store: Path, until: int, targets: tuple[int, ...]) -> dict[str, Any]:
    from relexkit.trainer.commands import sweep as command

    words = f"--task arithmetic --until {until} --to {_joined(targets)}"
    words += f" --num-problems {PROBLEMS} --max-completion-length 10"
    _, found = command.race_candidates(_asked("sweep", command.Options, store, *words.split()))
    command.print_table(found)
    return found


def _joined(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _asked(name: str, kind: type[_T], *words: object) -> _T:
    """The options of a command, which is printed as one would type it."""
    given = [str(word) for word in words]
    print(f"\n$ {shlex.join(['relexkit', name, *given])}", flush=True)
    return parse(kind, given, argparse.ArgumentParser())


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
