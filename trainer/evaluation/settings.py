"""What is asked of a model on a task, and what of it comes from the run that the model is of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from relexkit import RelexkitError
from relexkit.trainer.tasks import Split, Task, load_task

if TYPE_CHECKING:
    from relexkit.trainer.policy.sampling import Sampling
DEFAULT_LENGTH = 256
"""Tokens of a completion where neither the user nor a run says how many."""


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


def run_settings(place: str | Path) -> dict[str, Any]:
    """The configuration of the training run that a store, a folder of it, or its final model
    belongs to; empty where there is none.
    """
    path = Path(place)
    for folder in (path, path.parent):
        config = folder / "config.yaml"
        if config.is_file():
            try:
                found = yaml.safe_load(config.read_text())
            except (OSError, ValueError, yaml.YAMLError):
                return {}
            return found if isinstance(found, dict) else {}
    return {}


def chosen_task(given: str | None, place: str | Path, split: Split) -> Task:
    """The task that was asked for, as text of YAML, else that of the run at ``place``; checked
    before anything slow.

    Raises:
        RelexkitError: there is none, or it has no problems in ``split``.
    """
    if given is None:
        settings = run_settings(place).get("task")
        if settings is None:
            raise RelexkitError(
                f"{place}: belongs to no training run that says its task; expected --task"
            )
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


def chosen_length(given: int | None, place: str | Path) -> int:
    """Tokens of a completion: as asked for, else as in the run at ``place``, else 256."""
    if given is not None:
        return given
    return int(run_settings(place).get("max_completion_length", DEFAULT_LENGTH))
