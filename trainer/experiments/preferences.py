"""Preference pairs from rollouts: a right answer preferred to a wrong one to the same prompt (G2D,
arXiv 2605.21266).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relexkit import RelexkitError
from relexkit.extension import write_file
from relexkit.trainer.policy.sampling import stream_seed

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two rollouts of one prompt, of which ``chosen`` is right and ``rejected`` is wrong: texts,
    and token numbers.

    ``margin`` is how much larger the mean log-probability of a token is in the chosen one, under
    the policies that sampled them.
    """

    problem: str
    prompt: str
    chosen: str
    rejected: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float


@dataclass(frozen=True, kw_only=True)
class Informativeness:
    """What governs how much a set of rollouts teaches (G2D).

    Attributes:
        rollouts, prompts: how many, and of how many different prompts.
        mixed: prompts with right and wrong rollouts.
        pairs: preference pairs that were made.
        accuracy: share of right rollouts.
        accuracy_spread: standard deviation over prompts of their share of right rollouts.
        entropy: minus the mean log-probability of a token, an estimate of the policy's entropy at
            its temperature, in nats.
        margin: mean of the pairs' ``margin``; NaN without pairs.
    """

    rollouts: int
    prompts: int
    mixed: int
    pairs: int
    accuracy: float
    accuracy_spread: float
    entropy: float
    margin: float


def make_pairs(
    rollouts: pyarrow.Table,
    *,
    max_pairs_per_prompt: int = 4,
    max_length: int | None = None,
    difficulty: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> list[Pair]:
    """Pairs of right and wrong rollouts of the same prompt, over all steps together, in the order
    of the prompts.

    A prompt's distinct right and wrong completions are shuffled and paired one to one, so none is
    used twice.

    Args:
        rollouts: as ``trainer.loop.rollout_log.read_rollouts`` gives them.
        max_length: completions with more tokens are left out.
        difficulty: only prompts whose share of right rollouts lies in this closed interval.

    Raises:
        RelexkitError: there is no pair; the message says why.
    """
    pairs: list[Pair] = []
    by_prompt = _by_prompt(rollouts)
    mixed = within = 0
    for problem, rows in by_prompt.items():
        rate = float(np.mean([row["right"] for row in rows]))
        mixed += 0 < rate < 1
        if not (0 < rate < 1 and difficulty[0] <= rate <= difficulty[1]):
            continue
        within += 1
        fitting = [
            row for row in rows if max_length is None or len(row["completion_ids"]) <= max_length
        ]
        sides = []
        for right in (True, False):
            distinct = {
                tuple(row["completion_ids"]): row
                for row in reversed(fitting)
                if row["right"] is right
            }
            ordered = [distinct[key] for key in sorted(distinct)]
            random.Random(stream_seed(seed, (problem, right))).shuffle(ordered)
            sides.append(ordered[:max_pairs_per_prompt])
        pairs += [_pair(problem, *two) for two in zip(*sides, strict=False)]
    if not pairs:
        reason = (
            "every prompt is either always or never solved; take more steps, other problems, or"
            " fresh rollouts"
            if not mixed
            else (
                f"none of the {mixed} prompts with right and wrong rollouts is within the"
                f" difficulty {difficulty[0]:g} to {difficulty[1]:g}; widen it"
                if not within
                else (
                    f"no prompt has a right and a wrong completion of at most {max_length} tokens;"
                    " raise max_length"
                )
            )
        )
        raise RelexkitError(
            f"{len(rollouts)} rollouts of {len(by_prompt)} prompts give no preference pair:"
            f" {reason}"
        )
    return pairs


def informativeness(rollouts: pyarrow.Table, pairs: Sequence[Pair]) -> Informativeness:
    """The measures of a set of rollouts and the pairs made of them."""
    rates = [
        float(np.mean([row["right"] for row in rows])) for rows in _by_prompt(rollouts).values()
    ]
    tokens = rollouts.column("logprobs").combine_chunks().flatten().to_numpy()
    return Informativeness(
        rollouts=len(rollouts),
        prompts=len(rates),
        mixed=sum(0 < rate < 1 for rate in rates),
        pairs=len(pairs),
        accuracy=float(np.mean(rollouts.column("right").to_numpy(zero_copy_only=False))),
        accuracy_spread=float(np.std(rates)),
        entropy=-float(tokens.mean()) if len(tokens) else float("nan"),
        margin=float(np.mean([pair.margin for pair in pairs])) if pairs else float("nan"),
    )


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """The pairs in TRL's preference format, a JSON line each with ``prompt``, ``chosen`` and
    ``rejected``.
    """
    lines = [
        json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n"
        for pair in pairs
    ]
    write_file(path, "".join(lines).encode())


def _by_prompt(rollouts: pyarrow.Table) -> dict[str, list[dict[str, Any]]]:
    names = ["problem", "prompt", "text", "prompt_ids", "completion_ids", "logprobs", "right"]
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rollouts.select(names).to_pylist():
        by_prompt.setdefault(row["problem"], []).append(row)
    return by_prompt


def _pair(problem: str, right: dict[str, Any], wrong: dict[str, Any]) -> Pair:
    def mean(row: dict[str, Any]) -> float:
        return float(np.mean(row["logprobs"])) if row["logprobs"] else 0.0

    return Pair(
        problem=problem,
        prompt=right["prompt"],
        chosen=right["text"],
        rejected=wrong["text"],
        prompt_ids=right["prompt_ids"],
        chosen_ids=right["completion_ids"],
        rejected_ids=wrong["completion_ids"],
        margin=mean(right) - mean(wrong),
    )
