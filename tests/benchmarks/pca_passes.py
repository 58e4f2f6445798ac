"""One job of ``pca_scaling.py`` in a process of its own: prints a JSON document with its seconds
and what it found.

The matrix of the peers is the deltas as an uncompressed float32 file, ``[T, D]``; ours is the
store, compressed. Imports are not counted, reading is.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def spectrum_of(values: np.ndarray, total: float) -> list[float]:
    """Explained variance ratios of the first two singular values."""
    return [float(v) ** 2 / total for v in values[:2]]


def limit(path: Path) -> dict:
    """Read and decompress every dense row, and do nothing."""
    from relexkit import TrajectoryStore
    from relexkit.gram_matrix.compute.device import WORKERS
    from relexkit.store import blocks

    store = TrajectoryStore(path)
    jobs = [
        (part, row, begin, end)
        for part, spec in enumerate(store.layout.parts)
        for begin, end in blocks(spec.numel, 2**18)
        for row in range(len(store.steps))
    ]
    out = [np.empty(2**18, np.float32) for _ in range(WORKERS)]

    def work(worker: int) -> None:
        for part, row, begin, end in jobs[worker::WORKERS]:
            store.read_row(part, row, begin, end, out=out[worker][: end - begin])

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))
    return {}


def ours(method: str) -> Callable[[Path], dict]:
    """The exact or randomized Gram matrices, nothing kept from before, and their global
    spectrum.
    """

    def run(path: Path) -> dict:
        from relexkit import TrajectoryStore, gram, spectrum
        from relexkit.gram_matrix.lowrank.randomized import randomized_gram

        for name in ("gram", "randomized"):
            shutil.rmtree(path / name, ignore_errors=True)
        store = TrajectoryStore(path)
        found = gram(store) if method == "exact" else randomized_gram(store)
        [scope] = spectrum(found, scope="global").scopes
        return {
            "ratios": scope.explained_variance_ratio[:2].tolist(),
            "stated_error": scope.ratio_error,
        }

    return run


def deltas(path: Path) -> np.ndarray:
    return np.load(path.with_suffix(".npy"), mmap_mode="r")


def sklearn_incremental(path: Path) -> dict:
    """Centered by construction; batches of as many rows as components need."""
    from sklearn.decomposition import IncrementalPCA

    found = IncrementalPCA(n_components=8, batch_size=20).fit(deltas(path))
    return {"ratios": found.explained_variance_ratio_[:2].tolist(), "centered": True}


def sklearn_randomized(path: Path) -> dict:
    from sklearn.utils.extmath import randomized_svd

    matrix = np.asarray(deltas(path))
    _, values, _ = randomized_svd(matrix, n_components=8, random_state=0)
    return {
        "ratios": spectrum_of(values, float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64)))
    }


def sklearn_covariance(path: Path) -> dict:
    """Steps as the features: with weights as the features its matrix would be ``D x D``. That
    centers each step over the weights, which changes little.
    """
    from sklearn.decomposition import PCA

    found = PCA(n_components=8, svd_solver="covariance_eigh").fit(np.asarray(deltas(path)).T)
    return {"ratios": found.explained_variance_ratio_[:2].tolist()}


def dask_compressed(path: Path) -> dict:
    import dask.array as da

    matrix = da.from_array(deltas(path), chunks=(-1, 2**17))
    _, values, _ = da.linalg.svd_compressed(matrix, k=8, seed=0)
    found, total = da.compute(values, (matrix.astype("float64") ** 2).sum())
    return {"ratios": spectrum_of(found, float(total))}


def torch_lowrank(path: Path) -> dict:
    import torch

    torch.manual_seed(0)
    matrix = torch.from_numpy(np.array(deltas(path)))
    _, values, _ = torch.pca_lowrank(matrix, q=8, center=False)
    return {"ratios": spectrum_of(values.numpy(), float((matrix.double() ** 2).sum()))}


def relex(path: Path) -> dict:
    """``compute_svd`` of the released RELEX scripts, run from a clone that ``RELEX_CLONE`` names,
    on the matrix in memory.
    """
    sys.path.insert(0, str(Path(os.environ["RELEX_CLONE"]) / "scripts"))
    module = importlib.import_module("svd_extrapolation")
    matrix = np.array(deltas(path))
    began, used = time.perf_counter(), time.process_time()
    _, values, _, _ = module.compute_svd(matrix, 8)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    ratios = spectrum_of(values, float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64)))
    return {"ratios": ratios, "seconds": seconds, "cpu_seconds": cpu_seconds}


JOBS: dict[str, Callable[[Path], dict]] = {
    "limit": limit,
    "exact": ours("exact"),
    "randomized": ours("randomized"),
    "IncrementalPCA": sklearn_incremental,
    "randomized_svd": sklearn_randomized,
    "covariance_eigh": sklearn_covariance,
    "svd_compressed": dask_compressed,
    "pca_lowrank": torch_lowrank,
    "RELEX": relex,
}


def main() -> None:
    """``pca_passes.py make PATH D T [matrix]`` or ``pca_passes.py JOB PATH``."""
    job, path = sys.argv[1], Path(sys.argv[2])
    if job == "make":
        from made_store import make_store

        store = make_store(path, int(float(sys.argv[3])), int(sys.argv[4]))
        if "matrix" in sys.argv:
            rows = [
                np.concatenate(
                    [store.read_row(p, r, 0, s.numel) for p, s in enumerate(store.layout.parts)]
                )
                for r in range(len(store.steps))
            ]
            np.save(path.with_suffix(".npy"), np.stack(rows))
        return
    if job == "truth":
        matrix = np.asarray(deltas(path), np.float64)
        document = {}
        for name, about in (("uncentered", matrix), ("centered", matrix - matrix.mean(axis=0))):
            values = np.linalg.svd(np.linalg.qr(about.T, mode="r"), compute_uv=False)
            document[name] = spectrum_of(values, float((values**2).sum()))
        print(json.dumps(document))
        return
    for module in {
        "IncrementalPCA": ["sklearn.decomposition"],
        "randomized_svd": ["sklearn.utils.extmath"],
        "covariance_eigh": ["sklearn.decomposition"],
        "svd_compressed": ["dask.array"],
        "pca_lowrank": ["torch"],
    }.get(job, ["relexkit"]):
        __import__(module)
    began, used = time.perf_counter(), time.process_time()
    document = JOBS[job](path)
    document = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        **document,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
