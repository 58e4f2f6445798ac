"""Sums of the deltas: shared directions, and the log against a dense oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import write_run

from relexkit import gram, import_checkpoints
from relexkit.materialize import moved
from relexkit.materialize.moved import Directions
from relexkit.materialize.tensors import tensor_delta, tensor_sums
from relexkit.predict.extrapolators import predict_weights
from relexkit.predict.fits import Options
from relexkit.predict.prediction import Prediction


def test_targets_on_one_line_share_a_direction(tmp_path: Path) -> None:
    run = write_run(tmp_path, motion="drift", steps=(2, 3, 7, 8, 20), dtype="bfloat16")
    matrices = gram(import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store)
    for rank, count in ((1, 1), (2, 3)):
        weights = predict_weights(matrices, [9, 21.5, 400], Prediction(options=Options(rank=rank)))
        spread = Directions(np.stack(weights))
        assert len(spread.directions) == count
        for row in range(weights[0].shape[0]):
            for weight, (which, scale) in zip(weights, spread.targets(row), strict=True):
                np.testing.assert_allclose(
                    scale * spread.directions[which, row], weight[row], rtol=2e-7, atol=1e-38
                )  # rounded to float32


def test_weights_of_nothing_have_no_direction() -> None:
    spread = Directions(np.zeros((2, 3, 4)))
    assert not spread.directions.any()
    assert list(spread.targets(0)) == [(0, 0.0), (0, 0.0)]


@pytest.mark.parametrize("entries", [1, 500, 2**19])
def test_sums_over_the_log_equal_weighted_deltas(
    entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many entries are summed at a time; weights alternate, so that suffix sums cancel."""
    monkeypatch.setattr(moved, "_ENTRIES", entries)
    run = write_run(tmp_path, motion="drift", steps=(2, 3, 7, 8, 20), dtype="bfloat16")
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store
    weights = np.random.default_rng(0).standard_normal((3, 5))
    weights[2] = 0
    for name in (store.layout.moving_tensors[0].name, store.layout.moving_tensors[-1].name):
        deltas = np.stack([tensor_delta(store, name, step) for step in run.steps])
        wanted = np.tensordot(weights, deltas.astype(np.float64), 1)
        assert deltas.any()
        np.testing.assert_allclose(
            tensor_sums(store, name, weights), wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max()
        )


def test_a_log_without_an_entry_adds_nothing(tmp_path: Path) -> None:
    norm = "model.norm.weight"  # alone in its part
    run = write_run(tmp_path, dtypes={norm: "float16"}, frozen=[norm])
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store
    assert not tensor_sums(store, norm, np.ones((2, len(store.steps)))).any()
