"""Runs with jumps: what analysis takes of them, and the segment since the last jump against the
definition.
"""

from __future__ import annotations

import numpy as np
import pytest
from stores import store_of

from relexkit import StoreError, gram, predict_weights
from relexkit.gram_matrix.jumps import JUMP_METRIC, jumps, last_trained
from relexkit.gram_matrix.lowrank.randomized import randomized_gram
from relexkit.gram_matrix.segment import from_segment, segment_gram

STEPS = np.array([1, 2, 3, 4, 14, 15, 16, 18])
DELTAS = {
    name: np.random.default_rng(seed).normal(size=(8, width)).cumsum(axis=0).astype(np.float32)
    for seed, (name, width) in enumerate({"a": 300, "b": 7, "c": 41}.items())
}
JUMPED = np.where(np.arange(8) == 4, 10.0, np.nan)


@pytest.fixture
def store(tmp_path):
    return store_of(
        tmp_path / "run.zarr", DELTAS, STEPS, part_numel=256, metrics={JUMP_METRIC: JUMPED}
    )


def test_analysis_takes_the_steps_before_the_first_jump(store):
    assert jumps(store).tolist() == [14]
    assert gram(store).steps.tolist() == [1, 2, 3, 4]
    assert gram(store).until(2).steps.tolist() == [1, 2]
    assert randomized_gram(store).steps.tolist() == [1, 2, 3, 4]
    assert [last_trained(store, until) for until in (None, 18, 14, 13, 4, 3)] == [4, 4, 4, 13, 4, 3]


def test_a_run_without_jumps_is_taken_whole(tmp_path):
    plain = store_of(tmp_path / "run.zarr", DELTAS, STEPS)
    assert not len(jumps(plain))
    assert last_trained(plain, None) is None
    assert gram(plain).steps.tolist() == STEPS.tolist()


def test_a_run_that_begins_with_a_jump_is_refused(tmp_path):
    store = store_of(
        tmp_path / "run.zarr",
        DELTAS,
        STEPS,
        metrics={JUMP_METRIC: JUMPED[::-1].copy()[3:].tolist() + [np.nan] * 3},
    )
    with pytest.raises(StoreError, match="begins with a jump at step 1"):
        gram(store)


def test_a_segment_is_a_run_from_its_own_start(store):
    found = segment_gram(store, 14)
    assert found.steps.tolist() == [1, 2, 4]
    for name, matrix in zip(found.names, found.matrices, strict=True):
        relative = DELTAS[name][5:].astype(np.float64) - DELTAS[name][4]
        np.testing.assert_allclose(matrix, relative @ relative.T, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(segment_gram(store, 14, 16).steps, [1, 2])
    np.testing.assert_array_equal(segment_gram(store, 14, 16).matrices, found.until(2).matrices)
    whole = segment_gram(store, 0)
    for name, matrix in zip(whole.names, whole.matrices, strict=True):
        np.testing.assert_allclose(
            matrix, DELTAS[name].astype(np.float64) @ DELTAS[name].T.astype(np.float64), rtol=1e-6
        )


@pytest.mark.parametrize("start", [0, 14])
def test_weights_of_a_segment_give_the_same_deltas(store, start):
    weights = predict_weights(segment_gram(store, start), [7.0])[0]
    whole = from_segment(store, start, weights)
    for row, name in enumerate(segment_gram(store, start).names):
        delta = DELTAS[name].astype(np.float64)
        origin = delta[4] if start else 0.0
        expected = origin + weights[row] @ (delta[start < STEPS] - origin)
        np.testing.assert_allclose(whole[row] @ delta, expected, rtol=1e-9, atol=1e-9)
