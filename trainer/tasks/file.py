"""Prompts and answers from a JSON Lines or Parquet file, scored by ``math-verify`` or by the user's
own function.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relexkit import RelexkitError
from relexkit.extension import say
from trainer.tasks.mathematics import equal_as_mathematics
from trainer.tasks.problems import Problem, Split, Splits, load_function, split_fixed, without

Reward = Callable[[str, Problem], float]


@dataclass(frozen=True)
class FileTask:
    """Problems of a file."""

    name: str
    splits: Splits
    compare: Reward

    def problems(self, split: Split) -> list[Problem]:
        """Distinct prompts; none is in both splits."""
        return self.splits.of(split)

    def reward(self, problem: Problem, completion: str) -> float:
        """As the comparison says."""
        return self.compare(completion, problem)


def make(
    path: str,
    validation: str | None = None,
    prompt: str = "prompt",
    answer: str = "answer",
    reference: str | None = None,
    reward: str = "math",
    num_validation: int = 200,
    seed: int = 0,
) -> FileTask:
    """A task from a file with one problem a row.

    Args:
        path: ``.jsonl`` or ``.parquet``.
        validation: a second file, whose first ``num_validation`` problems are for validation and
            whose problems are taken out of the first one; without it ``num_validation`` problems of
            the first one are set aside.
        prompt, answer, reference: names of the columns; a prompt is text or a list of chat
            messages.
        reward: ``math`` (equal as mathematics), ``exact`` (equal as text, blanks around it aside),
            or ``FILE.py:FUNCTION``, called as ``function(completion, answer, row)`` with the row as
            a dictionary.

    Raises:
        RelexkitError: a file cannot be read, is empty, or lacks a column; a prompt or an answer is
            empty.
    """
    compare, columns = _comparison(reward), (prompt, answer, reference)
    needs_answer, name = ".py:" not in reward, Path(path).name
    problems = _problems(Path(path), columns, needs_answer)
    if validation is None:
        return FileTask(name, split_fixed(problems, num_validation, seed, name), compare)
    others = _problems(Path(validation), columns, needs_answer)
    train = without(problems, others)
    if not train:
        raise RelexkitError(
            f"{path}: every problem is in {validation} too; expected some for training alone"
        )
    distinct = len(without(problems, []))
    if len(train) < distinct:
        say(
            f"{path}: {distinct - len(train)} of {distinct} problems are in {validation} too and"
            " are left out of training"
        )
    return FileTask(name, Splits(train, without(others, [])[:num_validation]), compare)


def _problems(
    path: Path, columns: tuple[str, str, str | None], needs_answer: bool
) -> list[Problem]:
    rows = _read_rows(path)
    if not rows:
        raise RelexkitError(f"{path}: holds no problems; expected one a row")
    return [
        _problem(f"{path.name}/{number}", f"{path}: row {number}", row, columns, needs_answer)
        for number, row in enumerate(rows, 1)
    ]


def _problem(
    key: str, where: str, row: Any, columns: tuple[str, str, str | None], needs_answer: bool
) -> Problem:
    prompt, answer, reference = columns
    for column in (prompt, answer, reference):
        if not isinstance(row, dict) or (column is not None and column not in row):
            raise RelexkitError(f"{where} has no {column!r}; expected it in every row")
    asked = row[prompt]
    if not (isinstance(asked, str) and asked) and not (
        isinstance(asked, list) and asked and all(map(_is_message, asked))
    ):
        raise RelexkitError(
            f"{where}: {prompt} is {asked!r}; expected text, or a list of messages with role and"
            " content"
        )
    said = "" if row[answer] is None else str(row[answer])
    if needs_answer and not said.strip():
        raise RelexkitError(
            f"{where}: {answer} is empty; expected an answer, or a reward function of your own"
        )
    solution = None if reference is None or row[reference] is None else str(row[reference])
    return Problem(key=key, prompt=asked, answer=said, reference=solution, metadata=row)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(part), str) for part in ("role", "content")
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise RelexkitError(
            f"{path}: cannot be read ({error}); expected JSON Lines or Parquet"
        ) from None


def _comparison(reward: str) -> Reward:
    if reward == "exact":
        return lambda completion, problem: float(completion.strip() == problem.answer.strip())
    if reward == "math":
        return lambda completion, problem: float(equal_as_mathematics(completion, problem.answer))
    if ".py:" in reward:
        function = load_function(reward)
        return lambda completion, problem: function(
            completion, problem.answer, dict(problem.metadata)
        )
    raise RelexkitError(f"reward {reward!r} is unknown; expected math, exact or FILE.py:FUNCTION")
