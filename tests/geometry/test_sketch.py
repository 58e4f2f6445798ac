"""The streaming sketch against the exact Gram matrix; any cut of the work gives the same sketch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from strategies import trajectory

from relexkit.geometry.shape import decompose, r_squared
from relexkit.geometry.sketch import Sketch

STEPS = np.array([1, 2, 4, 7, 20, 21, 33, 50, 60, 61, 70, 90])


def fed(sketch: Sketch, deltas: np.ndarray, steps: np.ndarray) -> Sketch:
    for step, delta in zip(steps, deltas.astype(np.float32), strict=True):
        half = delta.shape[0] // 3
        sketch.update(int(step), [("a.weight", 0, delta[:half]), ("b.weight", 0, delta[half:])])
    return sketch


def shapes() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    walk = trajectory("walk", STEPS, 300_000, seed=1).deltas
    # an update of a matrix is often of low rank: proportional rows, which must not fall on each
    # other
    proportional = np.stack(
        [np.outer(random.standard_normal(300), np.ones(1000)).reshape(-1) * s for s in STEPS]
    )
    column = np.zeros((len(STEPS), 300_000))
    column[:, 5::1000] = walk[:, 5::1000]  # all energy in one column of a matrix
    return {
        "walk": walk,
        "line": trajectory("line", STEPS, 300_000, seed=2).deltas,
        "rank one": proportional,
        "column": column,
    }


@pytest.mark.parametrize("name", ["walk", "line", "rank one", "column"])
def test_inner_products_are_estimated_to_their_stated_error(name: str) -> None:
    deltas = shapes()[name]
    norms = np.linalg.norm(deltas, axis=1)
    errors, ratios = [], []
    for seed in range(6):
        found = fed(Sketch(seed=seed), deltas, STEPS).gram()
        errors.append((found - deltas @ deltas.T) / np.outer(norms, norms))
        ratios.append(decompose(found).explained_variance_ratio[0])
    spread = np.sqrt(np.mean(np.square(errors)))
    # sqrt(2 / width) is 1.1 %. One column has only 300 elements, each a bucket of its own: fewer
    # collisions, larger ones
    assert spread < (0.02 if name != "column" else 0.1)
    truth = decompose(deltas @ deltas.T).explained_variance_ratio[0]
    assert abs(np.mean(ratios) - truth) < (0.01 if name != "column" else 0.05)


def test_any_cut_order_and_process_gives_the_same_sketch() -> None:
    delta = np.random.default_rng(3).standard_normal(70_000).astype(np.float32)
    sketch = Sketch()
    whole = sketch.row([("w", 0, delta)])
    cuts = [0, 1, 16_383, 16_384, 40_000, 69_999, 70_000]
    pieces = [("w", a, delta[a:b]) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(Sketch().row(reversed(pieces)), whole, atol=1e-12)
    ranks = [Sketch().row(pieces[rank::2]) for rank in range(2)]
    np.testing.assert_allclose(ranks[0] + ranks[1], whole, atol=1e-12)
    assert np.abs(sketch.row([("other name", 0, delta)]) - whole).max() > 1
    assert np.abs(Sketch(seed=1).row([("w", 0, delta)]) - whole).max() > 1


def test_a_hand_computed_value() -> None:
    """One element is one bucket: its sign and place are all that happens to it."""
    row = Sketch().row([("w", 5, np.array([3.0], np.float32))])
    assert np.count_nonzero(row) == 1
    assert abs(row).max() == 3


def test_memory_stays_and_the_last_step_is_always_there() -> None:
    sketch = Sketch(width=64, max_rows=8)
    for step in range(1, 101):
        sketch.add(step, np.full(64, float(step)))
        assert len(sketch.steps) <= 9
        assert sketch.steps[0] == 1
        assert sketch.steps[-1] == step
        assert (np.diff(sketch.steps) > 0).all()
        np.testing.assert_array_equal(sketch.rows[:, 0], sketch.steps)
    assert sketch.rows.nbytes <= 9 * 64 * 4
    assert set(np.diff(sketch.steps[:-1]).tolist()) == {16}


def test_live_statistics() -> None:
    line = fed(Sketch(), shapes()["line"], STEPS).live_statistics()
    assert line["live_variance_1"] == pytest.approx(1.0, abs=1e-6)
    assert line["live_straightness"] == pytest.approx(1.0, abs=1e-6)
    assert line["live_r2"] == pytest.approx(1.0, abs=1e-6)
    deltas = shapes()["walk"]
    walk = fed(Sketch(), deltas, STEPS).live_statistics()
    parts = decompose(deltas @ deltas.T)
    path = np.linalg.norm(np.diff(deltas, axis=0, prepend=0.0), axis=1).sum()
    assert walk["live_variance_1"] == pytest.approx(parts.explained_variance_ratio[0], abs=0.02)
    assert walk["live_variance_2"] == pytest.approx(
        parts.explained_variance_ratio[:2].sum(), abs=0.02
    )
    assert walk["live_straightness"] == pytest.approx(np.linalg.norm(deltas[-1]) / path, rel=0.03)
    assert walk["live_r2"] == pytest.approx(
        r_squared(parts.coefficients[:, :1], STEPS)[0], abs=0.02
    )


def test_nothing_is_said_before_anything_moved() -> None:
    sketch = Sketch(width=64)
    assert all(np.isnan(v) for v in sketch.live_statistics().values())
    found = sketch.update(1, [("w", 0, np.zeros(10, np.float32))])
    assert all(np.isnan(v) for v in found.values())
    with pytest.raises(ValueError, match="width 100 is not a power of two up to 65536"):
        Sketch(width=100)


def test_the_gram_matrix_that_grows_with_the_steps_is_that_of_the_rows():
    sketch, generator = Sketch(width=64, max_rows=8), np.random.default_rng(0)
    for step in range(1, 30):
        sketch.add(step, generator.standard_normal(64))
        rows = sketch.rows.astype(np.float64)
        np.testing.assert_allclose(sketch.gram(), rows @ rows.T, rtol=1e-12, atol=1e-12)
