"""Intervals against published and hand-computed values, and against their coverage in
simulation.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from relexkit.trainer.evaluation.intervals import mean_interval, paired_difference, pass_at_k


def test_interval_of_a_share_is_wilsons():
    """Values of Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, number, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        values = np.r_[np.ones(right), np.zeros(number - right)]
        assert mean_interval(values) == pytest.approx((low, high), abs=5e-5)
        assert mean_interval(values, 8 * number) == mean_interval(
            values
        )  # equal answers of a problem add nothing
    assert mean_interval(np.ones(20))[1] == 1.0


def test_interval_of_sampled_answers_lies_between_those_of_problems_and_of_answers():
    """Every problem right half of the time: as many independent trials as answers."""
    assert mean_interval(np.full(50, 0.5), 400) == pytest.approx(
        mean_interval(np.tile([0.0, 1.0], 200))
    )
    mixed = np.tile([0.0, 0.5, 0.75, 1.0], 25)
    low, high = mean_interval(mixed, 400)
    of_answers = mean_interval(np.r_[np.ones(225), np.zeros(175)])
    of_problems = mean_interval(np.repeat([0.0, 1.0], [44, 56]))
    assert of_answers[1] - of_answers[0] < high - low < of_problems[1] - of_problems[0]


def test_intervals_cover_what_they_should():
    """Two models that agree on part of the problems; 2000 draws of 60 problems with 4 samples
    each.
    """
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(2000):
        skill = rng.beta(2, 1, 60)
        first = rng.binomial(4, skill) / 4
        second = np.where(rng.random(60) < 0.5, first, rng.binomial(4, 0.8 * skill) / 4)
        low, high = mean_interval(first, 240)
        covered[0] += low <= 2 / 3 <= high
        difference = paired_difference(first, second)
        covered[1] += difference.interval[0] <= 0.5 * 0.2 * 2 / 3 <= difference.interval[1]
    # 95 % within four standard errors of 2000 draws (0.5 %), and one more on top for the
    # approximation
    assert (covered / 2000 > 0.92).all()
    assert (covered / 2000 < 0.985).all()


def test_paired_difference_by_hand():
    first = np.array([1, 1, 1, 0, 1, 1, 0, 0, 1, 1.0])
    second = np.array(
        [1, 0, 0, 1, 0, 1, 0, 0, 0, 1.0]
    )  # only the first right: 4, only the second: 1
    found = paired_difference(first, second)
    assert found.difference == pytest.approx(0.3)
    half = 1.959964 * math.sqrt((4 + 1 + 1) / 12 - (3 / 12) ** 2) / math.sqrt(12)
    assert found.interval == pytest.approx((0.25 - half, 0.25 + half))
    assert (found.num_problems, found.verdict) == (10, "not told apart")
    assert paired_difference(np.ones(50), np.zeros(50)).verdict == "above"
    assert paired_difference(np.zeros(50), np.ones(50)).verdict == "below"
    low, high = paired_difference(first, first).interval
    assert low == -high < 0  # ten problems alike do not show that all are


@pytest.mark.parametrize(
    ("right", "samples", "k"), [(0, 5, 2), (2, 5, 2), (3, 6, 3), (5, 5, 1), (4, 5, 4)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, samples, k):
    subsets = list(itertools.combinations([1] * right + [0] * (samples - right), k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(np.array([right, right]), samples, k) == pytest.approx([expected, expected])


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="k is 6; expected 1 to the number of samples, 5"):
        pass_at_k(np.array([1]), 5, 6)
