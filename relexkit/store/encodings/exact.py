"""Dense integer differences of the bit patterns against the base: exact, whatever moves."""

from __future__ import annotations

from typing import Any

import numpy as np

from relexkit.store.encodings.protocol import PartOfStep, Place, Recorded
from relexkit.store.encodings.rows import Rows
from relexkit.weights.dtypes import bits_dtype, to_float32
from relexkit.weights.layout import Part

_UNWRITTEN = -1


class Exact(Rows):
    """Modulo the width, so nothing overflows."""

    def stored(self, spec: Part) -> tuple[Any, float]:
        """Signed integers of the dtype's width."""
        return np.dtype(f"int{bits_dtype(spec.dtype).itemsize * 8}"), _UNWRITTEN

    def encode(
        self, step: PartOfStep, begin: int, current: np.ndarray, base: np.ndarray
    ) -> np.ndarray:
        """See ``Rows``."""
        step.refuse_nonfinite(current, range(begin, begin + len(current)), step.spec.dtype)
        return (current - base).view(f"int{current.itemsize * 8}")

    def read_state(self, store: Recorded, place: Place) -> np.ndarray:
        """See ``Encoding``."""
        base = store.read_base(place.part, place.begin, place.end)
        return base if place.row < 0 else base + self.read(store, place).view(base.dtype)

    def read_delta(
        self, store: Recorded, place: Place, base: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """See ``Encoding``; the base is not read again."""
        dtype = store.layout.parts[place.part].dtype
        state = base + self.read(store, place).view(base.dtype)
        return np.subtract(to_float32(state, dtype), to_float32(base, dtype), out=out)
