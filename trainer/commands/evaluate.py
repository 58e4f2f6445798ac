"""The ``relexkit evaluate`` command: a folder, or steps of a store that were recorded or are
predicted, on one task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexkit import Prediction, RelexkitError
from relexkit.extension import print_json, print_table, progress_bar
from relexkit.trainer.commands import evaluate_harness
from relexkit.trainer.commands.trust import add_trust

if TYPE_CHECKING:
    from relexkit.extension import ProgressCallback
    from relexkit.trainer.evaluation.evaluate import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit evaluate``."""
    parser.add_argument(
        "model",
        metavar="MODEL_DIR|RUN.zarr",
        nargs="+",
        help="model folders, or one trajectory store",
    )
    parser.add_argument(
        "--task",
        help="a name, FILE.py:FUNCTION, or a mapping as in a configuration, in quotes"
        " (default: the task of the run)",
    )
    parser.add_argument(
        "--step",
        type=int,
        nargs="+",
        default=[],
        metavar="S",
        help="recorded steps of a store; 0 is the base",
    )
    parser.add_argument(
        "--to", type=float, nargs="+", default=[], metavar="STEP", help="predicted steps of a store"
    )
    parser.add_argument(
        "--until", type=int, metavar="T_CUT", help="predict from the steps up to this one"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=["relex"],
        metavar="M",
        help="as for extrapolate (default: relex)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply the predicted displacement (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="round weights",
    )
    parser.add_argument("--rounding", choices=("stochastic", "nearest"), default="stochastic")
    parser.add_argument(
        "--split",
        choices=("validation", "train", "all"),
        default="validation",
        help="problems of the task; all has the whole of a file (default: validation)",
    )
    parser.add_argument(
        "--num-problems", type=int, metavar="N", help="the first so many (default: all)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="S",
        help="sampled answers of each problem (default: 0)",
    )
    parser.add_argument(
        "--pass-at", type=int, nargs="+", default=[], metavar="K", help="pass@k from the samples"
    )
    parser.add_argument("--no-greedy", action="store_true", help="only sampled answers")
    parser.add_argument(
        "--max-completion-length",
        type=int,
        metavar="L",
        help="tokens (default: as in the run, else 256)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the samples (default: 1)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the samples, and of stochastic rounding (default: 0)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    evaluate_harness.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate every model alike, and each against the first one in pairs."""
    if arguments.harness:
        evaluate_harness.run(arguments, _models(arguments))
        return
    found = evaluate_models(arguments)
    if arguments.json:
        print_json(document(found, arguments))
    else:
        _print_evaluations(found, arguments.pass_at)


def evaluate_models(arguments: argparse.Namespace) -> dict[str, Evaluation]:
    """The evaluation of every model that the arguments name, by its name."""
    from relexkit.trainer.evaluation.evaluate import evaluate
    from relexkit.trainer.evaluation.settings import chosen_length, chosen_task

    task = chosen_task(arguments.task, arguments.model[0], arguments.split)
    arguments.max_completion_length = chosen_length(
        arguments.max_completion_length, arguments.model[0]
    )
    found: dict[str, Evaluation] = {}
    with progress_bar() as progress:
        for name, model, tokenizer in _models(arguments):
            found[name] = evaluate(
                model,
                tokenizer,
                task,
                split=arguments.split,
                num_problems=arguments.num_problems,
                samples=arguments.samples,
                greedy=not arguments.no_greedy,
                max_completion_length=arguments.max_completion_length,
                temperature=arguments.temperature,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                progress=_named(progress, name),
            )
    return found


def _named(progress: ProgressCallback, name: str) -> ProgressCallback:
    return lambda what, done, total: progress(f"{what} {name}", done, total)


def _models(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """Name, model and tokenizer of everything that was asked for; a store's model is loaded
    once.
    """
    import torch

    device = torch.device(
        "cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu"
    )
    if arguments.device == "cuda" and device.type == "cpu":
        raise RelexkitError(
            "--device cuda was asked for but PyTorch sees no GPU; give --device cpu"
        )
    if _is_store(arguments.model[0]):
        if len(arguments.model) > 1:
            raise RelexkitError(
                "only one store can be evaluated at a time; give one store, or model folders"
            )
        yield from _of_store(arguments, device)
        return
    if arguments.step or arguments.to or arguments.dtype != "float32":
        raise RelexkitError(
            f"{arguments.model[0]}: is not a store; --step, --to and --dtype need one: see also"
            " `round`"
        )
    from relexkit.trainer.policy.setup import load_model

    for folder in arguments.model:
        yield (
            folder,
            *load_model(folder, device, trust_remote_code=arguments.trust_remote_code),
        )


def _is_store(path: str) -> bool:
    return "://" in path or (Path(path) / "zarr.json").is_file()


def _of_store(arguments: argparse.Namespace, device: Any) -> Iterator[tuple[str, Any, Any]]:
    from relexkit import TrajectoryStore, gram, predict_weights
    from relexkit.extension import step_text
    from relexkit.trainer.policy.stored_model import StoredModel

    store = TrajectoryStore(arguments.model[0])
    if not arguments.step and not arguments.to:
        arguments.step = [0, *store.steps[-1:].tolist()]
    for step in filter(None, arguments.step):
        store.row_of(step)  # refuses one that is not recorded before anything slow
    stored = StoredModel(
        store,
        dtype=arguments.dtype,
        rounding=arguments.rounding,
        seed=arguments.seed,
        device=device,
        trust_remote_code=arguments.trust_remote_code,
    )
    for step in dict.fromkeys(arguments.step):
        stored.put_step(step)
        yield f"step {step}" if step else "base", stored.model, stored.tokenizer
    if not arguments.to:
        return
    observed = gram(store).until(arguments.until)
    for method in arguments.method:
        predicted = predict_weights(observed, arguments.to, Prediction(method=method))
        for target, weights in zip(arguments.to, predicted, strict=True):
            stored.put(arguments.scale * weights)
            yield (
                f"{method} {observed.steps[-1]} -> {step_text(target)}",
                stored.model,
                stored.tokenizer,
            )


def document(found: dict[str, Evaluation], arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints: every model's numbers, and its paired difference to the first one."""
    first = next(iter(found.values()))
    models = []
    for name, evaluation in found.items():
        entry = {"name": name, **evaluation.summary(arguments.pass_at)}
        if evaluation is not first:
            difference = evaluation.minus(first)
            entry["difference"] = {
                "accuracy": difference.difference,
                "interval": list(difference.interval),
            }
        models.append(entry)
    named = ("split", "seed", "temperature", "max_completion_length", "dtype", "rounding")
    settings = {key: getattr(arguments, key) for key in named}
    return {"task": first.task, **settings, "models": json.loads(json.dumps(models))}


def _print_evaluations(found: dict[str, Evaluation], pass_at: list[int]) -> None:
    """A row for each model: accuracies with intervals, pass@k, and the paired difference to the
    first one.
    """
    from rich.table import Table

    first_name, first = next(iter(found.items()))
    kinds = [
        kind
        for kind, there in (("greedy", len(first.greedy_N)), ("sampled", first.num_samples))
        if there
    ]
    title = f"{first.task}: {len(first.keys)} {first.split} problems, accuracy [95 % interval]"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, header_style="bold"
    )
    table.add_column("model", no_wrap=True)
    for heading in (
        *kinds,
        *(f"pass@{k}" for k in pass_at),
        "length",
        f"{kinds[0]} against {first_name}",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, evaluation in found.items():
        cells = []
        for kind in kinds:
            value, interval = (
                (evaluation.accuracy, evaluation.interval)
                if kind == "greedy" or len(kinds) == 1
                else (evaluation.sampled_accuracy, evaluation.sampled_interval)
            )
            cells.append(_with_interval(value, interval))
        cells += [_with_interval(*evaluation.pass_at(k)) for k in pass_at]
        cells.append(f"{evaluation.mean_length:.1f}")
        difference = evaluation.minus(first)
        low, high = difference.interval
        cells.append(
            "" if evaluation is first else f"{difference.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
        table.add_row(name, *cells)
    print_table(table)


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
