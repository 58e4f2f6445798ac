"""What a command that evaluates takes from the run that it is given: task and length of
completions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from relexkit import RelexkitError
from relexkit.trainer.tasks import Split, Task, load_task

DEFAULT_LENGTH = 256
"""Tokens of a completion where neither the user nor a run says how many."""


def run_settings(place: str | Path) -> dict[str, Any]:
    """The configuration of the training run that a store, a folder of it, or its final model
    belongs
    to; empty where there is none.
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
    before
    anything slow.

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
