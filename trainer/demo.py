"""``relexkit demo``: the whole story on a small model, from checkpoints to an honest table.

A run is made (``trainer.small_run``), recorded, analysed, extrapolated from its first half, and every model is evaluated on
problems that none of it saw. Each step is the ``relexkit`` command that is printed before it, called in this process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexkit import RelexkitError

if TYPE_CHECKING:
    from trainer.small_run import Progress, SmallRun

PRECISIONS = ("float32", "bfloat16")
_Z95 = 1.959964


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit demo``."""
    parser.add_argument("-o", "--out", type=Path, default=Path("demo-run"), metavar="DIR", help="default: demo-run")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of the run, at least 4 (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Run the demo as the command line asks for it."""
    if arguments.steps < 4:
        raise RelexkitError(f"--steps {arguments.steps} is too small; expected at least 4: half of them are extrapolated")
    from trainer.small_run import SmallRun

    began = time.monotonic()
    tell_story(arguments.out, SmallRun(steps=arguments.steps, seed=arguments.seed))
    print(f"\nAll of it lies in {arguments.out}/ and took {time.monotonic() - began:.0f} s.")


def tell_story(folder: Path, settings: SmallRun) -> dict[str, Any]:
    """Do everything in ``folder`` and print it. The run and the stores of a former call are kept and continued.

    Returns what ``summary.json`` holds: ``until``, ``targets``, ``models`` (name, precision, num_correct, accuracy,
    interval), ``comparisons`` of extrapolated models with others (difference, interval), and ``bytes`` of checkpoints and
    stores.

    Raises:
        RelexkitError: the folder holds a run with other settings, or a command failed.
    """
    until, targets = settings.steps // 2, [settings.steps, 2 * settings.steps]
    source = folder / "run"
    _headline(f"1. A run: {settings.steps} policy-gradient steps, each saved in float32 and in bfloat16")
    _obtain_run(source, settings)
    _headline("2. Record: two folders of checkpoints become two trajectory stores")
    for precision in PRECISIONS:
        _command("import", source / precision, "-o", folder / f"{precision}.zarr", "--base", source / "base")
    _headline("3. Look: is it a line, or a walk? And what does the stored precision hide?")
    for precision in PRECISIONS:
        _command("spectrum", folder / f"{precision}.zarr", "--scope", "module", "--plot", folder / "figures" / precision)
    _headline(f"4. Extrapolate: steps 1 to {until} predict step {targets[0]}, which was trained too, and step {targets[1]}")
    for precision in PRECISIONS:
        store, predicted = folder / f"{precision}.zarr", folder / "predicted" / precision
        _command("extrapolate", store, "--until", until, "--to", *targets, "-o", predicted)
    _headline(f"5. Go back: step {until} out of the bfloat16 store")
    recorded = folder / "checkout" / f"step-{until}"
    _command("checkout", folder / "bfloat16.zarr", "--step", until, "-o", recorded)
    num_bytes = check_identical(recorded, source / "bfloat16" / f"checkpoint-{until}")
    print(f"All {num_bytes:,} bytes of its tensors equal those of the original checkpoint.")
    _headline(f"6. Evaluate: greedy accuracy on {settings.num_held_out} problems that were held out")
    summary = _evaluate(folder, settings, until, targets)
    summary["bytes"] = {
        precision: {"checkpoints": folder_bytes(source / precision), "store": folder_bytes(folder / f"{precision}.zarr")}
        for precision in PRECISIONS
    }
    _write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    _print_summary(summary, folder)
    return summary


# -- steps ------------------------------------------------------------------------------------------------------------


def _obtain_run(folder: Path, settings: SmallRun) -> None:
    """The run in ``folder``: made under another name and renamed when complete, or there already."""
    if folder.exists():
        wanted = asdict(settings)
        try:
            found = json.loads((folder / "settings.json").read_text())
        except (OSError, ValueError):
            found = {}
        if found != wanted:
            other = ", ".join(
                f"{key} {found.get(key)} instead of {value}" for key, value in wanted.items() if found.get(key) != value
            )
            raise RelexkitError(f"{folder}: holds another run ({other}); remove {folder.parent} or choose another -o")
        print(f"{folder} is there already.")
        for derived in ("predicted", "checkout"):  # seconds of work; another version of relexkit may write them otherwise
            shutil.rmtree(folder.parent / derived, ignore_errors=True)
    else:
        from trainer.small_run import make_run

        temporary = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)  # a killed call may have left one
        try:
            with _progress() as progress:
                make_run(temporary, settings, progress)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    state = json.loads((folder / "float32" / f"checkpoint-{settings.steps}" / "trainer_state.json").read_text())
    rewards = [entry["reward"] for entry in state["log_history"]]
    fifth = max(1, len(rewards) // 5)
    informative = sum(entry["frac_reward_zero_std"] < 1 for entry in state["log_history"])
    print(
        f"Mean reward of sampled answers: {_mean(rewards[:fifth]):.2f} in the first {fifth} steps, "
        f"{_mean(rewards[-fifth:]):.2f} in the last {fifth}; {informative} of {len(rewards)} steps had a gradient."
    )


def _command(*words: object) -> None:
    """Print a command as one would type it, and run it in this process."""
    from relexkit.cli import main

    given = [str(word) for word in words]
    line = shlex.join(["relexkit", *given])
    print(f"\n$ {line}", flush=True)
    if main(given) != 0:
        raise RelexkitError(f"the demo ends here because this command failed: {line}")


def check_identical(folder: Path, original: Path) -> int:
    """Number of bytes in the tensors of a checkpoint, after comparing each, bit for bit, with the same one in ``original``.

    Raises:
        RelexkitError: names the tensors that only one of them has, or the first that differs.
    """
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(folder / "model.safetensors"), load_file(original / "model.safetensors")
    if ours.keys() != theirs.keys():
        raise RelexkitError(f"{folder}: only one of it and {original} has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    for name, tensor in theirs.items():
        found = ours[name]
        same = found.dtype == tensor.dtype and found.shape == tensor.shape
        # as bytes, because 0.0 == -0.0
        if not (same and torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))):
            raise RelexkitError(f"{folder}: tensor {name!r} differs from the one in {original}; expected the same bits")
    return sum(tensor.nbytes for tensor in theirs.values())


def _evaluate(folder: Path, settings: SmallRun, until: int, targets: Sequence[int]) -> dict[str, Any]:
    from trainer.small_run import greedy_correct, held_out_problems

    problems = held_out_problems(settings)
    names = {f"trained, step {step}": f"checkpoint-{step}" for step in (until, settings.steps)}
    predictions = {f"RELEX, {until} -> {target}": f"step-{target}" for target in targets}
    correct: dict[tuple[str, str], list[bool]] = {}
    jobs = [("base", precision, folder / "run" / "base") for precision in PRECISIONS]
    jobs += [(name, p, folder / "run" / p / place) for p in PRECISIONS for name, place in names.items()]
    jobs += [(name, p, folder / "predicted" / p / place) for p in PRECISIONS for name, place in predictions.items()]
    with _progress() as progress:
        for done, (name, precision, place) in enumerate(jobs, 1):
            correct[name, precision] = greedy_correct(place, problems)
            progress("evaluating", done, len(jobs))
    end = settings.steps
    pairs = [(f"RELEX, {until} -> {target}", f"trained, step {until}") for target in targets]
    pairs.append((f"RELEX, {until} -> {end}", f"trained, step {end}"))
    return {
        "until": until,
        "targets": list(targets),
        "models": [
            {
                "name": name, "precision": precision, "num_correct": sum(right), "num_problems": len(right),
                "accuracy": _mean(right), "interval": wilson_interval(sum(right), len(right)),
            }
            for (name, precision), right in correct.items()
        ],
        "comparisons": [
            {
                "name": name, "against": other, "precision": precision,
                **paired_difference(correct[name, precision], correct[other, precision]),
            }
            for precision in PRECISIONS
            for name, other in pairs
        ],
    }  # fmt: skip


def wilson_interval(num_correct: int, num_problems: int) -> tuple[float, float]:
    """95 % interval of an accuracy after Wilson, which stays sensible at 0 and 1."""
    share, spread = num_correct / num_problems, _Z95**2 / num_problems
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Difference of two accuracies on the same problems, with its 95 % interval.

    Problems that both models get right, or both wrong, say nothing about the difference: with ``b`` and ``c`` the numbers
    of problems that only the first and only the second gets right, the variance of ``(b - c) / n`` is
    ``(b + c - (b - c)^2 / n) / n^2``.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    num, net = len(first), only_first - only_second
    half = _Z95 * math.sqrt(only_first + only_second - net**2 / num) / num
    return {"difference": net / num, "interval": (net / num - half, net / num + half)}


# -- printing ---------------------------------------------------------------------------------------------------------


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if Console().is_terminal else Console(width=120)
    table = Table(title="Greedy accuracy [95 % interval]", title_justify="left", title_style="bold", box=None)
    table.add_column("model", no_wrap=True)
    for precision in PRECISIONS:
        table.add_column(f"{precision} checkpoints", justify="right", no_wrap=True)
    cells = {
        (m["name"], m["precision"]): f"{m['accuracy']:.3f} [{m['interval'][0]:.3f}, {m['interval'][1]:.3f}]"
        for m in summary["models"]
    }
    for name in dict.fromkeys(m["name"] for m in summary["models"]):
        table.add_row(name, *(cells[name, precision] for precision in PRECISIONS))
    console.print(table)
    print("The first column was recorded, extrapolated and evaluated in float32, the second one from bfloat16 files.\n")
    for comparison in summary["comparisons"]:
        print(verdict(comparison))
    print()
    for precision, sizes in summary["bytes"].items():
        ratio = sizes["checkpoints"] / sizes["store"]
        print(
            f"{precision}: {sizes['checkpoints'] / 1e6:.1f} MB of checkpoints, {sizes['store'] / 1e6:.1f} MB as a store "
            f"(1/{ratio:.1f}), base included."
        )
    print(f"Figures: {folder / 'figures'}. Numbers: {folder / 'summary.json'}.")


def verdict(comparison: dict[str, Any]) -> str:
    """One sentence that says who wins, by how much, and whether the problems suffice to tell."""
    low, high = comparison["interval"]
    word = "wins against" if low > 0 else "loses to" if high < 0 else "cannot be told from"
    return (
        f"{comparison['precision']}: {comparison['name']} {word} {comparison['against']} "
        f"({comparison['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _headline(text: str) -> None:
    from rich.console import Console

    Console(width=max(80, len(text) + 1)).print(f"\n[bold]{text}[/bold]", highlight=False)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on standard error, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:  # rich would still print an empty line
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True) as bar:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield progress
