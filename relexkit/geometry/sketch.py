"""A streaming sketch of a run: what the Gram matrix says about it, while steps arrive, in constant
memory.

A count sketch with a fixed bucket map (Charikar, Chen and Farach-Colton 2002; Clarkson and Woodruff
2013): element ``j`` of a tensor, in its stretch ``p`` of ``width`` elements, takes a random sign
and is added to bucket ``(j + offset_p) mod width``. For the sketches ``s_i`` of deltas ``m_i``,
``s_i . s_j`` estimates ``m_i . m_j`` without bias and with a standard deviation of at most ``sqrt(2
/ width) |m_i| |m_j|``. Signs and offsets come from a counter-based generator keyed by the tensor's
name, so any process, block size or restart makes the same sketch; it is linear, so those of several
processes add.

The delta of an adapter is a product of two factors. Element ``(a, b)`` takes the product of two
signs and the sum of two buckets, one of its row and one of its column, so that its sketch is a
convolution of sketches of the factors and no delta is formed (TensorSketch: Pham and Pagh 2013).
Also unbiased, with a standard deviation of at most ``sqrt(8 / width) |m_i| |m_j|``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from relexkit.geometry.shape import decompose, r_squared
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.weights.dtypes import random_bits

WIDTH = 2**14
"""Buckets: inner products are off by about 1.1 % of the norms."""

MAX_ROWS = 256
"""Steps whose sketches are held; of a longer run every second, fourth, ... and the last one."""


class Sketch:
    """Sketches of the deltas of the recorded steps.

    Memory: ``4 * width * (max_rows + 1)`` bytes, 16 MiB, whatever the numbers of steps and
    parameters.

    Attributes:
        steps: ``int64 [K]`` of the sketches that are held.
        rows: ``float32 [K, width]``.
    """

    def __init__(self, *, width: int = WIDTH, max_rows: int = MAX_ROWS, seed: int = 0):
        if width > 2**16 or width & (width - 1):
            raise ValueError(f"width {width} is not a power of two up to 65536")
        self.width, self._max_rows, self._seed = width, max_rows, seed
        signs = random_bits(seed, "relexkit sketch", 0, width) & 1
        self._signs = np.where(signs, np.float32(-1), np.float32(1))
        self.steps = np.empty(0, np.int64)
        self.rows = np.empty((0, width), np.float32)
        self._gram = np.empty((0, 0))
        self._stride = 1
        self._count = 0
        self._path = 0.0
        self._last = np.zeros(width, np.float32)

    def row(self, blocks: Iterable[tuple[str, int, np.ndarray]]) -> np.ndarray:
        """The sketch ``float64 [width]`` of one step, or of a part of it; parts add up to the
        whole.

        ``blocks``: ``(tensor, start, delta)`` with elements ``start:start+len(delta)`` of the
            tensor's delta, float32.
        """
        total = np.zeros(self.width)
        for name, start, delta in blocks:
            self._add(total, name, start, delta)
        return total

    def _add(self, total: np.ndarray, name: str, start: int, delta: np.ndarray) -> None:
        first, last = start // self.width, -(-(start + len(delta)) // self.width)
        random = random_bits(self._seed, f"relexkit sketch of {name}", 2 * first, 2 * last).reshape(
            -1, 2
        )
        for stretch, (offset, sign) in enumerate(random.tolist(), first):
            low = max(start, stretch * self.width)
            high = min(start + len(delta), (stretch + 1) * self.width)
            begin, end = low - stretch * self.width, high - stretch * self.width
            signed = delta[low - start : high - start] * self._signs[begin:end]
            take = np.subtract if sign & 1 else np.add
            at = (begin + offset) % self.width
            room = min(len(signed), self.width - at)
            for into, piece in (
                (total[at : at + room], signed[:room]),
                (total[: len(signed) - room], signed[room:]),
            ):
                take(into, piece, out=into)

    def product(self, name: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The sketch ``float64 [width]`` of a tensor's delta ``left [rows, r] @ right [r,
        columns]``, from its factors.
        """
        sides = []
        for side, factor in (("left", left.T), ("right", right)):
            random = random_bits(
                self._seed, f"relexkit sketch of {name}, {side}", 0, 2 * factor.shape[1]
            ).reshape(-1, 2)
            bucket, sign = random[:, 0] & np.uint16(self.width - 1), 1.0 - 2.0 * (random[:, 1] & 1)
            hashed = [
                np.bincount(bucket, weights=sign * column, minlength=self.width)
                for column in factor
            ]
            sides.append(np.fft.rfft(hashed, axis=1))
        return np.fft.irfft((sides[0] * sides[1]).sum(axis=0), self.width)

    def add(self, step: int, row: np.ndarray) -> None:
        """Take the whole sketch of a step, the next one of the run."""
        row = row.astype(np.float32)
        self._path += float(np.linalg.norm(row - self._last))
        self._last = row
        # the last row is there on trial: it stays if its turn in the stride has come
        kept = len(self.steps) - (self._count > 0 and (self._count - 1) % self._stride != 0)
        self.steps, self.rows = (
            np.append(self.steps[:kept], step),
            np.vstack([self.rows[:kept], row]),
        )
        with single_threaded_blas():  # a new row of the matrix, not all of it again at every step
            products = self.rows.astype(np.float64) @ row.astype(np.float64)
        self._gram = np.block([[self._gram[:kept, :kept], products[:kept, None]], [products[None]]])
        self._count += 1
        if len(self.steps) > self._max_rows:
            self._stride *= 2
            on_turn = np.arange(0, len(self.steps), 2)
            wanted = (
                on_turn
                if on_turn[-1] == len(self.steps) - 1
                else np.append(on_turn, len(self.steps) - 1)
            )
            self.steps, self.rows = self.steps[wanted], self.rows[wanted]
            self._gram = self._gram[np.ix_(wanted, wanted)]

    def update(self, step: int, blocks: Iterable[tuple[str, int, np.ndarray]]) -> dict[str, float]:
        """``add`` the sketch of a step; returns ``live_statistics``."""
        self.add(step, self.row(blocks))
        return self.live_statistics()

    def gram(self) -> np.ndarray:
        """Estimated Gram matrix ``float64 [K, K]`` of the whole model's deltas at ``steps``."""
        return self._gram

    def live_statistics(self) -> dict[str, float]:
        """What the run looks like so far; NaN where nothing can be said yet.

        - ``live_variance_1``, ``live_variance_2``: share of the variance on the first direction and
          on the first two (uncentered); 0.81 and 0.90 for a walk without direction.
        - ``live_straightness``: distance from the base over the length of the path; small for one.
        - ``live_r2``: of the first coefficient's line against the steps; 0.96 for one.

        ``relexkit spectrum`` has the run's own walk.
        """
        nothing = float("nan")
        with single_threaded_blas():
            parts = decompose(self.gram()) if len(self.steps) else None
        if parts is None or not len(parts.singular_values):
            return dict.fromkeys(
                ("live_variance_1", "live_variance_2", "live_straightness", "live_r2"), nothing
            )
        ratios = parts.explained_variance_ratio
        return {
            "live_variance_1": float(ratios[0]),
            "live_variance_2": float(ratios[:2].sum()),
            "live_straightness": (
                float(np.linalg.norm(self._last)) / self._path if self._path else nothing
            ),
            "live_r2": float(r_squared(parts.coefficients[:, :1], self.steps)[0]),
        }
