"""Whether to jump, on made trajectories: lines, walks, and a line that turns back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from relexkit import RelexkitError
from relexkit.assess.jump_decision import FixedJumps, Jumps, momentum_of, reward_test
from relexkit.gram_matrix import Gram

DIMENSION = 3000


def gram_of(path_TD: np.ndarray) -> Gram:
    """The Gram matrix of steps 1, 2, ... of one tensor."""
    steps, dimension = path_TD.shape
    counts = np.zeros((1, steps), np.int64)
    return Gram(
        steps=np.arange(1, steps + 1),
        names=("w",),
        num_parameters=np.array([dimension]),
        matrices=(path_TD @ path_TD.T)[None],
        changed=counts,
        moved=counts,
        unit_moves=counts,
    )


def walk(seed: int, steps: int = 25, drift: float = 0.0) -> np.ndarray:
    """Unit noise each step, and ``drift`` times as much along one direction."""
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(steps, DIMENSION)) / np.sqrt(DIMENSION)
    updates[:, 0] += drift
    return updates.cumsum(axis=0)


def test_a_line_far_above_its_noise_is_followed_for_as_long_as_it_was_seen() -> None:
    for seed in range(3):
        decision = Jumps(every=25).decide(gram_of(walk(seed, drift=1.0)), 100)
        assert decision.length == 25
        assert decision.method in Jumps().methods
        assert decision.evidence["drift_to_noise"] > 1
        assert 0 < decision.evidence["skill"] <= 1
        assert f"{decision.method} beat standing still by" in decision.reason


def test_a_walk_is_not_followed() -> None:
    lengths = [Jumps().decide(gram_of(walk(seed)), 100).length for seed in range(40)]
    assert sum(length > 0 for length in lengths) <= 1


# drift of the 25 steps before a jump and of the 25 after it, and correlation of their noise
AFTER_A_JUMP = {
    "the drift ended": (0.45, 0.0, 0.0),
    "a weak drift ended": (0.25, 0.0, 0.0),
    "there never was one": (0.0, 0.0, 0.0),
    "the noise coasts, the drift ended": (0.6, 0.0, 0.5),
    "the drift goes on": (0.45, 0.45, 0.0),
    "half of it goes on": (0.45, 0.25, 0.0),
}


def after_a_jump(seed: int, before: float, after: float, memory: float) -> Gram:
    """The segment of 25 steps after the first 25 of a run with momentum 0.9."""
    rng = np.random.default_rng(seed)
    direction, state, noise, position = rng.normal(size=DIMENSION), 0.0, 0.0, 0.0
    path = []
    for step in range(1, 51):
        kept = memory if step > 1 else 0.0
        noise = kept * noise + np.sqrt(1 - kept**2) * rng.normal(size=DIMENSION)
        gradient = (before if step <= 25 else after) * direction + noise
        state = 0.9 * state + 0.1 * gradient
        position = position + state / (1 - 0.9**step)
        path.append(position)
    segment = gram_of(np.array(path[25:]) - path[24])
    return replace(segment, momentum=momentum_of(gram_of(np.array(path[:25]))))


@pytest.mark.parametrize("kind", AFTER_A_JUMP)
def test_after_a_jump_only_a_drift_that_goes_on_is_followed(kind: str) -> None:
    """What the momentum still carries of a drift that ended is none."""
    found = [
        Jumps().decide(after_a_jump(seed, *AFTER_A_JUMP[kind]), 100).length > 0 for seed in range(4)
    ]
    # false jumps at 5 % at most: two or more of four come up with probability 0.014
    assert all(found) if AFTER_A_JUMP[kind][1] else sum(found) < 2


def test_a_drift_below_the_noise_is_not_followed_and_the_reason_has_its_numbers() -> None:
    decision = Jumps().decide(gram_of(walk(0, drift=0.15)), 100)
    assert (decision.length, decision.method) == (0, None)
    assert "above the noise, not certainly above it" in decision.reason


def test_the_steps_that_are_left_bound_a_jump() -> None:
    line = gram_of(walk(0, drift=1.0))
    assert [Jumps(every=24).decide(line, most).length for most in (24, 23, 11, 5)] == [24, 12, 6, 0]


def test_a_jump_is_never_longer_than_every_nor_than_the_steps_since_the_last_one() -> None:
    assert Jumps(every=12).decide(gram_of(walk(0, steps=30, drift=1.0)), 100).length == 12
    assert Jumps(every=40).decide(gram_of(walk(0, steps=24, drift=1.0)), 100).length == 20


def bent(life: float) -> np.ndarray:
    """A line that dies out over ``life`` steps."""
    path = walk(1) * 0.02
    path[:, 0] += 10 * (1 - np.exp(-np.arange(1, 26) / life))
    return path


def test_a_drift_that_turns_within_a_few_steps_is_not_followed_for_longer() -> None:
    rng = np.random.default_rng(4)
    direction, updates = rng.normal(size=DIMENSION), []
    for _ in range(25):
        direction = 0.7 * direction + np.sqrt(0.51) * rng.normal(size=DIMENSION)
        updates.append(direction + rng.normal(size=DIMENSION))
    turning = gram_of(np.cumsum(updates, axis=0))
    found = Jumps().decide(turning, 100)
    assert found.length == 0
    assert "but it turns within" in found.reason
    assert found.evidence["p_value"] < 1e-6
    assert found.evidence["drift_to_noise"] > 1


def test_a_method_that_lost_in_these_steps_is_not_used() -> None:
    """RELEX and the two-point line overshoot a path that bends, the more the farther they go."""
    rule = Jumps(methods=("relex", "two-point"))
    soon, later, straight = (rule.decide(gram_of(bent(life)), 100) for life in (8, 12, 1000))
    assert (soon.length, later.length, straight.length) == (0, 6, 25)
    assert "no method always beat standing still" in soon.reason
    assert later.method == "two-point"


def test_what_cannot_be_decided_is_not_jumped() -> None:
    assert "11 steps are too few" in Jumps().decide(gram_of(walk(0, steps=11)), 9).reason
    assert Jumps().decide(gram_of(np.zeros((25, 10))), 9).length == 0


def test_a_fixed_rule_jumps_whatever_the_record_says() -> None:
    decision = FixedJumps(train_steps=3, jump_steps=7, method="drift").decide(gram_of(walk(0)), 9)
    assert (decision.length, decision.method) == (7, "drift")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 11}, "every 11 steps are too few to decide from; expected 12 or more"),
        ({"methods": ()}, "methods: lacks a method"),
        ({"methods": ("relax",)}, "relax"),
    ],
)
def test_rules_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RelexkitError, match=message):
        Jumps(**options)


def test_rewards_are_compared_by_a_paired_one_sided_test() -> None:
    rng = np.random.default_rng(3)
    before = rng.uniform(size=(32, 8))
    for shift in (-0.1, 0.0, 0.1):
        after = before + rng.normal(shift, 0.2, size=(32, 8))
        found = reward_test(before, after)
        expected = ttest_rel(after.mean(axis=1), before.mean(axis=1), alternative="less")
        assert found.p_hurt == pytest.approx(expected.pvalue)
        assert (found.before, found.after) == (before.mean(), pytest.approx(after.mean()))
        assert found.kept == (expected.pvalue > 0.1)


def test_equal_rewards_keep_a_jump_and_an_equal_loss_everywhere_does_not() -> None:
    before = np.ones((4, 2))
    assert reward_test(before, before).kept
    assert not reward_test(before, before - 0.5).kept
