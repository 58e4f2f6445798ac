"""Any data set of ``reasoning_gym``, with its own scorer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from relexkit import RelexkitError
from relexkit.trainer.tasks.answers import tag_content
from relexkit.trainer.tasks.numerals import last_number
from relexkit.trainer.tasks.problems import Problem, Split, Splits, split_drawn


@dataclass(frozen=True)
class Gym:
    """Problems of one data set; rewards are those of its scorer."""

    name: str
    dataset: Any
    splits: Splits
    extract: str

    def problems(self, split: Split) -> list[Problem]:
        """Distinct questions; none is in both splits."""
        return self.splits.of(split)

    def reward(self, problem: Problem, completion: str) -> float:
        """The scorer's mark, 0 to 1, for the answer that the completion gives."""
        return float(
            self.dataset.score_answer(
                answer=extracted(completion, self.extract), entry=dict(problem.metadata)
            )
        )


def make(
    dataset: str,
    num_train: int = 2000,
    num_validation: int = 200,
    seed: int = 0,
    instruction: str = "",
    extract: Literal["whole", "tag", "number"] = "whole",
    options: dict[str, Any] | None = None,
) -> Gym:
    """A task from ``reasoning_gym``.

    Args:
        dataset: its name there, such as ``chain_sum``.
        instruction: added to every question, such as "Answer with just the number."
        extract: the answer is the ``whole`` completion, what stands in its last ``<answer>`` tag,
            or its last ``number``.
        options: of the data set, such as its difficulty.

    Raises:
        RelexkitError: the data set or an option of it is unknown, or it has too few different
            questions.
    """
    import reasoning_gym

    if extract not in ("whole", "tag", "number"):
        raise RelexkitError(
            f"task 'reasoning_gym': extract {extract!r} is unknown; expected whole, tag or number"
        )
    most = 20 * (num_train + num_validation)
    try:
        data = reasoning_gym.create_dataset(dataset, size=most, seed=seed, **(options or {}))
    except (ValueError, TypeError, AssertionError) as error:
        near = difflib.get_close_matches(dataset, reasoning_gym.factory.DATASETS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near and dataset not in near else ""
        raise RelexkitError(
            f"task 'reasoning_gym': data set {dataset!r} cannot be made ({error}){hint}"
        ) from None

    def draw() -> Iterator[Problem]:
        for index in range(most):
            entry = data[index]
            yield Problem(
                key=f"{dataset}/{seed}/{index}",
                prompt=f"{entry['question']} {instruction}".strip(),
                answer=str(entry["answer"]),
                metadata=entry,
            )

    return Gym(
        dataset, data, split_drawn(draw(), num_train, num_validation, seed, dataset), extract
    )


def extracted(completion: str, how: str) -> str | None:
    """The answer in a completion, None if there is none."""
    if how == "whole":
        return completion.strip()
    return tag_content(completion) if how == "tag" else last_number(completion)
