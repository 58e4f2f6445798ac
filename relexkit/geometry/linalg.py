"""How relexkit uses the linear algebra library underneath NumPy."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import numpy as np
from threadpoolctl import ThreadpoolController

RANK_TOLERANCE = 1e-7
"""Directions with a singular value at most this fraction of the first are numerically zero and
dropped.
"""


def single_threaded_blas() -> AbstractContextManager:
    """One BLAS thread while the block runs.

    All products here are small (``[T, 8192]`` times its transpose, ``T x T`` eigenvectors) and
    many; parallel work runs over windows and tensors instead. With BLAS threads on top, waiting at
    their barriers took up to 80 times the work itself on a busy machine.
    """
    return _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> ThreadpoolController:
    """The libraries that are loaded, NumPy's among them: finding them takes longer than most
    products.
    """
    return ThreadpoolController()


def update_products(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared norms ``[..., T]`` of the updates from step to step, and products of neighbouring
    ones ``[..., T - 1]``.

    Two diagonals of ``E G E^T`` with ``E`` the differencing matrix, for Gram matrices ``G [..., T,
    T]``.
    """
    diagonal, beside = (np.diagonal(matrices, offset, axis1=-2, axis2=-1) for offset in (0, 1))
    squares, products = diagonal.copy(), beside - diagonal[..., :-1]
    squares[..., 1:] += diagonal[..., :-1] - 2 * beside
    products[..., 1:] += beside[..., :-1] - np.diagonal(matrices, 2, axis1=-2, axis2=-1)
    return np.maximum(squares, 0.0), products


def leading_eigenpairs(matrices: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest ``rank`` eigenvalues ``[N, R]`` and vectors ``[N, n, R]`` of symmetric matrices;
    zero where numerically zero.

    Block subspace iteration with a Rayleigh-Ritz step: the spectra fall off fast, so a few products
    replace hundreds of full decompositions; tensors that have not converged are decomposed in full.
    """
    size = matrices.shape[1]
    block = min(size, rank + 4)
    vectors = np.linalg.qr(matrices[:, :, np.linspace(0, size - 1, block).astype(np.int64)]).Q
    for _ in range(5):
        vectors = np.linalg.qr(matrices @ (matrices @ vectors)).Q
    products = matrices @ vectors
    values, turn = np.linalg.eigh(vectors.transpose(0, 2, 1) @ products)
    values, turn = values[:, ::-1][:, :rank], turn[:, :, ::-1][:, :, :rank]
    vectors, products = vectors @ turn, products @ turn
    residual = np.linalg.norm(products - vectors * values[:, None], axis=1)
    rough = np.flatnonzero((residual > 1e-8 * values[:, :1]).any(axis=1))
    if len(rough):
        full, directions = np.linalg.eigh(matrices[rough])
        values[rough], vectors[rough] = full[:, ::-1][:, :rank], directions[:, :, ::-1][:, :, :rank]
    known = values > RANK_TOLERANCE**2 * values[:, :1]
    return np.where(known, values, 0.0), np.where(known[:, None], vectors, 0.0)
