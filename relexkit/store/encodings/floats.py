"""Dense float32 deltas against the base, rounded to a number of mantissa bits: for float32 master
weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from relexkit.store.encodings.bits import float_row
from relexkit.store.encodings.protocol import PartOfStep, Place, Recorded
from relexkit.store.encodings.rows import Rows
from relexkit.weights.dtypes import round_bits, round_to_mantissa_bits, to_float32
from relexkit.weights.layout import Part

_LARGE = np.float32(2.0**127)  # rounding takes no smaller number beyond the largest


class Floats(Rows):
    """The weights come back to a relative error of ``2 ** -(mantissa_bits + 1)`` of the delta."""

    exact = False
    needs_base = False

    def stored(self, spec: Part) -> tuple[Any, float]:
        """Float32; NaN is never recorded."""
        return np.float32, float("nan")

    def encode(
        self, step: PartOfStep, begin: int, current: np.ndarray, base: np.ndarray
    ) -> np.ndarray:
        """The float32 difference, in place of ``current`` if that has room."""
        dtype = step.spec.dtype
        room = current.view(np.float32) if dtype == "float32" else None
        with np.errstate(over="ignore", invalid="ignore"):
            delta = np.subtract(to_float32(current, dtype), to_float32(base, dtype), out=room)
        if not _is_small(delta):
            self._refuse(step, begin, delta)
        return delta

    def round(self, step: PartOfStep, begin: int, piece: np.ndarray) -> None:
        """To the store's mantissa bits."""
        large = not _is_small(piece)
        round_to_mantissa_bits(piece, step.mantissa_bits or 23)
        if large:
            self._refuse(step, begin, piece)

    def sketch(self, step: PartOfStep, begin: int, row: np.ndarray) -> np.ndarray | None:
        """Before they are rounded."""
        return step.sketch(begin, row)

    def _refuse(self, step: PartOfStep, begin: int, delta: np.ndarray) -> None:
        columns = range(begin, begin + len(delta))
        step.refuse_nonfinite(delta.view(np.uint32), columns, "float32")

    def read_state(self, store: Recorded, place: Place) -> np.ndarray:
        """The base plus the delta, rounded to nearest."""
        part, row, begin, end = place
        base = store.read_base(part, begin, end)
        if row < 0:
            return base
        dtype, tensor = store.layout.parts[part].dtype, store.layout.segments_in(part, begin)
        values = to_float32(base, dtype) + self.read(store, place)
        return round_bits(values, dtype, "nearest", tensor=tensor[0].tensor.name)

    def read_delta(
        self, store: Recorded, place: Place, base: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """See ``Encoding``."""
        return self.read(store, place, out)

    def equals(
        self, store: Recorded, place: Place, weights: np.ndarray, state: np.ndarray | None = None
    ) -> bool:
        """Whether ``weights`` give the rounded delta that is kept."""
        base = store.read_base(place.part, place.begin, place.end)
        if place.row < 0:
            return np.array_equal(base, weights)
        dtype = store.layout.parts[place.part].dtype
        delta = float_row(base, weights, dtype, store.mantissa_bits or 23)
        return np.array_equal(delta, self.read(store, place))


def _is_small(delta: np.ndarray) -> bool:
    return bool(delta.min() > -_LARGE and delta.max() < _LARGE)  # False if one is NaN
