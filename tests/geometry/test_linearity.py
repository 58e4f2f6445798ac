"""Per-weight R^2 from every encoding against numpy's, and the walk beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from runs import write_run

from relexkit.cli import main
from relexkit.errors import ExtrapolationError
from relexkit.geometry import linearity as module
from relexkit.geometry.linearity import NUM_BINS, quantiles_of, weight_linearity
from relexkit.ingest.importer import import_checkpoints
from relexkit.materialize import checkout
from relexkit.store import TrajectoryStore

STEPS = (1, 2, 5, 9, 10, 14)
SHAPES = {
    "model.layers.0.a.weight": (60, 50),
    "model.layers.1.a.weight": (70, 31),
    "model.b.weight": (9,),
}


@pytest.fixture(params=["sparse", "dense exact", "dense float"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TrajectoryStore:
    density = 0.05 if request.param == "sparse" else 1.0
    dtype = "float32" if request.param == "dense float" else "bfloat16"
    run = write_run(
        tmp_path,
        motion="drift",
        density=density,
        shapes=SHAPES,
        steps=STEPS,
        dtype=dtype,
        extras=False,
    )
    return import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store


def expected(store: TrajectoryStore, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Histogram and number of still weights of each tensor from checked-out checkpoints, weight by
    weight.
    """
    from safetensors.torch import load_file

    states = [
        load_file(checkout(store, s, folder / str(s)) / "model.safetensors") for s in (0, *STEPS)
    ]
    counts, still = np.zeros((len(SHAPES), NUM_BINS), np.int64), np.zeros(len(SHAPES), np.int64)
    for row, tensor in enumerate(store.layout.moving_tensors):
        values = np.stack([s[tensor.name].float().numpy().ravel() for s in states]).astype(
            np.float64
        )
        deltas = values[1:] - values[0]
        for path in deltas.T:
            if np.ptp(path) == 0:
                still[row] += 1
                continue
            r2 = np.corrcoef(path, STEPS)[0, 1] ** 2
            counts[row, min(int(r2 * NUM_BINS), NUM_BINS - 1)] += 1
    return counts, still


def test_every_encoding_equals_numpy_weight_by_weight(
    store: TrajectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WINDOW", 2**16)
    found = weight_linearity(store, memory_budget_bytes=2**20)
    counts, still = expected(store, tmp_path / "out")
    np.testing.assert_array_equal(
        found.counts.sum(axis=1) + found.still, [t.numel for t in store.layout.moving_tensors]
    )
    if store.exact:
        np.testing.assert_array_equal(found.still, still)
        # a value on the border of two bins may fall to either side
        assert np.abs(np.cumsum(found.counts - counts, axis=1)).sum() <= 4
    else:  # a checkout adds the delta to the base in float32, which rounds it once more
        assert np.abs(np.cumsum(found.counts - counts, axis=1)).sum() <= 0.02 * counts.sum()


def test_the_walk_has_the_r2_of_brownian_motion() -> None:
    """Mean of R^2 of a random walk on time over many steps, against a direct simulation by
    cumulative sums.
    """
    steps = np.arange(1, 201)
    shares = module._null_shares(np.minimum.outer(steps, steps).astype(float), steps)
    walks = np.random.default_rng(1).standard_normal((20000, 200)).cumsum(axis=1)
    time = steps - steps.mean()
    centred = walks - walks.mean(axis=1, keepdims=True)
    r2 = (centred @ time) ** 2 / ((time**2).sum() * (centred**2).sum(axis=1))
    # 20000 walks on each side: 0.3 % each
    assert (shares * (np.arange(NUM_BINS) + 0.5) / NUM_BINS).sum() == pytest.approx(
        r2.mean(), abs=0.01
    )
    assert shares.sum() == pytest.approx(1)


def test_quantiles_of_known_counts() -> None:
    counts = np.zeros(NUM_BINS, np.int64)
    counts[[10, 95]] = 3, 1
    np.testing.assert_allclose(quantiles_of(counts, (0.5, 0.9)), [0.105, 0.955])
    assert np.isnan(quantiles_of(np.zeros(NUM_BINS), (0.5,))).all()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, motion="drift", density=0.3, shapes=SHAPES, steps=STEPS, extras=False)
    path = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store.path
    assert main(["linearity", path, "--scope", "global"]) == 0
    out = capsys.readouterr().out
    assert "walk without direction" in out
    assert main(["linearity", path, "--json", "--until", "9"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == [1, 2, 5, 9]
    assert sum(document["walk"]) == pytest.approx(1)
    assert main(["linearity", path, "--until", "2"]) == 1
    assert "2 recorded steps fit every line" in capsys.readouterr().err


def test_too_few_steps_say_what_to_do(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, motion="drift", density=0.3, shapes=SHAPES, steps=(1, 2), extras=False
    )
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store
    with pytest.raises(ExtrapolationError, match="expected at least 3"):
        weight_linearity(store)
