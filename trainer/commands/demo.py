"""``relexkit demo``: when a run can be extrapolated, and when not, on a small model in minutes.

The model that comes with the package is trained by GRPO three times while its float32 weights are
recorded: at a small learning rate as published runs have it, where the trajectory is a line; at
that rate again with short jumps along the line; and at a rate 33 times larger, where it is a walk.
The tool is asked which is which, long and short predictions are put to the test on held-out
problems, and everything is held against the accuracy of plain training at equal rollouts. Each step
is the ``relexkit`` command that is printed before it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relexkit import RelexkitError
from relexkit.extension import console, plot, print_table, write_file
from relexkit.options import option

PROBLEMS = 512
PROMPTS, GROUP = 32, 8
SMALL_RATE, LARGE_RATE = 3e-6, 1e-4
JUMPS, PREDICTIONS = "drift", ("drift", "relex")

Answers = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where the runs are and how long they take.

    Attributes:
        folder: of everything.
        steps: of the plain run; half of them are extrapolated, jumps are a quarter long.
        seed: of the training runs.
    """

    folder: Path
    steps: int
    seed: int

    @property
    def quarters(self) -> tuple[int, int, int, int]:
        """The steps at which plain training is looked at."""
        quarter = self.steps // 4
        return quarter, 2 * quarter, 3 * quarter, 4 * quarter

    @property
    def walk_steps(self) -> int:
        """Steps at the large rate."""
        return max(8, 3 * self.steps // 10)

    def store(self, name: str) -> Path:
        """The trajectory store of one of the runs."""
        return self.folder / name / "run.zarr"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``relexkit demo``."""

    out: Path = option("-o", "--out", default=Path("demo-run"), metavar="DIR")
    """where everything is written"""
    steps: int = 100
    """optimizer steps of the plain run, a multiple of 4, at least 16"""
    seed: int = 0
    """of the runs"""


def answer(options: Options) -> Answers:
    """Run the demo as the command line asks for it; returns what ``summary.json`` holds."""
    if options.steps < 16 or options.steps % 4:
        raise RelexkitError(
            f"--steps {options.steps} does not fit; expected a multiple of 4, at least 16: jumps"
            " are a quarter of it long"
        )
    began = time.monotonic()
    summary = tell_story(Plan(options.out, options.steps, options.seed))
    print(f"\nAll of it lies in {options.out}/ and took {time.monotonic() - began:.0f} s.")
    return summary


run = answer


def tell_story(plan: Plan) -> Answers:
    """Do everything in the plan's folder and print it; runs that an earlier call began go on.

    Returns what ``summary.json`` holds: the answers of ``plain``, ``jumps``, ``walk`` and
    ``predictions`` as ``relexkit evaluate --json`` prints them, ``rollouts_per_step``, ``until``,
    and the ``verdicts`` in sentences.

    Raises:
        RelexkitError: the folder holds a run with other settings, or a command failed.
    """
    first, half, third, end = plan.quarters
    plain, jumping, walk = (plan.store(name) for name in ("plain", "jumps", "walk"))
    _headline(f"1. Train {end} steps of GRPO at {SMALL_RATE:g}, a rate as published runs have it")
    with ThreadPoolExecutor(1) as beside:
        others = [beside.submit(_train_beside, plan, name) for name in ("jumps", "walk")]
        _train_here(plan)
        _headline(
            f"2. Beside it the same with jumps of {first} steps, and {plan.walk_steps} steps at"
            f" {LARGE_RATE:g}"
        )
        _wait(others)
    _headline("3. Is the first half a line or a walk? How far may each method be trusted?")
    _command(
        "spectrum", plain, "--until", half, "--scope", "module", "--plot", plan.folder / "figures"
    )
    _command("backtest", plain, "--until", half)
    _command("advise", plain, "--until", half)
    _headline(f"4. Predict from step {half}, and ask {PROBLEMS} problems that no training saw")
    asked = ["--until", half, "--to", end]
    _command("extrapolate", plain, *asked, "--method", JUMPS, "-o", plan.folder / "predicted")
    answers: Answers = {"rollouts_per_step": PROMPTS * GROUP, "until": half}
    answers["predictions"] = _evaluate(
        plain, "--step", half, end, *asked, 2 * end, "--method", *PREDICTIONS
    )
    _headline("5. Do short jumps inside the training save rollouts?")
    answers["plain"] = _evaluate(plain, "--step", 0, *plan.quarters)
    answers["jumps"] = _evaluate(jumping, "--step", *plan.quarters)
    _headline(f"6. The same model at {LARGE_RATE:g}: a walk, and better at equal rollouts")
    _command("advise", walk)
    answers["walk"] = _evaluate(walk, "--step", 0, plan.walk_steps)
    answers["verdicts"] = verdicts(answers)
    _headline("7. What came out")
    for line in answers["verdicts"]:
        console().print(f"- {line}", highlight=False)
    write_file(plan.folder / "summary.json", (json.dumps(answers, indent=2) + "\n").encode())
    plot("demo")(answers, plan.folder / "figures")
    sweep = _answer("sweep", plain, "--until", half, "--to", third, end, "--num-problems", PROBLEMS)
    write_file(plan.folder / "sweep.json", (json.dumps(sweep, indent=2) + "\n").encode())
    _command(
        "report", plain, "--sweep", plan.folder / "sweep.json", "-o", plan.folder / "report.html"
    )
    return answers


def verdicts(answers: Answers) -> list[str]:
    """What happened, in sentences, also where extrapolation or the jumps lose."""
    half = answers["until"]
    plain = {model["name"]: model for model in answers["plain"]}
    end, third = f"step {2 * half}", f"step {half + half // 2}"
    held, reached = (_accuracy(plain[f"step {half}"]), _accuracy(plain[end]))
    lines = [
        f"Training from step {half} to {2 * half} took greedy accuracy from {held:.3f} to"
        f" {reached:.3f}."
    ]
    for model in answers["predictions"][2:]:
        low, high = model["difference"]["interval"]
        word = "is better than" if low > 0 else "is worse than" if high < 0 else "does not differ"
        word += " from" if word.endswith("differ") else ""
        lines.append(
            f"{model['name']}: {_accuracy(model):.3f}, which {word} holding step {half}"
            f" ({model['difference']['accuracy']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."
        )
    jumped = answers["jumps"]
    lines.append(
        f"With jumps, {half // 2} trained steps reach {_accuracy(jumped[1]):.3f} (plain:"
        f" {_accuracy(plain[f'step {half // 2}']):.3f}) and {half} reach"
        f" {_accuracy(jumped[3]):.3f} (plain: {held:.3f}, and {_accuracy(plain[third]):.3f} after"
        f" {half + half // 2})."
    )
    walk = answers["walk"][-1]
    lines.append(
        f"At {LARGE_RATE:g}, {walk['name']} without any jump has {_accuracy(walk):.3f}: where the"
        " rate can be raised, that saves more than any extrapolation."
    )
    return lines


def _accuracy(model: Answers) -> float:
    return model["greedy"]["accuracy"]


# -- commands --------------------------------------------------------------------------------------


def _training(plan: Plan, name: str) -> list[str]:
    """The command that trains one of the three runs."""
    from relexkit.trainer.policy.small_model import FOLDER

    options = {
        "output": plan.folder / name,
        "task": "arithmetic",
        "seed": plan.seed,
        "max_steps": plan.walk_steps if name == "walk" else plan.steps,
        "learning_rate": LARGE_RATE if name == "walk" else SMALL_RATE,
        "generation_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 10,
        "generation_rows": PROMPTS * GROUP,
        "micro_batch_tokens": 4096,
        "save_steps": 10,
        "device": "cpu",
    }
    if name == "jumps":
        jump = plan.quarters[0]
        options["regrounding"] = f"{{train_steps: {jump}, jump_steps: {jump}, method: {JUMPS}}}"
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["train", "--model", str(FOLDER), *words]


def _train_here(plan: Plan) -> None:
    """Train the plain run in this process; a small model gains nothing from more threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _command(*_training(plan, "plain"))
    finally:
        torch.set_num_threads(threads)


def _train_beside(plan: Plan, name: str) -> str:
    """Train one of the other runs in a process of its own; returns the command to print."""
    words = _training(plan, name)
    done = subprocess.run(
        [sys.executable, "-m", "relexkit", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("relexkit: ")]
        raise RelexkitError(
            f"the demo ends here because this command failed: {_typed(words)}"
            f" ({said[-1] if said else f'exit status {done.returncode}'})"
        )
    return _typed(words)


def _wait(others: Sequence[Future[str]]) -> None:
    """Print the commands that ran in the background, once they are done."""
    for other in others:
        print(f"\n$ {other.result()}", flush=True)


def _command(*words: object) -> None:
    """Print a command as one would type it, and run it in this process."""
    from relexkit.cli import main

    given = [str(word) for word in words]
    print(f"\n$ {_typed(given)}", flush=True)
    if main(given) != 0:
        raise RelexkitError(f"the demo ends here because this command failed: {_typed(given)}")


def _answer(*words: object) -> Answers:
    """Run a command with ``--json``; its document."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        _command(*words, "--json")
    shown, _, document = output.getvalue().strip().partition("\n")
    print(f"\n{shown}")
    return json.loads(document)


def _evaluate(store: Path, *words: object) -> list[Answers]:
    """Answers of models of a store, the first one held against the others; printed as a table."""
    from rich.table import Table

    settings = ("--num-problems", PROBLEMS, "--samples", 1, "--batch-size", PROBLEMS)
    models = _answer("evaluate", store, *words, *settings)["models"]
    table = Table("model", "greedy", "sampled", f"against {models[0]['name']}", box=None)
    for model in models:
        difference = model.get("difference")
        cells = ["", "", ""]
        cells[0] = f"{_accuracy(model):.3f}"
        cells[1] = f"{model['sampled']['accuracy']:.3f}"
        if difference is not None:
            low, high = difference["interval"]
            cells[2] = f"{difference['accuracy']:+.3f} [{low:+.3f}, {high:+.3f}]"
        table.add_row(model["name"], *cells)
    print_table(table)
    return models


def _typed(words: Sequence[str]) -> str:
    return shlex.join(["relexkit", *words])


def _headline(text: str) -> None:
    console().print(f"\n[bold]{text}[/bold]", highlight=False)
