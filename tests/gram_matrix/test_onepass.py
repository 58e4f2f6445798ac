"""The plan of a pass and its counts; the products themselves are held to oracles in test_gram.py
and test_randomized.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stores import store_of

from relexkit import StoreError, TrajectoryStore, gram
from relexkit.gram_matrix.lowrank.randomized import randomized_gram
from relexkit.gram_matrix.onepass import Pass, dense_width, true_per_row
from relexkit.store.fastpath import shards


@pytest.mark.parametrize("width", [0, 1, 1023, 1024, 1025, 8192, 300_000])
def test_true_values_are_counted(width: int) -> None:
    mask = np.random.default_rng(width).random((5, width)) < np.array(
        [[0.0], [0.1], [0.5], [0.999], [1.0]]
    )
    np.testing.assert_array_equal(true_per_row(mask), mask.sum(axis=1))
    np.testing.assert_array_equal(
        true_per_row(mask[::2, : width // 2]), mask[::2, : width // 2].sum(axis=1)
    )


@pytest.mark.parametrize("num_rows", [1, 10, 100, 1000, 5000])
@pytest.mark.parametrize("budget", [1, 2**20, 2**28, 2**33])
def test_windows_of_dense_rows_fit_the_budget(num_rows: int, budget: int) -> None:
    width = dense_width(num_rows, 2**15, budget)
    assert width >= 2**13
    assert width % 2**15 == 0 or width < 2**15
    if width > 2**13:
        assert 2 * 4 * num_rows * width <= budget
    assert 4 * num_rows * width <= max(2**25, 4 * num_rows * 2**15)


def test_every_chunk_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numel, steps = 200_000, np.arange(1, 6)
    store = store_of(tmp_path / "run.zarr", {"w": np.ones((5, numel))}, steps)
    decoded: list[int] = []  # elements of each chunk
    real = shards._decode
    monkeypatch.setattr(
        shards, "_decode", lambda raw, out: (decoded.append(out.size), real(raw, out))
    )
    gram(store)
    chunk = store.row_chunk(0)
    assert decoded.count(chunk) == 5 * -(-numel // chunk)


@pytest.mark.parametrize("compute", [gram, randomized_gram])
def test_a_store_that_is_replaced_while_it_is_read(
    compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    deltas = {"w": np.ones((2, 100))}
    store = store_of(tmp_path / "run.zarr", deltas, np.array([1, 2]))
    other = store_of(tmp_path / "other.zarr", deltas, np.array([1, 3]))
    real = Pass.run

    def replaced(self):
        found = real(self)
        shutil.rmtree(store.path)
        shutil.copytree(other.path, store.path)
        return found

    monkeypatch.setattr(Pass, "run", replaced)
    with pytest.raises(
        StoreError, match=r"run\.zarr: other steps were recorded in place .* run the command again"
    ):
        compute(store)


def test_steps_added_while_it_is_read_do_not_disturb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relexkit.store import StoreWriter

    store = store_of(tmp_path / "run.zarr", {"w": np.ones((2, 100))}, np.array([1, 2]))
    real = Pass.run

    def appended(self):
        with StoreWriter(store.path) as writer:
            writer.begin(3)
            writer.write_row(0, np.full(100, 2, np.float32), 0)
            writer.commit()
        return real(self)

    monkeypatch.setattr(Pass, "run", appended)
    assert gram(store).steps.tolist() == [1, 2]
    monkeypatch.undo()
    assert gram(TrajectoryStore(store.path)).matrices[0].tolist() == [
        [100, 100, 200],
        [100, 100, 200],
        [200, 200, 400],
    ]
