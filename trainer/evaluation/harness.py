"""Steps of a store, recorded or predicted, as models of lm-evaluation-harness.

    python -m relexkit.trainer.evaluation.harness run --model relexkit
        --model_args store=run.zarr,step=50 --tasks gsm8k

is the harness's own command line with ``StoreLM`` among its models. Releases of the harness that
look for plug-ins (after 0.4.13) find it by themselves: ``lm_eval run --model relexkit ...``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from relexkit import Prediction, RelexkitError, TrajectoryStore, gram, predict_weights
from relexkit.extension import say
from relexkit.trainer.evaluation.intervals import Difference, mean_interval, paired_difference
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.policy.stored_model import StoredModel

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise RelexkitError(
        f"lm-evaluation-harness cannot be loaded ({error}); install relexkit[harness]"
    ) from error

_T = TypeVar("_T")
_Z95 = 1.959963984540054


@register_model("relexkit")
class StoreLM(HFLM):
    """A recorded or a predicted step of a store, loaded without a checkpoint folder.

    Everything else is the harness's ``hf`` model, and so are the numbers: those of the same weights
    in a folder. Memory: one model, and a second one where ``dtype`` is not float32.

    Args:
        store: path or URL.
        step: a recorded step, 0 for the base; give this or ``predict``.
        predict: the step to predict, by ``method`` from the recorded steps up to ``until``, its
            displacement multiplied by ``scale``, as ``relexkit extrapolate`` does.
        dtype, rounding, seed: round the weights as a written checkpoint would be; they compute in
            float32.
        device, trust_remote_code: where they compute; run the model's own code, not unless asked.
        options: those of ``hf``, such as ``batch_size``, ``max_length`` or ``add_bos_token``.

    Raises:
        RelexkitError: neither or both of ``step`` and ``predict`` are given, or the step cannot be
            had.
    """

    def __init__(
        self, store: str, step: int | None = None, predict: float | None = None, **options: Any
    ):
        if (step is None) == (predict is None):
            raise RelexkitError(
                f"model_args: step {step} and predict {predict}; expected one of them, as"
                " store=run.zarr,step=50 or store=run.zarr,predict=200,method=relex"
            )
        prediction = _taken(options, Prediction, ("method", "until", "scale"))
        loading = _taken(
            options, Loading, ("dtype", "rounding", "seed", "device", "trust_remote_code")
        )
        trajectory = TrajectoryStore(store)
        if predict is not None:
            weights = predict_weights(gram(trajectory), [predict], prediction)[0]
        stored = StoredModel(trajectory, loading)
        if step is not None:
            stored.put_step(int(step))
        else:
            stored.put(weights)
        super().__init__(pretrained=stored.model, tokenizer=stored.tokenizer, **options)
        self._store = trajectory

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's caches; the tokenizer itself was loaded from a temporary folder."""
        return str(self._store.path).replace("/", "__")


def _taken(options: dict[str, Any], kind: type[_T], names: Sequence[str]) -> _T:
    """A ``kind`` from the options that are its fields; these are removed from ``options``."""
    return kind(**{name: options.pop(name) for name in names if options.get(name) is not None})


@dataclass(frozen=True)
class Score:
    """One metric of a task.

    Attributes:
        task, metric: as the harness names them; ``metric`` has the filter behind a comma where
            there is one.
        value, interval: as reported, and its 95 % interval; None where the harness gives no error.
        value_N: of every document where ``value`` is their mean, else None.
    """

    task: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    value_N: np.ndarray | None

    def minus(self, other: Score) -> Difference | None:
        """Paired difference on the same documents, of values between 0 and 1."""
        if self.value_N is None or other.value_N is None or not _shares(self.value_N):
            return None
        return paired_difference(self.value_N, other.value_N)


class Harness:
    """Tasks of the harness that several models are evaluated on, one after the other.

    Args:
        tasks: names of tasks or groups.
        include_path: a folder with further task files.
        num_fewshot, limit, batch_size, apply_chat_template: as in the harness.

    Raises:
        RelexkitError: a task is unknown.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        batch_size: int = 1,
        apply_chat_template: bool = False,
    ):
        self._manager = _manager(tasks, include_path)
        self._tasks = self._manager.match_tasks(list(tasks))
        self._batch_size = batch_size
        self._options: dict[str, Any] = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "apply_chat_template": apply_chat_template,
        }

    def evaluate(self, model: Any, tokenizer: Any, named: dict[str, Any]) -> dict[str, Any]:
        """What the harness says of a model in memory: its results with samples. ``named`` is kept
        with them as the model's arguments.
        """
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._batch_size)
        results = simple_evaluate(
            lm,
            model_args=named,
            tasks=self._tasks,
            task_manager=self._manager,
            batch_size=self._batch_size,
            **self._options,
        )
        assert results is not None, "one process evaluates"
        return dict(results)


def _manager(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """An index that has every task. Indexing the harness's own thousands of files takes half a
    minute, so it is done only for tasks that ``include_path`` lacks.
    """
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    every = TaskManager(include_path=include_path)
    for name in tasks:
        if not every.match_tasks([name]):
            raise RelexkitError(
                f"task {name!r} is unknown to lm-evaluation-harness; expected one of `lm_eval ls"
                " tasks`, or --include-path with the folder of its file"
            )
    return every


def scores(results: dict[str, Any]) -> list[Score]:
    """Every metric of every task and group in the harness's results, with its interval."""
    return [
        score
        for task, metrics in results["results"].items()
        for score in _scores(task, metrics, results)
    ]


def _scores(task: str, metrics: dict[str, Any], results: dict[str, Any]) -> Iterator[Score]:
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        value_N = np.array(
            [
                sample[metric]
                for sample in results.get("samples", {}).get(task, [])
                if sample.get("filter") == chosen and isinstance(sample.get(metric), int | float)
            ],
            np.float64,
        )
        mean = len(value_N) > 0 and abs(value_N.mean() - value) < 1e-9
        error = metrics.get(f"{metric}_stderr,{chosen}")
        interval = None
        if mean and _shares(value_N):
            interval = mean_interval(value_N)
        elif isinstance(error, int | float):
            interval = (value - _Z95 * error, value + _Z95 * error)
        name = metric if chosen == "none" else key
        yield Score(task, name, float(value), interval, value_N if mean else None)


def _shares(value_N: np.ndarray) -> bool:
    return bool(((value_N >= 0) & (value_N <= 1)).all())


def keep(results: dict[str, Any], folder: Path, name: str) -> Path:
    """Write results and samples as the harness does, into ``folder/NAME``; returns the file.

    Raises:
        RelexkitError: they cannot be written.
    """
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name = name
    tracker.general_config_tracker.model_name_sanitized = re.sub(r"[^\w.]+", "-", name)
    summary = {key: value for key, value in results.items() if key != "samples"}
    tracker.save_results_aggregated(results=summary, samples=results["samples"])
    for task, samples in results["samples"].items():
        tracker.save_results_samples(task_name=task, samples=samples)
    place = folder / tracker.general_config_tracker.model_name_sanitized
    written = place / f"results_{tracker.date_id}.json"
    if not written.is_file():  # the harness has only logged why
        raise RelexkitError(f"{place}: the results could not be written; give another --output")
    return written


def main() -> None:
    """The command line of lm-evaluation-harness, which knows the model ``relexkit`` here."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except RelexkitError as error:
        say(f"relexkit: {error}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
