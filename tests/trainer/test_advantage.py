"""Group advantages by hand-computed groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from relexkit.trainer.credit.advantage import group_advantages, lampo_advantages

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]])


def test_group_scaling_divides_by_the_unbiased_deviation_of_each_group():
    first, third = math.sqrt(1 / 3), 1.5  # sums of squares 1 and 27/4 over three degrees of freedom
    expected = torch.tensor(
        [
            [
                0.5 / (first + 1e-4),
                -0.5 / (first + 1e-4),
                -0.5 / (first + 1e-4),
                0.5 / (first + 1e-4),
            ],
            [0.0] * 4,
            [-0.75 / (third + 1e-4)] * 3 + [2.25 / (third + 1e-4)],
        ]
    )
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


# -- LamPO -----------------------------------------------------------------------------------------


def test_lampo_by_hand():
    """Rewards 1 and 0, and a policy that prefers the better one by ln 3: the weight is sigmoid(-ln
    3) = 1/4.
    """
    reward, logp = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -np.log(3)]])
    np.testing.assert_allclose(lampo_advantages(reward, logp, 1.0), [[0.25, -0.25]], rtol=1e-6)
    np.testing.assert_allclose(lampo_advantages(reward, -logp, 1.0), [[0.75, -0.75]], rtol=1e-6)
    np.testing.assert_allclose(
        lampo_advantages(reward, logp, 0.5), [[0.1, -0.1]], rtol=1e-6
    )  # 1 / (1 + 3^2)


def test_lampo_by_a_loop_over_pairs():
    generator = np.random.default_rng(0)
    reward, logp = (
        generator.integers(0, 3, (4, 6)).astype(np.float64),
        generator.normal(size=(4, 6)),
    )
    expected = np.zeros_like(reward)
    for p in range(4):
        for i in range(6):
            for j in range(6):
                if reward[p, i] != reward[p, j]:
                    order = 1 if reward[p, i] > reward[p, j] else -1
                    agreement = order * (logp[p, i] - logp[p, j]) / 0.7
                    expected[p, i] += (reward[p, i] - reward[p, j]) / (1 + np.exp(agreement)) / 5
    found = lampo_advantages(torch.from_numpy(reward), torch.from_numpy(logp), 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_lampo_sums_to_zero_and_turns_with_the_rewards():
    generator = torch.Generator().manual_seed(0)
    reward, logp = torch.rand(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    found = lampo_advantages(reward, logp, 0.3)
    np.testing.assert_allclose(found.sum(dim=1), 0, atol=1e-6)
    torch.testing.assert_close(lampo_advantages(-reward, -logp, 0.3), -found)
    assert bool((lampo_advantages(torch.ones(5, 8), logp, 0.3) == 0).all())


def test_lampo_at_a_high_temperature_is_centred():
    reward, logp = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]]), torch.randn(1, 5)
    centred = reward - reward.mean()
    torch.testing.assert_close(lampo_advantages(reward, logp, 1e7), 5 / 8 * centred)
