"""The linear algebra of randomized PCA: how good a subspace is, and the Gram matrix that a pass
with it knows.

From ``Q [T, L]`` with orthonormal columns, ``G Q`` and the norms of deltas and steps, as
``randomized`` finds them.

Shape suffixes: T steps, L columns of Q.
"""

from __future__ import annotations

import numpy as np

from relexkit.gram_matrix.matrices import ROUNDING_ERROR, mirror, rounding_error

RATIO_TOLERANCE = 1e-3
ANGLE_TOLERANCE = 5e-3
"""Passes go on until the estimated errors of the first two ratios and of the first direction are
below these.
"""

# of the first eigenvalue: with a smaller gap to the second the first direction is not chased
_RESOLVED_GAP = 0.02
_CUTOFF = 1e-7  # of the largest eigenvalue: what float32 products resolve


def orthonormal(columns: np.ndarray) -> np.ndarray:
    """Orthonormal basis, of the same shape, of a space that holds ``columns [T, L]``; scaled first,
    so none is lost.
    """
    norms = np.linalg.norm(columns, axis=0)
    return np.linalg.qr(columns / np.where(norms > 0, norms, 1.0))[0]


def _ritz(basis: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values ``[L]``, descending, the norms ``[L]`` of their residuals ``G q - theta q``, and
    the vectors ``[T, L]``.
    """
    inner = basis.T @ image
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    ritz_vectors = basis @ vectors
    return values, np.linalg.norm(image @ vectors - ritz_vectors * values, axis=0), ritz_vectors


def good_enough(basis: np.ndarray, image: np.ndarray, trace: float) -> bool:
    """True if no further pass is needed for the first two ratios and the first direction; ``trace``
    is that of ``G``.
    """
    if trace == 0 or basis.shape[0] == basis.shape[1]:
        return True
    values, residuals, _ = _ritz(basis, image)
    for value, residual in zip(values[:2], residuals[:2], strict=False):
        gap = max(
            value - values[-1], 1e-300
        )  # to what lies outside Q, which the last Ritz value stands for
        if min(residual, residual**2 / gap) > RATIO_TOLERANCE * trace:
            return False
    if len(values) < 2 or values[0] - values[1] < _RESOLVED_GAP * values[0]:
        return True
    return residuals[0] <= ANGLE_TOLERANCE * (values[0] - values[1])


def complete(
    basis: np.ndarray, image: np.ndarray, norms: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix ``[T, T]`` and uncertainty ``[T]`` from ``Q``, ``G Q`` (``[T, L]``) and squared
    ``norms [2, T]``.

    The Nystrom approximation plus a remainder with the exact diagonal; see ``randomized``.
    """
    squares, lengths = norms
    trace = float(squares.sum())
    if trace == 0:
        return np.zeros((len(steps), len(steps))), np.zeros(len(steps))
    inner = basis.T @ image
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    used = values > _CUTOFF * values[-1]
    factor = image @ (vectors[:, used] / np.sqrt(values[used]))
    known = factor @ factor.T
    mirror(known)
    missing = np.maximum(squares - np.diag(known), 0.0)
    if basis.shape[0] == basis.shape[1] or missing.sum() <= ROUNDING_ERROR * trace:
        return known, rounding_error(known[None])[0]
    missing_lengths = max(0.0, float((lengths - _step_squares(known)).sum()))
    rest = _remainder(basis, missing, missing_lengths, steps)
    _, residuals, vectors = _ritz(basis, image)
    # among nearly equal eigenvalues the residual of one says little about the others, hence the
    # factor
    uncertainty = np.full(
        len(steps), 2 * residuals[:2].max() + np.linalg.norm(rest @ vectors[:, :2], axis=0).max()
    )
    uncertainty[:-1] = np.maximum(
        uncertainty[:-1], missing.cumsum()[:-1]
    )  # of a prefix nothing but its size is known
    mirror(rest)
    return known + rest, uncertainty + ROUNDING_ERROR * squares.cumsum()


def _step_squares(matrix: np.ndarray) -> np.ndarray:
    """Squared lengths of the steps, the first from the base."""
    squares = np.diag(matrix).copy()
    squares[1:] += np.diag(matrix)[:-1] - 2 * np.diag(matrix, 1)
    return squares


def _remainder(
    basis: np.ndarray, missing: np.ndarray, missing_lengths: float, steps: np.ndarray
) -> np.ndarray:
    """A walk plus independent noise, projected away from ``Q``, with the diagonal ``missing`` and
    about the given lengths.
    """
    walk = np.minimum.outer(steps, steps).astype(np.float64)
    walk -= basis @ (basis.T @ walk)
    walk -= (walk @ basis) @ basis.T
    shapes = [walk, np.eye(len(steps)) - basis @ basis.T]
    system = np.array([[np.trace(s) for s in shapes], [_step_squares(s).sum() for s in shapes]])
    wanted = np.array([missing.sum(), missing_lengths])
    scales = np.linalg.lstsq(system / wanted.max(), wanted / wanted.max(), rcond=None)[0]
    if (scales < 0).any():  # smoother than a walk, or rougher than noise: the nearer of the two
        scales = np.array([0.0, 1.0]) if scales[0] < 0 else np.array([1.0, 0.0])
    rest = scales[0] * shapes[0] + scales[1] * shapes[1]
    diagonal = np.diag(rest)
    stretch = np.sqrt(missing / np.where(diagonal > 1e-12 * diagonal.max(), diagonal, np.inf))
    return rest * np.outer(stretch, stretch)
