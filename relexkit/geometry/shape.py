"""The shape of a trajectory, read off Gram matrices: directions, centring, cosines, straightness.

Pure functions of matrices and steps, each written once; everything that fits or compares uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from relexkit.processes import cores

_T = TypeVar("_T")

_BLOCK = 256  # matrices that a thread takes at a time

RANK_TOLERANCE = 1e-7
"""Directions with a singular value at most this fraction of the first are numerically zero and
dropped.
"""


MANY_STEPS = 256
"""Recorded steps above which only the leading directions are computed, ``LEADING`` at most: a full
decomposition grows with the cube of the steps.
"""
LEADING = 24


@dataclass(frozen=True)
class Decomposition:
    """Eigendecomposition of one Gram matrix, without its numerically zero directions; of more than
    ``MANY_STEPS`` steps its ``LEADING`` ones, as far as they could be told apart.

    Attributes:
        left: ``U [T, R]``; each column's sign makes its last coefficient positive.
        singular_values: ``S [R]``, descending.
        total: ``trace(G)``, the denominator of every ratio.
    """

    left: np.ndarray
    singular_values: np.ndarray
    total: float

    @property
    def coefficients(self) -> np.ndarray:
        """``C = U S``, ``[T, R]``."""
        return self.left * self.singular_values

    @property
    def explained_variance_ratio(self) -> np.ndarray:
        """``lambda_k / trace(G)``, ``[R]``; empty if nothing ever moved."""
        return self.singular_values**2 / self.total


def decompose(matrix: np.ndarray, least: int = 2) -> Decomposition:
    """Decompose a Gram matrix ``float64 [T, T]``. A tensor that never moved has no directions at
    all. The first ``least`` directions are known however many steps there are.
    """
    return decompose_all(matrix[None], least)[0]


def decompose_all(matrices: np.ndarray, least: int = 2) -> list[Decomposition]:
    """``decompose`` of each of ``[N, T, T]``."""

    def of(rows: slice) -> list[Decomposition]:
        block = matrices[rows]
        many = _is_many(block.shape[1], max(LEADING, least))
        pairs = _leading(block, least) if many else np.linalg.eigh(block)
        return [_from_eigenpairs(*found) for found in zip(block, *pairs, strict=True)]

    return [found for block in in_blocks(of, len(matrices)) for found in block]


def _leading(matrices: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``LEADING`` or ``least`` eigenpairs, ascending as those of ``eigh``; zero after the
    ``least`` where they are too near to the next ones to be told apart.
    """
    values, vectors, sure = _iterated(matrices, max(LEADING, least))
    _replace(matrices, values, vectors, np.flatnonzero(~sure[:, :least].all(axis=1)))
    sure[:, :least] = True
    known = np.logical_and.accumulate(sure, axis=1)
    return np.where(known, values, 0.0)[:, ::-1], vectors[:, :, ::-1]


def in_blocks(work: Callable[[slice], _T], count: int) -> list[_T]:
    """What ``work`` makes of ``count`` matrices, block after block, on every core: the products and
    decompositions of NumPy leave the interpreter free.
    """
    spans = [slice(begin, begin + _BLOCK) for begin in range(0, count, _BLOCK)]
    if len(spans) < 2:
        return [work(slice(0, count))]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(work, spans))


def _from_eigenpairs(matrix: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> Decomposition:
    values, vectors = values[::-1], vectors[:, ::-1]
    singular = np.sqrt(np.maximum(values, 0.0))
    # eigh resolves eigenvalues to about 1e-16 of the largest, singular values to the root of that
    rank = int(np.count_nonzero(singular > RANK_TOLERANCE * singular[0])) if singular[0] > 0 else 0
    left = vectors[:, :rank]
    left = left * np.where(left[-1] < 0, -1.0, 1.0)
    return Decomposition(left, singular[:rank], float(np.trace(matrix)))


def center(matrix: np.ndarray) -> np.ndarray:
    """``J G J`` with ``J = I - 11^T / T``: Gram matrices ``[..., T, T]`` about the mean checkpoint
    instead of the base.

    Zero where what is left is rounding noise: checkpoints that differ from the base but not from
    each other.
    """
    rows, columns = matrix.mean(axis=-2, keepdims=True), matrix.mean(axis=-1, keepdims=True)
    about = matrix - rows - columns + rows.mean(axis=-1, keepdims=True)
    moved, whole = np.trace(about, axis1=-2, axis2=-1), np.trace(matrix, axis1=-2, axis2=-1)
    return np.where((moved > 1e-12 * whole)[..., None, None], about, 0.0)


def r_squared(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """R^2 of the least-squares line through each column of ``values [T, R]`` against ``steps [T]``.

    NaN with fewer than three steps, where every line fits, or where a column is constant.
    """
    if len(steps) < 3:
        return np.full(values.shape[1], np.nan)
    time = steps - steps.mean()
    deviation = values - values.mean(axis=0)
    total = (deviation**2).sum(axis=0)
    total[total <= 1e-24 * (values**2).sum(axis=0)] = np.nan  # what rounding leaves of a constant
    with np.errstate(invalid="ignore", divide="ignore"):
        return (time @ deviation) ** 2 / ((time**2).sum() * total)


def update_cosines(matrix: np.ndarray) -> np.ndarray:
    """Cosines between neighbouring step-to-step updates, ``[..., T - 1]``: near 1 on a line, near 0
    on a walk without direction.

    NaN where an update is zero.
    """
    squares, products = update_products(matrix)
    norms = np.sqrt(squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / (norms[..., 1:] * norms[..., :-1])


def cosines_of_updates(matrices: np.ndarray) -> np.ndarray:
    """Cosines between all step-to-step updates, ``[..., T, T]``; the first update is the first
    delta. NaN where an update is zero.
    """
    padded = np.pad(matrices, [(0, 0)] * (matrices.ndim - 2) + [(1, 0), (1, 0)])
    products = np.diff(np.diff(padded, axis=-2), axis=-1)
    norms = np.sqrt(np.maximum(np.diagonal(products, axis1=-2, axis2=-1), 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / (norms[..., :, None] * norms[..., None, :])


def walk_gram(steps: np.ndarray) -> np.ndarray:
    """Expected Gram matrix of a walk of independent, direction-free updates recorded at ``steps``:
    ``min(s, t)``.

    It alone puts about 8/pi^2 = 81 % of the energy on the first direction and gives its coefficient
    an R^2 of about 0.96 (methods of arXiv 2605.21468 seen against Antognini and Sohl-Dickstein
    2018). ``relexkit.geometry.null`` makes it the run's own.
    """
    return np.minimum.outer(steps, steps).astype(np.float64)


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
    values, vectors, sure = _iterated(matrices, rank)
    _replace(matrices, values, vectors, np.flatnonzero(~sure.all(axis=1)))
    known = values > RANK_TOLERANCE**2 * values[:, :1]
    return np.where(known, values, 0.0), np.where(known[:, None], vectors, 0.0)


def _iterated(matrices: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimated eigenvalues ``[N, R]`` and vectors ``[N, n, R]``, descending, and which have
    converged, ``[N, R]``.

    Of many steps the start are the directions of fewer, and each matrix is multiplied until its
    directions have converged.
    """
    size = matrices.shape[1]
    if _is_many(size, rank):
        found = [_iterated_alone(matrix, rank) for matrix in matrices]
        values, vectors, sure = (np.stack(parts) for parts in zip(*found, strict=True))
        return values, vectors, sure
    block = min(size, rank + 4)
    vectors = np.linalg.qr(matrices[:, :, np.linspace(0, size - 1, block).astype(np.int64)]).Q
    for _ in range(5):
        vectors = np.linalg.qr(matrices @ (matrices @ vectors)).Q
    values, vectors, residual = _ritz(vectors, matrices @ vectors, rank)
    return values, vectors, residual <= 1e-8 * values[:, :1]


def _iterated_alone(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``_iterated`` of a matrix of many steps ``[n, n]``."""
    vectors = _start(matrix, _block(rank))
    for _ in range(12):
        products = (vectors.T @ matrix).T  # the matrix is symmetric, and this the faster way
        values, found, residual = _ritz(vectors, products, rank)
        near = np.minimum(1e-8 * values[0], 1e-4 * values)
        sure = residual <= np.maximum(near, 1e-13 * values[0])
        if sure.all():
            break
        vectors = np.linalg.qr(products).Q
    return values, found, sure


def _block(rank: int) -> int:
    """Vectors that are iterated together for the first ``rank`` directions of many steps."""
    return rank + max(8, rank // 2)


def _is_many(num_steps: int, rank: int) -> bool:
    """Whether the first ``rank`` directions of so many steps can start from those of fewer."""
    return num_steps > max(MANY_STEPS, 4 * _block(rank))


def _start(matrix: np.ndarray, block: int) -> np.ndarray:
    """Directions of evenly spaced steps, interpolated, ``[n, block]``."""
    size = len(matrix)
    rows = np.linspace(0, size - 1, max(64, 4 * block)).round().astype(np.int64)
    start = np.linalg.eigh(matrix[np.ix_(rows, rows)])[1][:, -block:]
    right = np.searchsorted(rows, np.arange(size)).clip(1)
    share = ((np.arange(size) - rows[right - 1]) / (rows[right] - rows[right - 1]))[:, None]
    between: np.ndarray = np.linalg.qr(start[right - 1] * (1 - share) + start[right] * share).Q
    return between


def _ritz(
    vectors: np.ndarray, products: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues ``[..., R]``, vectors ``[..., n, R]`` and norms of their residuals ``[..., R]``,
    from orthonormal vectors and their products.
    """
    values, turn = np.linalg.eigh(np.swapaxes(vectors, -1, -2) @ products)
    values, turn = values[..., ::-1][..., :rank], turn[..., ::-1][..., :rank]
    found = vectors @ turn
    return values, found, np.linalg.norm(products @ turn - found * values[..., None, :], axis=-2)


def _replace(
    matrices: np.ndarray, values: np.ndarray, vectors: np.ndarray, rough: np.ndarray
) -> None:
    """Replace the estimates of some matrices, whose rows are ``rough``, in place."""
    rank = values.shape[1]
    if len(rough):
        full, directions = np.linalg.eigh(matrices[rough])
        values[rough], vectors[rough] = full[:, ::-1][:, :rank], directions[:, :, ::-1][:, :, :rank]
