"""The ``relexkit evaluate`` command: a folder, or steps of a store that were recorded or are
predicted, on one task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexkit import Prediction, RelexkitError, Table
from relexkit.extension import print_json, print_table, progress_bar
from relexkit.options import Json, Wide, group, option
from relexkit.trainer.commands import evaluate_harness
from relexkit.trainer.commands.evaluate_harness import HarnessOptions
from relexkit.trainer.evaluation.settings import EvaluationSettings, chosen_length, chosen_task
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.tasks import Task

if TYPE_CHECKING:
    from relexkit.extension import ProgressCallback
    from relexkit.trainer.evaluation.evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class OnTask(Json):
    """Settings of an evaluation that default to those of the run."""

    task: str | None = None
    """a name, FILE.py:FUNCTION, or a mapping as in a configuration, in quotes (default: the task of
    the run)"""
    max_completion_length: int | None = None
    """tokens of an answer (default: as in the run, else 256)"""

    def chosen(self, place: str, settings: EvaluationSettings) -> tuple[Task, EvaluationSettings]:
        """The task, checked before anything slow, and the settings with the length of answers.

        Raises:
            RelexkitError: there is no such task, or it has no problems in the split.
        """
        task = chosen_task(self.task, place, settings.split)
        length = chosen_length(self.max_completion_length, place)
        return task, replace(settings, max_completion_length=length)


@dataclass(frozen=True, kw_only=True)
class Options(OnTask, Wide):
    """Options of ``relexkit evaluate``."""

    model: tuple[str, ...] = option("model", metavar="MODEL_DIR|RUN.zarr")
    """model folders, or one trajectory store"""
    step: tuple[int, ...] = option(default=(), metavar="S")
    """recorded steps of a store; 0 is the base (default: the base and the last one)"""
    to: tuple[float, ...] = option(default=(), metavar="STEP")
    """predicted steps of a store"""
    method: tuple[str, ...] = option(default=("relex",), metavar="M")
    """how to predict, as for extrapolate"""
    prediction: Prediction = group(Prediction, "until", "scale")
    settings: EvaluationSettings = group(
        EvaluationSettings,
        "split",
        "num_problems",
        "samples",
        "greedy",
        "temperature",
        "seed",
        "batch_size",
    )
    pass_at: tuple[int, ...] = option(default=(), metavar="K")
    """pass@k from the samples"""
    loading: Loading = group(Loading, "dtype", "rounding", "device", "trust_remote_code")
    harness: HarnessOptions = group(
        HarnessOptions, heading="lm-evaluation-harness (needs relexkit[harness])"
    )


def answer(options: Options) -> Table:
    """Every model's numbers, and its paired difference to the first one."""
    if options.harness.tasks:
        return evaluate_harness.answer(options.harness, _models(options), _told(options))
    comparison = document(evaluate_models(options), options)
    rows = [
        {
            "model": m["name"],
            "problems": m["num_problems"],
            "accuracy": kind["accuracy"],
            "low": kind["interval"][0],
            "high": kind["interval"][1],
            "difference": m.get("difference", {}).get("accuracy"),
            "difference_low": m.get("difference", {}).get("interval", [None])[0],
            "difference_high": m.get("difference", {}).get("interval", [None])[-1],
        }
        for m in comparison["models"]
        for kind in [m.get("greedy") or m["sampled"]]
    ]
    return Table(
        comparison, rows, [f"{comparison['task']}, {comparison['split']} problems, 95 % intervals."]
    )


def run(options: Options) -> None:
    """Evaluate every model alike, and each against the first one in pairs."""
    if options.harness.tasks:
        evaluate_harness.run(
            options.harness, _models(options), _told(options), as_json=options.json
        )
        return
    evaluations = evaluate_models(options)
    if options.json:
        print_json(document(evaluations, options))
    else:
        print_evaluations(evaluations, options.pass_at, wide=options.wide)


def _told(options: Options) -> dict[str, Any]:
    """What the harness keeps with its results."""
    return {
        "source": list(options.model),
        "scale": options.prediction.scale,
        "dtype": options.loading.dtype,
        "rounding": options.loading.rounding,
        "seed": options.settings.seed,
        "batch_size": options.settings.batch_size,
    }


def evaluate_models(options: Options) -> dict[str, Evaluation]:
    """The evaluation of every model that the options name, by its name."""
    from relexkit.trainer.evaluation.evaluate import evaluate

    task, settings = options.chosen(options.model[0], options.settings)
    evaluations: dict[str, Evaluation] = {}
    with progress_bar() as progress:
        for name, model, tokenizer in _models(options):
            told = _named(progress, name)
            evaluations[name] = evaluate(model, tokenizer, task, settings, progress=told)
    return evaluations


def _named(progress: ProgressCallback, name: str) -> ProgressCallback:
    return lambda what, done, total: progress(f"{what} {name}", done, total)


def _models(options: Options) -> Iterator[tuple[str, Any, Any]]:
    """Name, model and tokenizer of everything that was asked for; a store's model is loaded
    once.
    """
    from relexkit.trainer.policy.setup import choose_device, load_model

    device = choose_device(options.loading)
    if _is_store(options.model[0]):
        if len(options.model) > 1:
            raise RelexkitError(
                "only one store can be evaluated at a time; give one store, or model folders"
            )
        yield from _of_store(options)
        return
    if options.step or options.to or options.loading.dtype != "float32":
        raise RelexkitError(
            f"{options.model[0]}: is not a store; --step, --to and --dtype need one: see also"
            " `round`"
        )
    for folder in options.model:
        trusted = options.loading.trust_remote_code
        yield (folder, *load_model(folder, device, trust_remote_code=trusted))


def _is_store(path: str) -> bool:
    return "://" in path or (Path(path) / "zarr.json").is_file()


def _of_store(options: Options) -> Iterator[tuple[str, Any, Any]]:
    from relexkit import TrajectoryStore, gram, predict_weights
    from relexkit.extension import less_than_asked, say, step_text
    from relexkit.trainer.policy.stored_model import StoredModel

    store = TrajectoryStore(options.model[0])
    steps = options.step
    if not steps and not options.to:
        steps = (0, *store.steps[-1:].tolist())
    for step in filter(None, steps):
        store.row_of(step)  # refuses one that is not recorded before anything slow
    unseen = [target for target in options.to if target not in steps]  # others are compared
    for line in less_than_asked(store, [options.prediction], unseen):
        say(line)
    stored = StoredModel(store, replace(options.loading, seed=options.settings.seed))
    for step in dict.fromkeys(steps):
        stored.put_step(step)
        yield f"step {step}" if step else "base", stored.model, stored.tokenizer
    if not options.to:
        return
    observed = gram(store).until(options.prediction.until)
    for method in options.method:
        predicted = predict_weights(
            observed, list(options.to), replace(options.prediction, method=method, until=None)
        )
        for target, weights in zip(options.to, predicted, strict=True):
            stored.put(weights)
            name = f"{method} {observed.steps[-1]} -> {step_text(target)}"
            yield name, stored.model, stored.tokenizer


def document(evaluations: dict[str, Evaluation], options: Options) -> dict[str, Any]:
    """What ``--json`` prints: every model's numbers, and its paired difference to the first one."""
    first = next(iter(evaluations.values()))
    models = []
    for name, evaluation in evaluations.items():
        entry = {"name": name, **evaluation.summary(options.pass_at)}
        if evaluation is not first:
            difference = evaluation.minus(first)
            entry["difference"] = {
                "accuracy": difference.difference,
                "interval": list(difference.interval),
            }
        models.append(entry)
    asked = ("split", "seed", "temperature", "max_completion_length")
    settings = {key: getattr(first, key) for key in asked}
    settings |= {key: getattr(options.loading, key) for key in ("dtype", "rounding")}
    return {"task": first.task, **settings, "models": json.loads(json.dumps(models))}


def print_evaluations(
    evaluations: dict[str, Evaluation], pass_at: Sequence[int], *, wide: bool = False
) -> None:
    """A row for each model: accuracies with intervals, pass@k, and the paired difference to the
    first one.
    """
    from rich.table import Table

    first = next(iter(evaluations.values()))
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
    passes = [f"pass@{k}" for k in pass_at]
    for heading in (*kinds, *passes, "length", f"{kinds[0]} against first"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, evaluation in evaluations.items():
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
    print_table(table, least=("length", *kinds[1:], *passes[::-1]), wide=wide)


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
