"""Successive halving against models of known accuracy: what it finds, at which cost, and whether
its interval is right.
"""

from __future__ import annotations

import numpy as np
import pytest

from relexkit.trainer.experiments.race import BASELINE, Race, race


class Models:
    """Candidates with given accuracies on problems of varying difficulty, answered with common
    noise.
    """

    def __init__(self, accuracies: list[float], baseline: float, num_problems: int, seed: int):
        rng = np.random.default_rng(seed)
        shared, own = rng.random(num_problems), rng.random((len(accuracies) + 1, num_problems))
        mixed = np.where(
            rng.random(num_problems) < 0.7, shared, own
        )  # most problems are alike to all models
        self.right = mixed < np.array([*accuracies, baseline])[:, None]
        self.asked: list[tuple[int, int, int]] = []

    def answer(self, index: int, begin: int, end: int) -> np.ndarray:
        self.asked.append((index, begin, end))
        return self.right[index, begin:end].astype(float)


ACCURACIES = [0.30, 0.35, 0.42, 0.55, 0.61, 0.50, 0.33, 0.20, 0.10, 0.05, 0.58, 0.02]


def test_full_grid_answers_everything_and_takes_the_best() -> None:
    models = Models([0.2, 0.8, 0.5], 0.4, 160, 0)
    result = race(3, 160, models.answer, halving=False)
    assert result.winner == 1
    assert result.num_answers == result.full_answers == 4 * 160
    for index, standing in enumerate(result.standings):
        np.testing.assert_array_equal(standing.values, models.right[index])
    assert result.fresh.verdict == "above"


def test_every_candidate_answers_the_same_problems_in_its_rung_and_the_baseline_all() -> None:
    models = Models(ACCURACIES, 0.4, 320, 1)
    result = race(len(ACCURACIES), 320, models.answer)
    assert [(b, e) for i, b, e in models.asked if i == BASELINE] == [
        (0, 40),
        (40, 80),
        (80, 160),
        (160, 320),
    ]
    lengths = [len(s.values) for s in result.standings]
    assert sorted(set(lengths)) in ([40, 80, 320], [40, 80, 160, 320], [40, 320])
    assert lengths.count(320) == 1
    assert lengths.index(320) == result.winner
    assert result.num_answers == sum(lengths) + 320


def test_a_third_of_the_answers_finds_the_best_within_its_interval() -> None:
    """Twelve candidates, 400 problems, forty repetitions."""
    found, regret, covered, shares = [], [], [], []
    for seed in range(40):
        models = Models(ACCURACIES, 0.40, 400, seed)
        result: Race = race(len(ACCURACIES), 400, models.answer)
        shares.append(result.num_answers / result.full_answers)
        best = models.right[:-1].mean(axis=1).max()
        low, high = result.standings[result.winner].interval
        covered.append(low <= best <= high)
        regret.append(best - models.right[result.winner].mean())
        true = ACCURACIES[result.winner] - 0.40
        found.append(result.fresh.interval[0] <= true <= result.fresh.interval[1])
    assert np.mean(shares) <= 1 / 3
    assert max(shares) <= 0.4  # ties go on
    assert np.mean(covered) >= 0.85
    assert np.mean(regret) < 0.03
    # the interval on fresh problems is a 95 % one: below 33 of 40 has probability 0.01
    assert sum(found) >= 33


def test_nothing_better_than_the_baseline_is_not_called_better() -> None:
    """Twelve candidates exactly as good as the baseline: the winner of the first half is no better
    on fresh problems.
    """
    verdicts = [
        race(12, 200, Models([0.5] * 12, 0.5, 200, seed).answer).fresh.verdict for seed in range(60)
    ]
    assert verdicts.count("above") <= 5  # 2.5 % each; six or more have probability 0.003


def test_a_surely_worse_candidate_stops_though_there_is_room() -> None:
    models = Models([0.9, 0.05, 0.05], 0.5, 160, 2)
    result = race(3, 160, models.answer)
    assert [len(s.values) for s in result.standings] == [160, 20, 20]


def test_a_single_candidate_runs_to_the_end() -> None:
    result = race(1, 16, Models([0.7], 0.5, 16, 3).answer)
    assert result.winner == 0
    assert len(result.standings[0].values) == 16
    assert result.fresh.num_problems == 8


@pytest.mark.parametrize("num_problems", [16, 17, 100, 333])
def test_all_problems_are_used_whatever_their_number(num_problems: int) -> None:
    result = race(4, num_problems, Models([0.1, 0.2, 0.3, 0.4], 0.5, num_problems, 4).answer)
    assert len(result.baseline.values) == num_problems
    assert result.fresh.verdict in ("below", "not told apart")


def test_ties_go_on_as_far_as_the_best_and_are_said_where_one_is_chosen():
    """Nothing that is as good as what goes on is stopped as if it were worse."""

    def answer(index, begin, end):
        return np.full(end - begin, 0.0 if index == 5 else 1.0)

    result = race(6, 64, answer)
    lengths = [len(standing.values) for standing in result.standings]
    assert lengths == [64, 32, 32, 32, 32, 8]
    assert [standing.tied for standing in result.standings] == [False, *[True] * 4, False]
