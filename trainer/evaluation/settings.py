"""How a model is evaluated on a task, and which of these settings its training run gives. Task and
length of completions are kept in the run's folder and also in its store, which may have been moved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from relexkit import RelexkitError, StoreError, TrajectoryStore
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.tasks import Split, Task, code_named, load_task

if TYPE_CHECKING:
    from relexkit.trainer.policy.sampling import Sampling

DEFAULT_LENGTH = 256
"""Tokens of a completion where neither the user nor a run says how many."""

KEPT = "training_task.json"
"""The file of a store that says what it was trained on; written checkpoints have it too."""

_OPTIONS = {"task": "--task", "max_completion_length": "--max-completion-length"}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Which problems a model answers, how often, and how.

    Raises:
        RelexkitError: nothing is asked for.
    """

    split: Split = "validation"
    """problems of the task; all has the whole of a file"""
    num_problems: int | None = None
    """the first so many (default: all)"""
    samples: int = 0
    """sampled answers of each problem"""
    greedy: bool = True
    """only sampled answers"""
    max_completion_length: int = DEFAULT_LENGTH
    """tokens of an answer"""
    temperature: float = 1.0
    """of the samples"""
    top_k: int | None = None
    """sample among the most likely tokens only (default: all)"""
    top_p: float | None = None
    """sample among the most likely tokens of this total probability (default: all)"""
    seed: int = 0
    """of the samples"""
    batch_size: int = 64
    """answers that are generated at once"""

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to evaluate."""
        none = self.samples == 0 and not self.greedy
        if self.samples < 0 or none or (self.num_problems is not None and self.num_problems < 1):
            raise RelexkitError(
                f"num_problems {self.num_problems}, samples {self.samples}, greedy {self.greedy}:"
                " leave nothing to evaluate; ask for an answer"
            )

    def sampling(self, temperature: float) -> Sampling:
        """How an answer is drawn, 0 for the most likely one."""
        from relexkit.trainer.policy.sampling import Sampling

        return Sampling(
            max_completion_length=self.max_completion_length,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def kept_files(config: GRPOConfig) -> dict[str, bytes]:
    """The file of a new store from which ``run_setting`` reads."""
    content = {name: getattr(config, name) for name in _OPTIONS}
    return {KEPT: json.dumps(content, indent=2).encode()}


def run_setting(place: str | Path, name: str) -> Any:
    """``task`` or ``max_completion_length`` of the training that a store, its folder, its final
    model or a written checkpoint belongs to; None where nothing says it.

    Raises:
        RelexkitError: the folder says something else than the store.
    """
    beside, kept = _beside(place).get(name), _kept(place).get(name)
    if beside is None or kept is None:
        return kept if beside is None else beside
    if kept != beside:
        raise RelexkitError(
            f"{place}: was trained with {name} {kept}, but lies in the folder of a run with"
            f" {beside}; give {_OPTIONS[name]}"
        )
    return beside


def chosen_task(given: str | None, place: str | Path, split: Split) -> Task:
    """The task that was asked for, as text of YAML, else that of the run at ``place``; checked
    before anything slow.

    Raises:
        RelexkitError: there is none, it is code and only a store names it, or it has no problems in
            ``split``.
    """
    if given is None:
        settings = run_setting(place, "task")
        if settings is None:
            raise RelexkitError(
                f"{place}: belongs to no training run that names its task; expected --task"
            )
        if _beside(place).get("task") is None:
            _refuse_code(place, settings)
    else:
        try:
            settings = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise RelexkitError(
                f"--task {given!r} is no YAML ({' '.join(str(error).split())}); expected a name, or"
                " a mapping such as {name: file, path: test.jsonl}"
            ) from None
    if not isinstance(settings, str | dict):
        raise RelexkitError(
            f"--task {given!r} names no task; expected a name, or a mapping such as"
            " {name: file, path: test.jsonl}"
        )
    return load_task(settings, needed=(split,))


def chosen_length(given: int | None, place: str | Path, otherwise: int = DEFAULT_LENGTH) -> int:
    """Tokens of a completion: as asked for, else as in the run at ``place``, else ``otherwise``."""
    if given is not None:
        return given
    return run_setting(place, "max_completion_length") or otherwise


def as_asked(prompt: str, place: str | Path) -> str | list[dict[str, str]]:
    """A prompt with the system message of the training at ``place``, if its task has one."""
    task = run_setting(place, "task")
    if not isinstance(task, dict) or not isinstance(task.get("system"), str):
        return prompt
    system = [{"role": "system", "content": task["system"]}] if task["system"] else []
    return [*system, {"role": "user", "content": prompt}]


def _beside(place: str | Path) -> dict[str, Any]:
    """The configuration in a run's folder or beside what lies in it; empty where there is none."""
    path = Path(place)
    for folder in (path, path.parent):
        config = folder / "config.yaml"
        if config.is_file():
            try:
                return _known(yaml.safe_load(config.read_text()))
            except (OSError, ValueError, yaml.YAMLError):
                return {}
    return {}


def _kept(place: str | Path) -> dict[str, Any]:
    """What a store, or a checkpoint that was written from one, says itself."""
    try:
        if "://" in str(place) or (Path(place) / "zarr.json").is_file():
            return _known(json.loads(TrajectoryStore(place).files().get(KEPT, b"{}")))
        path = Path(place) / KEPT
        return _known(json.loads(path.read_bytes())) if path.is_file() else {}
    except (OSError, ValueError, RecursionError, StoreError):
        return {}  # what is damaged is said when it is opened


def _known(settings: Any) -> dict[str, Any]:
    """The settings of ``settings`` that have a valid type; None in place of the others."""
    if not isinstance(settings, dict):
        return {}
    task, length = settings.get("task"), settings.get("max_completion_length")
    return {
        "task": task if isinstance(task, str | dict) else None,
        "max_completion_length": length if type(length) is int and length > 0 else None,
    }


def _refuse_code(place: str | Path, task: str | dict[str, Any]) -> None:
    named = code_named(task)
    if named is None:
        return
    path = named.rpartition(":")[0]
    gone = f" (there is no {path} here)" if path.endswith(".py") and not Path(path).exists() else ""
    raise RelexkitError(
        f"{place}: its task is code, {named}{gone}, which is not run just because a store names"
        " it; expected --task"
    )
