"""Products through PyTorch, here on the processor, against those of NumPy; what is said where a
device is missing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import write_run
from stores import store_of

from relexkit import RelexkitError, TrajectoryStore, gram, import_checkpoints
from relexkit.gram_matrix.compute.device import CpuEngine, TorchEngine, open_engine
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.gram_matrix.exact import _OuterProducts
from relexkit.gram_matrix.lowrank.randomized import randomized_gram

TOLERANCE = 1e-6
"""Of the norms: both sides add float32 products of short stretches in float64."""


@pytest.fixture
def walk(tmp_path: Path) -> TrajectoryStore:
    deltas = {
        n: np.random.default_rng(3).standard_normal((20, size)).cumsum(axis=0)
        for n, size in (("a", 70_001), ("b", 9))
    }
    return store_of(tmp_path / "run.zarr", deltas, np.arange(1, 21), part_numel=40_000)


def on(compute: Any, device: str) -> dict[str, Any]:
    """The option that gives the device, which is one of several where they travel together."""
    if compute is randomized_gram:
        return {"compute": Compute(device=device)}
    return {"device": device}


def forget(store: TrajectoryStore) -> TrajectoryStore:
    import shutil

    for name in ("gram", "randomized"):
        shutil.rmtree(Path(store.path, name), ignore_errors=True)
    return TrajectoryStore(store.path)


@pytest.mark.parametrize("compute", [gram, randomized_gram])
def test_torch_gives_the_numbers_of_numpy(walk: TrajectoryStore, compute) -> None:
    expected = compute(walk)
    found = compute(forget(walk), **on(compute, "torch:cpu"))
    norms = np.sqrt(np.einsum("nii->ni", expected.matrices))
    assert (
        np.abs(found.matrices - expected.matrices)
        <= 3 * TOLERANCE * norms[:, :, None] * norms[:, None]
    ).all()
    np.testing.assert_array_equal(found.changed, expected.changed)


def test_torch_on_a_sparse_log(tmp_path: Path) -> None:
    run = write_run(tmp_path, motion="drift", density=0.05, steps=(2, 3, 7, 8, 40), seed=3)
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store
    expected = gram(store)
    np.testing.assert_allclose(
        gram(forget(store), device="torch:cpu").matrices, expected.matrices, rtol=1e-5, atol=1e-12
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_squares_beyond_float32(scale: float) -> None:
    rows = (np.random.default_rng(0).standard_normal((3, 100)) * scale).astype(np.float32)
    expected = rows.astype(np.float64) @ rows.astype(np.float64).T
    with ThreadPoolExecutor(1) as pool:
        for engine in (CpuEngine(), TorchEngine("torch:cpu")):
            pending = engine.submit(
                _OuterProducts(3, 0), 0, rows, engine.load(rows), (0, 100), pool
            )
            for [found] in (pending.result(), engine.product(_OuterProducts(3, 0), 0, rows)):
                np.testing.assert_allclose(
                    found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
                )


def test_a_missing_device_is_said(walk: TrajectoryStore) -> None:
    with pytest.raises(RelexkitError, match=r"--device nonsense cannot be used .*use --device cpu"):
        open_engine("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(
            RelexkitError,
            match=r"--device cuda cannot be used .*finds no CUDA device: use --device cpu",
        ):
            gram(walk, device="cuda")
    assert not Path(walk.path, "gram").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compute", [gram, randomized_gram])
def test_a_gpu_gives_the_numbers_of_numpy(walk: TrajectoryStore, compute) -> None:
    expected = compute(walk)
    found = compute(forget(walk), **on(compute, "cuda"))
    norms = np.sqrt(np.einsum("nii->ni", expected.matrices))
    assert (
        np.abs(found.matrices - expected.matrices)
        <= 3 * TOLERANCE * norms[:, :, None] * norms[:, None]
    ).all()
