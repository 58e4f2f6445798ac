"""Prompts and answers from a JSON Lines or Parquet file, scored by ``math-verify`` or by the user's own function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relexkit import RelexkitError
from trainer.tasks import Problem, Split, Splits, load_function, split_problems

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
        prompt, answer, reference: names of the columns; a prompt is text or a list of chat messages.
        reward: ``math`` (equal as mathematics), ``exact`` (equal as text, blanks around it aside), or ``FILE.py:FUNCTION``,
            called as ``function(completion, answer, row)`` with the row as a dictionary.

    Raises:
        RelexkitError: the file cannot be read, is empty, or lacks a column.
    """
    rows = _read_rows(Path(path))
    if not rows:
        raise RelexkitError(f"{path}: holds no problems; expected one a row")
    problems = []
    for number, row in enumerate(rows, 1):
        for column in (prompt, answer, *((reference,) if reference else ())):
            if not isinstance(row, dict) or column not in row:
                raise RelexkitError(f"{path}: row {number} has no {column!r}; expected it in every row")
        solution = str(row[reference]) if reference else None
        key = f"{Path(path).name}/{number}"
        problems.append(Problem(key=key, prompt=row[prompt], answer=str(row[answer]), reference=solution, metadata=row))
    name = Path(path).name
    return FileTask(name, split_problems(problems, num_validation, seed, name), _comparison(reward))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise RelexkitError(f"{path}: cannot be read ({error}); expected JSON Lines or Parquet") from None


def _comparison(reward: str) -> Reward:
    if reward == "exact":
        return lambda completion, problem: float(completion.strip() == problem.answer.strip())
    if reward == "math":
        return _equal_as_mathematics
    if ".py:" in reward:
        function = load_function(reward)
        return lambda completion, problem: function(completion, problem.answer, dict(problem.metadata))
    raise RelexkitError(f"reward {reward!r} is unknown; expected math, exact or FILE.py:FUNCTION")


def _equal_as_mathematics(completion: str, problem: Problem) -> float:
    if completion.strip() == problem.answer.strip():
        return 1.0
    from math_verify import parse, verify

    # its time limits are signals, which only the main thread can receive
    limit: Any = 5 if threading.current_thread() is threading.main_thread() else None
    expected = parse(problem.answer, parsing_timeout=limit) or parse(f"${problem.answer}$", parsing_timeout=limit)
    if not expected:
        raise ValueError(f"the answer {problem.answer!r} is not mathematics; expected a number or LaTeX, or reward: exact")
    return float(verify(expected, parse(completion, parsing_timeout=limit), timeout_seconds=limit))
