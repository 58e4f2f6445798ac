"""The columns of a part from the tensors that lie there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from relexkit.weights.dtypes import bits_dtype, widen_bits
from relexkit.weights.layout import Layout
from relexkit.weights.safetensors_io import TensorInfo


class Tensors(Protocol):
    """What columns are read from."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the layout, in its dtype or in one that is widened to it."""

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with raw bits of elements ``start:start+len(out)``."""


def read_columns(
    source: Tensors,
    layout: Layout,
    part: int,
    begin: int,
    end: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Bits of columns ``begin:end`` of a part, widened to the part's dtype; into ``out`` if
    given.
    """
    if out is None:
        out = np.empty(end - begin, bits_dtype(layout.parts[part].dtype))
    for segment in layout.segments_in(part, begin, end):
        name, dtype = segment.tensor.name, segment.tensor.dtype
        stored = source.tensors[name].dtype
        target = out[segment.offset - begin : segment.offset - begin + segment.numel]
        if stored == dtype:
            source.read_into(name, segment.start, target)
        else:
            raw = np.empty(segment.numel, bits_dtype(stored))
            source.read_into(name, segment.start, raw)
            target[:] = widen_bits(raw, stored, dtype)
    return out
