"""Low-rank deltas without their dense form: Gram matrices in closed form, and weighted sums of
products.

A delta is ``scale * left_t @ right_t`` with ``left_t [rows, r]`` and ``right_t [r, columns]`` (a
LoRA adapter: Hu et al., arXiv 2106.09685). For two steps ``<left_t right_t, left_u right_u> =
sum_ij (left_t^T left_u)_ij (right_t right_u^T)_ij``: two ``r x r`` products in place of a product
over ``rows x columns`` elements. Everything here is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relexkit.store import TrajectoryStore

_BYTES = 8
_PRODUCT_RANK = 512  # inner extent of a product of stacked factors


def factor_gram(
    store: TrajectoryStore, part: int, old: int, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``old:`` of the Gram matrix of a part with factors, ``[T - old, T]``, and counts ``[2, T
    - old]``.

    The counts are of weights that changed since the previous step and that moved from the base.
    They are taken from the rows of ``left`` and the columns of ``right`` that are not zero, so a
    weight whose product happens to vanish counts.

    Reads the factors of every pair of blocks of steps once; memory: ``budget`` bytes, or that of
    two steps.
    """
    num_steps = len(store.steps)
    spec = store.layout.parts[part].factors
    assert spec is not None
    per_step = _BYTES * spec.numel
    most = max(
        1, min(budget // (4 * per_step), int((budget / (8 * _BYTES)) ** 0.5) // max(1, spec.rank))
    )
    gram = np.zeros((num_steps - old, num_steps))
    for first, last in _spans(old, num_steps, most):
        left, right = _stacked(store, part, first, last)
        for begin, end in _spans(0, last, most):
            if begin == first and end == last:
                other_left, other_right = left, right
            else:
                other_left, other_right = _stacked(store, part, begin, end)
            products = np.einsum(
                "tiuj,tiuj->tu",
                (left.T @ other_left).reshape(last - first, spec.rank, end - begin, spec.rank),
                (right @ other_right.T).reshape(last - first, spec.rank, end - begin, spec.rank),
            )
            gram[first - old : last - old, begin:end] = products
    for row in range(
        num_steps - old
    ):  # above the diagonal a block pair was computed only up to its last step
        gram[row, old + row + 1 :] = gram[row + 1 :, old + row]
    return gram * spec.scale**2, _counts(store, part, old)


class FactorSums:
    """``M^T a`` of one part with factors for several ``weights [P, T]``, a stretch of elements at a
    time.

    Up to ``budget`` bytes the factors stay in memory; beyond it they are read again for every
    stretch.
    """

    def __init__(self, store: TrajectoryStore, part: int, weights: np.ndarray, budget: int):
        spec = store.layout.parts[part].factors
        assert spec is not None
        self._store, self._part, self._spec, self._weights = store, part, spec, weights
        self._used = [int(row) for row in np.flatnonzero(weights.any(axis=0))]
        fits = 4 * spec.numel * len(self._used) <= budget
        self._kept = {row: store.read_factors(part, row) for row in self._used} if fits else {}

    def columns(self, begin: int, end: int) -> np.ndarray:
        """Elements ``begin:end``, ``float32 [P, end - begin]``; thread-safe.

        One product a prediction and group of steps: the weighted ``left`` factors side by side, the
        ``right`` ones below each other.
        """
        columns, group = self._spec.columns, max(1, _PRODUCT_RANK // max(1, self._spec.rank))
        first_row, last_row = begin // columns, -(-end // columns)
        sums = np.zeros((len(self._weights), last_row - first_row, columns))
        for first, last in _spans(0, len(self._used), group):
            rows = self._used[first:last]
            pairs = [
                self._kept.get(row) or self._store.read_factors(self._part, row) for row in rows
            ]
            lefts = np.stack(
                [left[first_row:last_row] for left, _ in pairs], axis=1, dtype=np.float64
            )
            rights = np.concatenate([right for _, right in pairs], axis=0, dtype=np.float64)
            for total, weight in zip(sums, self._weights[:, rows] * self._spec.scale, strict=True):
                total += (lefts * weight[:, None]).reshape(len(lefts), -1) @ rights
        start = begin - first_row * columns
        return sums.reshape(len(sums), -1)[:, start : start + end - begin].astype(np.float32)


def stacked_sum(
    store: TrajectoryStore, part: int, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of ``M^T a`` itself, float64: ``left [rows, n r]`` (weighted and scaled) and ``right
    [n r, columns]``.

    ``n`` is the number of non-zero ``weights [T]``. Memory: the factors of that many steps.
    """
    spec = store.layout.parts[part].factors
    assert spec is not None
    used = [int(row) for row in np.flatnonzero(weights)]
    lefts, rights = [np.zeros((spec.rows, 0))], [np.zeros((0, spec.columns))]
    for row in used:
        left, right = store.read_factors(part, row)
        lefts.append(left.astype(np.float64) * (weights[row] * spec.scale))
        rights.append(right.astype(np.float64))
    return np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)


def singular_values(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Singular values of ``left [rows, n] @ right [n, columns]``, descending, from QR
    factorisations of both factors.
    """
    r_left, r_right = (np.linalg.qr(factor)[1] for factor in (left, right.T))
    return np.linalg.svd(r_left @ r_right.T, compute_uv=False)


def compress(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of at most ``rank`` whose product is the best approximation of ``left @ right``
    (Eckart and Young 1936).

    The square roots of the singular values go to either side.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, singular, vt = np.linalg.svd(r_left @ r_right.T)
    keep = min(rank, len(singular))
    root = np.sqrt(singular[:keep])
    return q_left @ (u[:, :keep] * root), (root[:, None] * vt[:keep]) @ q_right.T


def _stacked(
    store: TrajectoryStore, part: int, first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """``left`` factors of some steps side by side ``[rows, n r]`` and ``right`` ones below each
    other ``[n r, columns]``.
    """
    pairs = [store.read_factors(part, row) for row in range(first, last)]
    return (
        np.concatenate([left for left, _ in pairs], axis=1, dtype=np.float64),
        np.concatenate([right for _, right in pairs], axis=0, dtype=np.float64),
    )


def _counts(store: TrajectoryStore, part: int, old: int) -> np.ndarray:
    counts = np.zeros((2, len(store.steps) - old), np.int64)
    previous: tuple[np.ndarray, np.ndarray] | None = (
        store.read_factors(part, old - 1) if old else None
    )
    for row in range(old, len(store.steps)):
        left, right = store.read_factors(part, row)
        rows, columns = left.any(axis=1), right.any(axis=0)
        counts[1, row - old] = rows.sum() * columns.sum()
        if previous is None:
            counts[0, row - old] = counts[1, row - old]
        elif not (np.array_equal(left, previous[0]) and np.array_equal(right, previous[1])):
            rows, columns = rows | previous[0].any(axis=1), columns | previous[1].any(axis=0)
            counts[0, row - old] = rows.sum() * columns.sum()
        previous = left, right
    return counts


def _spans(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(begin, end, size):
        yield first, min(first + size, end)
