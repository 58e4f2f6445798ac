"""Low-rank adapters: the two factors of a tensor's delta, bit for bit; the delta is
``scale * left @ right``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import zarr

from relexkit.store.codecs import DENSE_CODECS, create_array, rows_of
from relexkit.store.encodings.bits import block_checksums, content_checksum, factor_product
from relexkit.store.encodings.protocol import (
    ROW_CHUNK,
    Encoding,
    PartOfStep,
    Place,
    Recorded,
)
from relexkit.store.fastpath.arrays import WritableArrays
from relexkit.weights.dtypes import bits_dtype, round_bits, to_float32
from relexkit.weights.layout import Factors, Part


class LowRank(Encoding):
    """A part is one tensor."""

    needs_base = False
    format_version = 2  # readers of version 1 do not know it

    def create(self, group: zarr.Group, part: int, spec: Part) -> None:
        """One array, of ``left`` before ``right``."""
        factors = _of(spec)
        bits = bits_dtype(factors.dtype)
        grid = rows_of(factors.numel, ROW_CHUNK)
        create_array(group, f"factors/{part}", grid, bits, DENSE_CODECS, int(np.iinfo(bits).max))

    def arrays(self, part: int) -> tuple[str, ...]:
        """See ``Encoding``."""
        return (f"factors/{part}",)

    def open(self, arrays: WritableArrays, part: int, row: int) -> _FactorsRow:
        """See ``Encoding``; the bits are one piece."""
        return _FactorsRow(arrays, part, row)

    def append(self, step: PartOfStep) -> None:
        """See ``Encoding``."""
        bits = step.factor_bits()
        step.put(bits)
        step.finish(content_checksum(block_checksums(bits)))

    def bits(self, store: Recorded, part: int, row: int) -> np.ndarray:
        """Raw bits of one step's factors, flat."""
        numel = _of(store.layout.parts[part]).numel
        return store.read_array(f"factors/{part}", Place(part, row, 0, numel))

    def read(self, store: Recorded, part: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """One step's factors as float32: ``left [rows, rank]`` and ``right [rank, columns]``,
        without the scale.
        """
        spec = _of(store.layout.parts[part])
        values = to_float32(self.bits(store, part, row), spec.dtype)
        left, right = np.split(values, [spec.rows * spec.rank])
        return left.reshape(spec.rows, spec.rank), right.reshape(spec.rank, spec.columns)

    def read_state(self, store: Recorded, place: Place) -> np.ndarray:
        """The merged weights, rounded stochastically (seed 0) where the base is less precise than
        the adapter.
        """
        part, row, begin, end = place
        base = store.read_base(part, begin, end)
        if row < 0:
            return base
        dtype, [segment] = store.layout.parts[part].dtype, store.layout.segments_in(part)
        values = to_float32(base, dtype) + self.read_delta(store, place, base)
        return round_bits(values, dtype, "stochastic", tensor=segment.tensor.name, start=begin)

    def read_delta(
        self, store: Recorded, place: Place, base: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The product in float32."""
        part, row, begin, end = place
        product = factor_product(*self.read(store, part, row), begin, end)
        return np.multiply(product, np.float32(_of(store.layout.parts[part]).scale), out=out)

    def contents(self, store: Recorded, part: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """The factors, once."""
        for row in range(len(store.steps) if begin == 0 else 0):
            yield self.bits(store, part, row)

    def equals(
        self, store: Recorded, place: Place, weights: np.ndarray, state: np.ndarray | None = None
    ) -> bool:
        """Whether the factors are ``weights``; whether their product is zero, for the base."""
        if place.row >= 0:
            return np.array_equal(weights, self.bits(store, place.part, place.row))
        spec = _of(store.layout.parts[place.part])
        left, right = np.split(weights, [spec.rows * spec.rank])
        return not (left.any() and right.any())

    def chunk(self, spec: Part) -> int:
        """Any number: every read computes the product anew."""
        return self.window


def _of(spec: Part) -> Factors:
    assert spec.factors is not None, "the layout was checked"
    return spec.factors


class _FactorsRow:
    def __init__(self, arrays: WritableArrays, part: int, row: int):
        self._array, self._row = arrays.array(f"factors/{part}"), row

    def append(self, *piece: np.ndarray) -> None:
        [bits] = piece
        self._array[self._row, :] = bits

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass
