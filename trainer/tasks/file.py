"""Prompts and answers from files and folders of data, scored by rewards of ours or of the
user's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relexkit import RelexkitError
from relexkit.extension import say
from relexkit.trainer.tasks.answers import reference_answer
from relexkit.trainer.tasks.problems import Problem, Score, Split, Splits, split_fixed, without
from relexkit.trainer.tasks.rewards import RewardFunction, load_rewards, weighted
from relexkit.trainer.tasks.rows import read_rows, split_names


@dataclass(frozen=True)
class FileTask:
    """Problems of a file."""

    name: str
    splits: Splits
    functions: tuple[RewardFunction, ...]

    def problems(self, split: Split) -> list[Problem]:
        """Distinct prompts; none is in both of train and validation."""
        return self.splits.of(split)

    def reward(self, problem: Problem, completion: str) -> float:
        """The weighted sum of the functions."""
        return self.scores([problem], [completion])[0].reward

    def scores(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """The scores of several completions at once; the first function says what is right."""
        scores = []
        for parts in weighted(self.functions, problems, completions):
            reward = parts.pop("")
            assert reward is not None
            several = len(self.functions) > 1
            first = parts[self.functions[0].name] or 0.0
            scores.append(Score(reward, first, parts if several else {}))
        return scores


def make(
    path: str,
    split: str | None = None,
    validation: str | None = None,
    prompt: str = "prompt",
    answer: str = "answer",
    reference: str | None = None,
    system: str | None = None,
    reward: str | list[str] = "math",
    reward_weights: list[float] | None = None,
    num_validation: int | None = 200,
    seed: int = 0,
) -> FileTask:
    """A task from data with one problem a row.

    Args:
        path: ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet``, or a folder: one that
            ``datasets`` has saved, or one with Parquet files.
        split: of a folder with several.
        validation: a second file or folder, or another split of ``path``: its first
            ``num_validation`` problems are for validation, and its problems are taken out of the
            first one. Without it ``num_validation`` problems of ``path`` are set aside.
        prompt, answer, reference: names of the columns; a prompt is text or a list of chat
            messages. Of an answer with ``####`` or ``\\boxed`` only what follows or stands there
            counts.
        system: makes a prompt that is text a chat, with this system message unless it is empty.
        reward: ``math`` (equal as number, mathematics or text), ``exact`` (equal as text, blanks
            around it aside), ``FILE.py:FUNCTION`` or ``PACKAGE.MODULE:FUNCTION``, or a list of
            these; see ``trainer.tasks.rewards``. The first one says what is right.
        reward_weights: one for each.
        num_validation: None for all.

    Raises:
        RelexkitError: a file cannot be read, is empty, or lacks a column; a prompt or an answer is
            empty; a reward function cannot be called.
    """
    functions = load_rewards(reward, reward_weights)
    columns = _Columns(prompt, answer, reference, system, any(f.needs_answer for f in functions))
    place, name = Path(path), Path(path).name
    problems = _problems(place, split, columns)
    if validation is None:
        return FileTask(name, split_fixed(problems, num_validation, seed), functions)
    if place.is_dir() and validation in split_names(place):
        others = _problems(place, validation, columns)
    else:
        others = _problems(Path(validation), None, columns)
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
    return FileTask(name, Splits(train, without(others, [])[:num_validation]), functions)


@dataclass(frozen=True, slots=True)
class _Columns:
    prompt: str
    answer: str
    reference: str | None
    system: str | None
    needs_answer: bool


def _problems(path: Path, split: str | None, columns: _Columns) -> list[Problem]:
    rows = read_rows(path, split)
    if not rows:
        raise RelexkitError(f"{path}: holds no problems; expected one a row")
    label = path.name if split is None else f"{path.name}/{split}"
    return [
        _problem(f"{label}/{number}", f"{path}: row {number}", row, columns)
        for number, row in enumerate(rows, 1)
    ]


def _problem(key: str, where: str, row: Any, columns: _Columns) -> Problem:
    needed = [columns.prompt, *([columns.answer] if columns.needs_answer else [])]
    needed += [] if columns.reference is None else [columns.reference]
    for column in needed:
        if not isinstance(row, dict) or column not in row:
            has = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
            raise RelexkitError(f"{where} has no {column!r}; expected it in every row{has}")
    asked = _prompt(where, row[columns.prompt], columns)
    said = _text(where, columns.answer, row.get(columns.answer), columns.needs_answer)
    solution = None
    if columns.reference is not None and row[columns.reference] is not None:
        solution = str(row[columns.reference])
    answer = reference_answer(said) if columns.needs_answer else said
    if columns.needs_answer and not answer.strip():
        raise RelexkitError(
            f"{where}: {columns.answer} is empty; expected an answer, or a reward function of your"
            " own"
        )
    problem = Problem(key=key, prompt=asked, answer=answer, reference=solution, metadata=row)
    return problem if solution or answer == said else replace(problem, reference=said)


def _prompt(where: str, asked: Any, columns: _Columns) -> str | list[dict[str, str]]:
    if isinstance(asked, str) and asked:
        _encodable(where, columns.prompt, asked)
        if columns.system is None:
            return asked
        system = [{"role": "system", "content": columns.system}] if columns.system else []
        return [*system, {"role": "user", "content": asked}]
    if not (isinstance(asked, list) and asked and all(map(_is_message, asked))):
        raise RelexkitError(
            f"{where}: {columns.prompt} is {_shown(asked)}; expected text, or a list of messages"
            " with role and content"
        )
    for message in asked:
        _encodable(where, columns.prompt, message["content"])
    return [{"role": message["role"], "content": message["content"]} for message in asked]


def _text(where: str, column: str, value: Any, needed: bool) -> str:
    """An answer as text; one that JSON has as a number is written as Python writes it."""
    if isinstance(value, list | Mapping) or (isinstance(value, float) and not math.isfinite(value)):
        if needed:
            raise RelexkitError(f"{where}: {column} is {_shown(value)}; expected text or a number")
        return ""
    said = "" if value is None else str(value)
    _encodable(where, column, said)
    return said


def _encodable(where: str, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RelexkitError(
            f"{where}: {column} holds half of a surrogate pair at character {error.start + 1};"
            " expected whole characters"
        ) from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(part), str) for part in ("role", "content")
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
