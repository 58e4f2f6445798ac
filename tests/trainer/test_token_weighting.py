"""DelTA coefficients against a float64 implementation that is written from the paper's formulas,
with everything in memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relexkit.trainer.credit.token_weighting import Refinement, delta_coefficients


def direct(states, advantage, counted, iterations, low, high):
    """All tokens at once, squared distances as they stand in the formula, float64."""
    v = np.concatenate(states).astype(np.float64)
    rows = np.repeat(np.arange(len(states)), [len(s) for s in states])
    a = np.asarray(advantage, np.float64)[rows]
    valid = np.asarray(counted)[rows]
    sides = {+1: valid & (a > 0), -1: valid & (a < 0)}
    if not all(side.any() for side in sides.values()):
        return np.ones(len(v))
    centre = {s: np.average(v[side], axis=0, weights=np.abs(a[side])) for s, side in sides.items()}

    def margin(s, centre):
        own, other = v[sides[s]] - centre[s], v[sides[s]] - centre[-s]
        return (other**2).sum(axis=1) - (own**2).sum(axis=1)

    gamma = {s: np.sqrt(max(np.var(margin(s, centre)), 1e-8)) for s in sides}
    for _ in range(iterations):
        margins = {s: margin(s, centre) for s in sides}
        gamma = {s: np.sqrt(max(np.var(margins[s]), 1e-8)) for s in sides}
        alpha = {s: 1 / (1 + np.exp(-margins[s] / gamma[s])) for s in sides}
        centre = {
            s: np.average(v[side], axis=0, weights=np.abs(a[side]) * alpha[s])
            for s, side in sides.items()
        }
    weight = np.full(len(v), low)
    for s, side in sides.items():
        weight[side] = low + (high - low) / (1 + np.exp(-margin(s, centre) / gamma[s]))
    weight /= weight[valid].mean()
    weight[~valid] = 1
    return weight


def batch(seed, rollouts=12, width=7, longest=9):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, rollouts)
    advantage = generator.normal(size=rollouts).astype(np.float32)
    states = [
        generator.normal(0.3 * np.sign(a), 1, (n, width)).astype(np.float32)
        for n, a in zip(lengths, advantage, strict=True)
    ]
    return states, advantage


def ours(
    states, advantage, counted, iterations, low=0.8, high=1.2, block=3, total=lambda values: values
):
    def sweep():
        for begin in range(0, len(states), block):
            rows = list(range(begin, min(begin + block, len(states))))
            yield rows[::-1], torch.from_numpy(np.concatenate([states[row] for row in rows[::-1]]))

    return delta_coefficients(
        sweep,
        torch.from_numpy(np.asarray(advantage, np.float32)),
        [len(s) for s in states],
        counted,
        Refinement(iterations=iterations, low=low, high=high),
        total,
    )


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("kind", ["random", "zero advantages", "masked", "narrow range"])
def test_coefficients_are_those_of_the_formulas(iterations, kind):
    for seed in range(5):
        states, advantage = batch(seed)
        counted = [True] * len(states)
        low, high = (0.8, 1.2) if kind != "narrow range" else (0.95, 1.0)
        if kind == "zero advantages":
            advantage[::3] = 0
        if kind == "masked":
            counted = [row % 4 != 1 for row in range(len(states))]
        found = torch.cat(ours(states, advantage, counted, iterations, low, high)).numpy()
        expected = direct(states, advantage, counted, iterations, low, high)
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        kept = np.repeat(counted, [len(s) for s in states])
        assert found[kept].mean() == pytest.approx(1, abs=1e-6)
        assert found.std() > 1e-3


@pytest.mark.parametrize(
    "advantage", [[1.0, 2.0, 0.5], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]], ids=str
)
def test_a_batch_with_one_side_only_is_not_weighted(advantage):
    states, _ = batch(0, rollouts=3)
    assert all(bool((weight == 1).all()) for weight in ours(states, advantage, [True] * 3, 1))


def test_a_side_whose_rollouts_are_all_masked_is_no_side():
    states, _ = batch(0, rollouts=2)
    assert all(bool((weight == 1).all()) for weight in ours(states, [1.0, -1.0], [True, False], 1))


def test_tokens_that_are_all_alike_weigh_the_same():
    states = [np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)]
    weights = torch.cat(ours(states, [1.0, -1.0], [True, True], 1))
    np.testing.assert_allclose(weights.numpy(), 1, rtol=1e-6)


def test_the_split_over_processes_and_blocks_changes_nothing():
    """Two processes in lockstep: each sees its own rollouts, and ``total`` the sums of both."""
    import threading

    states, advantage = batch(3)
    whole = ours(states, advantage, [True] * 12, 2, block=12)
    barrier, slots = threading.Barrier(2), [None, None]
    results: list = [None, None]

    def run(rank):
        def total(values):
            slots[rank] = values
            barrier.wait()
            found = slots[0] + slots[1]
            barrier.wait()
            return found

        own = slice(6 * rank, 6 * rank + 6)
        results[rank] = ours(
            states[own], advantage[own], [True] * 6, 2, block=1 + rank, total=total
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    np.testing.assert_allclose(torch.cat(results[0] + results[1]), torch.cat(whole), rtol=1e-6)
