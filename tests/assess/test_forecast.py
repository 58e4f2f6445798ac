"""Intervals of future coefficients: what they mean, and how often they are right on runs that
nobody tuned them on.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from simulated import COVERAGE_FAMILIES, D, Run, covered, simulate
from strategies import gram_from

from relexkit.assess import forecast as module
from relexkit.assess.forecast import Forecast, forecast
from relexkit.errors import ExtrapolationError
from relexkit.geometry.shape import decompose
from relexkit.geometry.trajectory_model import SPACED, fit_trajectory


def test_a_mixture_of_one_normal_has_its_own_quantile() -> None:
    centres, deviations = (
        np.array([1.0, -3.0]).reshape(1, 2, 1),
        np.array([2.0, 0.5]).reshape(1, 1, 1, 2, 1),
    )
    found = module._quantile(centres, deviations, np.ones((1, 1, 1, 1)), 0.95)
    np.testing.assert_allclose(found[:, 0], norm.ppf(0.95, [1.0, -3.0], [2.0, 0.5]), rtol=1e-9)


def test_a_mixture_of_two_normals_holds_its_level() -> None:
    centres, deviations = (
        np.array([0.0, 5.0]).reshape(2, 1, 1),
        np.array([1.0, 4.0]).reshape(1, 2, 1, 1, 1),
    )
    shares = np.array([[0.1, 0.2], [0.3, 0.4]]).reshape(2, 2, 1, 1)
    found = module._quantile(centres, np.repeat(deviations, 2, axis=0), shares, 0.05).item()
    below = norm.cdf(found, np.array([[0.0], [5.0]]), np.array([1.0, 4.0]))
    assert (shares[:, :, 0, 0] * below).sum() == pytest.approx(0.05, abs=1e-9)


def test_coefficients_are_those_of_the_predicted_delta() -> None:
    seen = simulate(Run(drift=0.4, beta=0.9), 40, 0)
    gram, steps = seen @ seen.T, np.arange(1, 41)
    found: Forecast = forecast(gram_from(gram[None], steps, D), [60, 80], num_directions=2)
    fit = fit_trajectory(gram, steps, num_parameters=D, spaced=SPACED)
    parts = decompose(gram)
    directions = seen.T @ parts.left[:, :2] / parts.singular_values[:2]
    np.testing.assert_allclose(np.linalg.norm(directions, axis=0), 1)
    expected = np.array([seen.T @ fit.weights(t) for t in (60.0, 80.0)]) @ directions
    # the two are fits of their own, and how BLAS splits its sums moves where each stops by about
    # 1e-4
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-3)
    assert found.num_prefixes == 5
    assert (found.factor > 0).all()
    assert ((found.low < found.coefficients) & (found.coefficients < found.high)).all()
    assert (np.diff(found.high - found.low, axis=0) > 0).all(), "farther is less certain"


def test_a_higher_level_is_wider_and_few_steps_are_wider_still() -> None:
    seen = simulate(Run(drift=0.4), 40, 1)
    widths = {}
    for level, count in ((0.5, 40), (0.9, 40), (0.9, 4)):
        found = forecast(
            gram_from((seen[:count] @ seen[:count].T)[None], np.arange(1, count + 1), D),
            [2 * count],
            level=level,
        )
        widths[level, count] = float(found.high[0, 0] - found.low[0, 0]) / float(
            found.coefficients[0, 0]
        )
    assert widths[0.5, 40] < widths[0.9, 40] < widths[0.9, 4]


def test_too_few_steps_say_what_to_do() -> None:
    with pytest.raises(ExtrapolationError, match="record at least 3"):
        forecast(gram_from(np.eye(2)[None], np.array([1, 2]), 10), [5])


def test_coverage_of_a_few_runs() -> None:
    """Sixteen runs of four kinds: below 70 % has probability 0.01 at a coverage of 90 % with one
    check of four independent.
    """
    kinds = ("walk", "line, autocorrelated noise", "slowly saturating", "turning")
    hits = [covered(COVERAGE_FAMILIES[kind], seed) for kind in kinds for seed in range(2)]
    assert np.mean(hits) > 0.7


@pytest.mark.slow
def test_coverage_on_every_family() -> None:
    """The nominal 90 % over all ten kinds of run, and none far below; docs/line.md has 60 runs of
    each.
    """
    hits = {
        kind: np.mean([covered(run, seed) for seed in range(300, 312)])
        for kind, run in COVERAGE_FAMILIES.items()
    }
    # the kinds of one seed share their noise: 12 draws, and 0.86 was measured where 60 other ones
    # gave 0.93
    assert 0.8 <= np.mean(list(hits.values())) <= 0.98, hits
    assert min(hits.values()) > 0.7, (
        hits
    )  # 12 runs with hardly more than one independent target each
