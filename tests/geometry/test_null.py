"""The walk without direction: hand-computed statistics, simulated walks with the optimizer's own
recursion, false alarms.
"""

from __future__ import annotations

import numpy as np
import pytest
from strategies import gram_from, gram_of, walk_with_momentum

from relexkit.geometry.null import STATISTICS, calibrate, statistics
from relexkit.geometry.shape import center, decompose, r_squared, update_cosines
from relexkit.geometry.spectrum import agreement, spectrum

STEPS = np.array([1, 2, 4, 7, 12, 13, 20, 26, 33, 40, 41, 50])


@pytest.mark.parametrize("centered", [False, True])
def test_statistics_are_those_of_the_spectrum(centered: bool) -> None:
    rng = np.random.default_rng(0)
    deltas = [
        rng.standard_normal((12, 40)).cumsum(axis=0),
        STEPS[:, None] * rng.standard_normal(40),
        np.zeros((12, 3)),
    ]
    found = statistics(np.array([d @ d.T for d in deltas]), STEPS, centered=centered)
    for row, delta in zip(found[:2], deltas, strict=False):
        matrix = delta @ delta.T
        parts = decompose(center(matrix) if centered else matrix)
        ratios = parts.explained_variance_ratio
        length = np.linalg.norm(np.diff(delta, axis=0, prepend=0.0), axis=1).sum()
        expected = [
            ratios[0],
            ratios[:2].sum(),
            r_squared(parts.coefficients, STEPS)[0],
            update_cosines(matrix).mean(),
            np.linalg.norm(delta[-1]) / length,
            agreement(matrix, np.array([6]), centered=centered)[0],
        ]
        np.testing.assert_allclose(row, expected, atol=1e-7)
    assert np.isnan(found[2]).all()


def test_flipped_signs_keep_every_innovation_and_forget_directions() -> None:
    """On a noiseless line of independent updates, by hand: every flip is a one-dimensional walk,
    its mean that of min(s, t).
    """
    line = np.arange(1.0, 31)[:, None] * np.ones(5)
    null = calibrate(gram_from(line @ line.T[None], np.arange(1, 31), 5), momentum=0.0)
    whole = null.whole
    assert whole.observed["first"] == pytest.approx(1)
    walk = decompose(np.minimum.outer(np.arange(1, 31), np.arange(1, 31)).astype(float))
    assert whole.expected["first"] == pytest.approx(walk.explained_variance_ratio[0], abs=1e-6)
    assert whole.num_flips == 199
    # one dimension: a flipped matrix has a single direction as well, but its coefficient wanders
    assert whole.low["first"] == pytest.approx(1)
    assert whole.p_value["r2"] == pytest.approx(1 / 200)
    assert whole.p_value["straightness"] == pytest.approx(1 / 200)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "decay"])
def test_expected_null_is_what_long_walks_of_this_optimizer_show(
    beta: float, schedule: str
) -> None:
    rates = None if schedule == "constant" else np.linspace(1.0, 0.1, 50)
    deltas = walk_with_momentum(np.random.default_rng(1), 50, 20000, beta, rates)
    null = calibrate(gram_from(deltas @ deltas.T[None], np.arange(1, 51), 20000, rates)).whole
    assert null.observed.keys() == set(STATISTICS)
    for name in STATISTICS:
        # 20000 independent parameters leave about 1 / 140 of chance in every overlap
        assert null.expected[name] == pytest.approx(null.observed[name], abs=0.02), name


def test_false_alarms_on_walks_are_nominal_and_lines_are_found() -> None:
    rng = np.random.default_rng(2)
    reached = []
    for _ in range(60):
        deltas = walk_with_momentum(rng, 24, 100, 0.9)
        reached.append(
            list(
                calibrate(
                    gram_from(deltas @ deltas.T[None], np.arange(1, 25), 100)
                ).whole.p_value.values()
            )
        )
    alarms = (np.array(reached) <= 0.05).sum(axis=0)
    # of 60 at 5 %, nine or more come up with probability 0.003 a statistic
    assert (alarms < 9).all(), dict(zip(STATISTICS, alarms, strict=True))
    line = walk_with_momentum(rng, 24, 100, 0.9) + 0.7 * np.arange(1, 25)[
        :, None
    ] * rng.standard_normal(100)
    found = calibrate(gram_from(line @ line.T[None], np.arange(1, 25), 100)).whole.p_value
    assert found["straightness"] <= 0.01
    assert found["first"] <= 0.01


def test_groups_have_their_own_nulls_and_the_whole_is_their_sum() -> None:
    rng = np.random.default_rng(3)
    deltas = {
        f"model.layers.{i}.w": (i + 1) * walk_with_momentum(rng, 30, 50, 0.5) for i in range(3)
    }
    gram = gram_of(deltas, np.arange(1, 31))
    found = spectrum(gram)
    whole = spectrum(gram, scope="global")
    assert found.whole.observed == pytest.approx(whole.scopes[0].null.observed)
    assert found.whole.expected == pytest.approx(whole.scopes[0].null.expected)
    for scope in found.scopes:
        assert scope.null.observed["first"] == pytest.approx(scope.explained_variance_ratio[0])
        assert scope.null.num_flips == 199
    np.testing.assert_allclose(
        found.null.explained_variance_ratio[0], found.whole.expected["first"]
    )


def test_many_groups_keep_the_analytic_null_alone() -> None:
    rng = np.random.default_rng(4)
    matrices = np.array(
        [d @ d.T for d in (walk_with_momentum(rng, 40, 20, 0.0) for _ in range(250))]
    )
    null = calibrate(gram_from(matrices, np.arange(1, 41), 5000))
    assert null.groups[0].num_flips == 0
    assert np.isnan(null.groups[0].p_value["first"])
    assert np.isfinite(null.groups[0].expected["first"])
    assert null.whole.num_flips == 199


def test_some_groups_have_the_nulls_that_they_have_among_all() -> None:
    rng = np.random.default_rng(5)
    for count, flips in ((12, 199), (250, 0)):
        walks = [walk_with_momentum(rng, 40, 20, 0.0) for _ in range(count)]
        null = calibrate(
            gram_from(np.array([d @ d.T for d in walks]), np.arange(1, 41), 5000), centered=True
        )
        some = null.of(np.array([7, 3]))
        for found, row in zip(some, (7, 3), strict=True):
            assert found.num_flips == flips
            other = null.groups[row]
            for name in ("observed", "expected", "p_value"):
                wanted = pytest.approx(getattr(other, name), rel=1e-9, nan_ok=True)
                assert getattr(found, name) == wanted
            np.testing.assert_allclose(found.gram, other.gram, rtol=1e-9)


def test_two_steps_have_an_analytic_null_and_no_fit() -> None:
    null = calibrate(gram_from(np.array([[[1.0, 0.2], [0.2, 2.0]]]), np.array([1, 2]), 10))
    assert null.fitted is None
    assert null.whole.num_flips == 0
    assert np.isnan(null.whole.observed["r2"])
