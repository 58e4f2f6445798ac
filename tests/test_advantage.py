"""Group advantages by hand-computed groups."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.advantage import group_advantages

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]])


def test_group_scaling_divides_by_the_unbiased_deviation_of_each_group():
    first, third = math.sqrt(1 / 3), 1.5  # sums of squares 1 and 27/4 over three degrees of freedom
    expected = torch.tensor(
        [[0.5 / (first + 1e-4), -0.5 / (first + 1e-4), -0.5 / (first + 1e-4), 0.5 / (first + 1e-4)], [0.0] * 4,
         [-0.75 / (third + 1e-4)] * 3 + [2.25 / (third + 1e-4)]]
    )  # fmt: skip
    torch.testing.assert_close(group_advantages(REWARDS, "group"), expected)


def test_without_scaling_advantages_are_centred_rewards():
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [-0.75, -0.75, -0.75, 2.25]])
    torch.testing.assert_close(group_advantages(REWARDS, "none"), expected)


def test_batch_scaling_divides_every_group_by_one_deviation():
    # mean 13/12, sum of squares 2 + 16 + 9 = 27, so the variance is (27 - 169/12) / 11
    deviation = math.sqrt((27 - 169 / 12) / 11)
    centred = group_advantages(REWARDS, "none")
    torch.testing.assert_close(group_advantages(REWARDS, "batch"), centred / (deviation + 1e-4))


def test_batch_scaling_looks_at_the_rewards_of_all_processes():
    whole = group_advantages(REWARDS, "batch")
    for begin in range(3):
        part = group_advantages(REWARDS[begin : begin + 1], "batch", gather=lambda own: REWARDS)
        torch.testing.assert_close(part, whole[begin : begin + 1])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_variance_has_no_advantage(scale):
    assert (group_advantages(REWARDS, scale)[1] == 0).all()
    assert (group_advantages(torch.full((2, 4), 0.3), scale) == 0).all()
