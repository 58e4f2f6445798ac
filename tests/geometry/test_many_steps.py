"""Runs of more than ``MANY_STEPS`` steps, of which only leading directions are computed, against
the singular value decomposition of their deltas and the formulas on whole matrices.
"""

from __future__ import annotations

import numpy as np
import pytest
from strategies import gram_of, walk_with_momentum

from relexkit.geometry import null
from relexkit.geometry.null import STATISTICS, calibrate
from relexkit.geometry.shape import (
    LEADING,
    MANY_STEPS,
    center,
    decompose,
    decompose_all,
    leading_eigenpairs,
)
from relexkit.geometry.spectrum import spectrum

T = MANY_STEPS + 64
STEPS = np.arange(1, T + 1)


def deltas() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    walk = walk_with_momentum(rng, T, 400, 0.9)
    return {
        "model.layers.0.walk": walk,
        "model.layers.0.line": walk[:, :350] + STEPS[:, None] * 0.3 * rng.standard_normal(350),
        "model.layers.1.rank_one": np.sqrt(STEPS)[:, None] * rng.standard_normal(20),
        "model.layers.1.rounded": walk + 0.5 * rng.standard_normal(walk.shape),
        "model.layers.2.still": np.zeros((T, 5)),
    }


@pytest.mark.parametrize("centered", [False, True])
def test_leading_directions_are_those_of_the_deltas(centered: bool) -> None:
    found = spectrum(gram_of(deltas(), STEPS), centered=centered)
    for scope, delta in zip(found.scopes, deltas().values(), strict=True):
        about = delta - delta.mean(axis=0) if centered else delta
        left, singular, _ = np.linalg.svd(about, full_matrices=False)
        known = len(scope.singular_values)
        assert known == min(LEADING, int((singular > 1e-7 * singular[0]).sum()))
        np.testing.assert_allclose(scope.singular_values, singular[:known], rtol=1e-6)
        ratios = singular**2 / max((singular**2).sum(), 1e-300)
        np.testing.assert_allclose(scope.explained_variance_ratio, ratios[:known], rtol=1e-6)
        overlaps = np.abs((scope.parts.left * left[:, :known]).sum(axis=0))
        np.testing.assert_allclose(overlaps, 1.0, atol=1e-6)
        if known:
            assert scope.num_directions(0.9) == 1 + np.searchsorted(np.cumsum(ratios), 0.9)


def test_directions_that_cannot_be_told_apart_are_left_out_but_for_the_first_two() -> None:
    """Noise alone has a flat spectrum: no subspace stands out."""
    noise = np.random.default_rng(1).standard_normal((T, 300))
    matrix = noise @ noise.T
    parts = decompose(matrix)
    singular = np.linalg.svd(noise, compute_uv=False)
    assert 2 <= len(parts.singular_values) < LEADING
    known = len(parts.singular_values)
    np.testing.assert_allclose(parts.singular_values, singular[:known], rtol=1e-6)
    [scope] = spectrum(gram_of({"noise": noise}, STEPS)).scopes
    assert scope.num_directions(0.9) is None
    values, _ = leading_eigenpairs(matrix[None], 3)
    np.testing.assert_allclose(values[0], singular[:3] ** 2, rtol=1e-9)


@pytest.mark.parametrize("count", [3, 40, 200])
def test_as_many_directions_as_are_asked_for_are_known(count: int) -> None:
    """Of noise alone, and of a walk: more than are computed otherwise."""
    noise = np.random.default_rng(1).standard_normal((T, 300))
    for delta in (noise, deltas()["model.layers.0.walk"]):
        singular = np.linalg.svd(delta, compute_uv=False)[:count]
        parts = decompose(delta @ delta.T, count)
        np.testing.assert_allclose(parts.singular_values[:count], singular, rtol=1e-6)
        values, _ = leading_eigenpairs((delta @ delta.T)[None], count)
        np.testing.assert_allclose(values[0], singular**2, rtol=1e-6, atol=1e-8 * singular[0] ** 2)


def test_a_decomposition_does_not_depend_on_its_neighbours() -> None:
    matrices = np.array([d @ d.T for d in deltas().values()])
    for one, parts in zip(matrices, decompose_all(matrices), strict=True):
        alone = decompose(one)
        np.testing.assert_allclose(parts.singular_values, alone.singular_values, rtol=1e-12)


@pytest.mark.parametrize("centered", [False, True])
def test_nulls_are_those_of_whole_matrices(centered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``G_0 = L diag(W) L^T`` written out, and the statistics of its singular value decomposition;
    directions are told by 128 of its steps.
    """
    gram = gram_of(deltas(), STEPS)
    found = calibrate(gram, centered=centered)
    factor = np.linalg.cholesky(found.fitted.walk_covariance())
    inverse = np.linalg.inv(factor)
    monkeypatch.setattr(null, "MANY_STEPS", T)
    for walk, matrix in zip(
        [found.whole, *found.groups], [gram.whole, *gram.matrices], strict=True
    ):
        expected = factor @ np.diag(np.diagonal(inverse @ matrix @ inverse.T)) @ factor.T
        np.testing.assert_allclose(walk.gram, expected, atol=1e-6 * np.trace(expected) / T)
        if not matrix.any():
            assert np.isnan(list(walk.expected.values())).all()
            continue
        about = center(expected) if centered else expected
        values = np.linalg.eigvalsh(about)[::-1]
        assert walk.expected["first"] == pytest.approx(values[0] / values.sum(), abs=1e-3)
        assert walk.expected["first_two"] == pytest.approx(
            values[:2].sum() / values.sum(), abs=1e-3
        )
        whole = null.statistics(expected[None], STEPS, centered=centered)[0]
        for name, value in zip(STATISTICS, whole, strict=True):
            exact = name in ("cosine", "straightness")
            assert walk.expected[name] == pytest.approx(value, abs=1e-6 if exact else 2e-3)
