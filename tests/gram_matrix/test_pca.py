"""What ``--pca`` comes to, and why it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stores import store_of

from relexkit import Compute, RelexkitError, TrajectoryStore, gram
from relexkit.gram_matrix import pca as module
from relexkit.gram_matrix.lowrank.randomized import randomized_gram
from relexkit.gram_matrix.pca import choose, estimated_seconds, pca_gram


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    deltas = {"w": np.random.default_rng(0).standard_normal((12, 500)).cumsum(axis=0)}
    return store_of(tmp_path / "run.zarr", deltas, np.arange(1, 13))


def test_as_asked(store: TrajectoryStore) -> None:
    for pca in ("exact", "randomized"):
        choice = choose(store, pca=pca)
        assert (choice.method, choice.reason) == (pca, f"{pca} PCA, as asked")
    with pytest.raises(
        RelexkitError, match="--pca svd is unknown; choose one of auto, exact, randomized"
    ):
        choose(store, pca="svd")
    with pytest.raises(
        RelexkitError, match="--components 13 of 12 recorded steps; expected 1 to 12"
    ):
        choose(store, components=13)


def test_a_short_run_is_exact_and_a_long_one_randomized(
    store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(store)
    assert choice.method == "exact"
    assert "of randomized for 12 steps" in choice.reason
    monkeypatch.setattr(module, "_NOTABLE", 0.0)
    assert choose(store).method == "exact"
    times = [estimated_seconds(store, 12, 8)]
    many = np.arange(1, 3001)
    store.steps = many  # only their number is looked at
    times.append(estimated_seconds(store, 3000, 8))
    assert times[1][0] / times[1][1] > 3 > times[0][0] / times[0][1]
    choice = choose(store)
    assert choice.method == "randomized"
    assert choice.notable
    assert "--pca exact computes it all the same" in choice.reason
    assert choose(store, device="cuda").method == "exact"
    assert choose(store, until=20).method == "randomized"


def test_what_is_kept_is_taken(store: TrajectoryStore) -> None:
    randomized_gram(store)
    assert choose(store).method == "randomized"
    assert choose(store, until=5).method == "exact"
    gram(store)
    assert choose(store).reason == "exact PCA: its Gram matrices are kept in the store"
    np.testing.assert_array_equal(
        pca_gram(store, compute=Compute(pca="auto"), until=5).matrices,
        gram(store).matrices[:, :5, :5],
    )
    assert pca_gram(store, compute=Compute(pca="randomized", components=3)).matrices.shape == (
        1,
        12,
        12,
    )
