"""Successive halving among models on common problems: those that are clearly behind stop early, and
the others go on to fresh problems.

Every candidate answers the first eighth of the problems, a third of them the next eighth, a ninth
the next quarter (those equal to the last of these go on too), and one the last half; the baseline,
the last observed step, answers all. What
decides is the mean over common problems, so luck with the problems cancels. The last half is fresh
for the one candidate that reaches it: nothing was chosen on it, so its paired interval against the
baseline means what it says (Jamieson and Talwalkar 2016 for the scheme).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from relexkit.trainer.evaluation.intervals import Difference, mean_interval, paired_difference

Answer = Callable[[int, int, int], np.ndarray]
"""``(candidate, begin, end) -> values between 0 and 1 of problems begin:end``; candidate -1 is the
baseline.
"""

BASELINE = -1
_EIGHTHS = (1, 2, 4, 8)  # ends of the rungs, in eighths of the problems
_KEEP = 3  # one of so many goes on to the next rung


@dataclass(frozen=True)
class Standing:
    """What a candidate scored before it stopped.

    Attributes:
        values: of the problems it answered, the first so many.
        accuracy, interval: their mean with its 95 % interval.
        against: paired difference to the baseline on these problems; chosen among many, so the best
            ones look too good.
        tied: it had the winner's mean when the winner alone went on.
    """

    values: np.ndarray
    accuracy: float
    interval: tuple[float, float]
    against: Difference
    tied: bool = False


@dataclass(frozen=True)
class Race:
    """The outcome for C candidates.

    Attributes:
        baseline: what the baseline scored on all problems.
        standings: of every candidate, in their order.
        winner: index of the candidate that reached the last rung.
        fresh: its paired difference to the baseline on the last rung, on whose problems nothing was
            chosen.
        num_answers, full_answers: problems answered by candidates and baseline, and what the full
            grid would have taken.
    """

    baseline: Standing
    standings: tuple[Standing, ...]
    winner: int
    fresh: Difference
    num_answers: int
    full_answers: int


def race(num_candidates: int, num_problems: int, answer: Answer, *, halving: bool = True) -> Race:
    """Run the race; without ``halving`` every candidate answers everything (the full grid), and the
    winner is the best on it.

    ``num_candidates`` is at least 1, ``num_problems`` at least 16.
    """
    ends = [num_problems * eighths // 8 for eighths in _EIGHTHS] if halving else [num_problems]
    seen: dict[int, list[np.ndarray]] = {index: [] for index in range(BASELINE, num_candidates)}
    alive = list(range(num_candidates))
    begin, begin_last, num_answers = 0, 0, 0
    tied: list[int] = []
    for rung, end in enumerate(ends):
        for index in (BASELINE, *alive):
            seen[index].append(np.asarray(answer(index, begin, end), np.float64))
            num_answers += end - begin
        begin, begin_last = end, begin
        if rung + 1 < len(ends):
            wanted = (
                1
                if rung + 2 == len(ends)
                else max(1, math.ceil(num_candidates / _KEEP ** (rung + 1)))
            )
            before, alive = alive, _leaders(seen, alive, wanted, ties=rung + 2 < len(ends))
            if rung + 2 == len(ends):
                tied = [
                    index for index in _leaders(seen, before, 1, ties=True) if index != alive[0]
                ]
    values = {index: np.concatenate(parts) for index, parts in seen.items()}
    winner = _leaders(seen, alive, 1)[0]
    base = values[BASELINE]
    fresh = paired_difference(values[winner][begin_last:], base[begin_last:])
    standings = tuple(
        _standing(values[index], base, index in tied) for index in range(num_candidates)
    )
    return Race(
        _standing(base, base),
        standings,
        winner,
        fresh,
        num_answers,
        num_problems * (num_candidates + 1),
    )


def _leaders(
    seen: dict[int, list[np.ndarray]], alive: Sequence[int], count: int, *, ties: bool = False
) -> list[int]:
    """The best ``count`` of those alive, all of whom answered the same problems, less those surely
    behind the best; with ``ties`` also all that are equal to the last of them.
    """
    values = {index: np.concatenate(seen[index]) for index in alive}
    ordered = sorted(alive, key=lambda index: (-values[index].mean(), index))
    best = values[ordered[0]]
    last = values[ordered[min(count, len(ordered)) - 1]].mean()
    kept = [i for i in ordered if values[i].mean() == last or i in ordered[:count]]
    return [
        index
        for index in (kept if ties else ordered[:count])
        if index == ordered[0] or paired_difference(values[index], best).verdict != "below"
    ]


def _standing(values: np.ndarray, base: np.ndarray, tied: bool = False) -> Standing:
    against = paired_difference(values, base[: len(values)])
    return Standing(values, float(values.mean()), mean_interval(values), against, tied)
