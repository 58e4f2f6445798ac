"""A base that a store refers to: where it lies, and the checksums that every read is compared
with.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from relexkit import hooks
from relexkit.errors import RelexkitError, StoreError
from relexkit.store.codecs import BASE_CHUNK
from relexkit.store.encodings.bits import block_checksums
from relexkit.weights.columns import read_columns
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.layout import Layout
from relexkit.weights.safetensors_io import TensorInfo

FORMAT_VERSION = 3
"""Of stores with such a base."""

CHECKSUMS = "base-checksums"
"""The array of the CRC-32C of every block of ``BASE_CHUNK`` columns, part after part."""

VARIABLE = "RELEXKIT_BASE"
"""Of the environment: where the base is now."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where a base is.

    Attributes:
        place: an absolute path, or ``hf://OWNER/NAME@COMMIT``.
        tensors: tensors of the store that have another name there, or begin inside another tensor:
            name -> name there and first element.
    """

    place: str
    tensors: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the description of a store."""
        moved = {name: list(place) for name, place in self.tensors.items()}
        return {"place": self.place, "tensors": moved}

    @classmethod
    def from_json(cls, document: Any) -> Reference:
        """Inverse of ``to_json``.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: it is malformed.
        """
        tensors = {name: (inside, first) for name, (inside, first) in document["tensors"].items()}
        for value in [document["place"], *(inside for inside, _ in tensors.values())]:
            if not isinstance(value, str):
                raise TypeError(f"base_reference has {value!r} for a name")
        if any(type(first) is not int or first < 0 for _, first in tensors.values()):
            raise ValueError("base_reference has an element that is not a whole number")
        return cls(place=document["place"], tensors=tensors)


def num_blocks(layout: Layout) -> list[int]:
    """Blocks of every part that have a checksum of their own."""
    return [-(-spec.numel // BASE_CHUNK) for spec in layout.parts]


class ReferencedBase:
    """Reads a base that a store refers to. It is opened by the first read; no byte is given that
    differs from what was there when the store was made.

    Args:
        path, sha256: of the store and of its base, as messages name them.
        checksums: reads the array ``CHECKSUMS``.
    """

    def __init__(
        self,
        path: str,
        layout: Layout,
        reference: Reference,
        sha256: str,
        checksums: Callable[[], np.ndarray],
    ):
        self._path, self._layout, self._reference, self._sha256 = path, layout, reference, sha256
        self._first_block = [0, *itertools.accumulate(num_blocks(layout))]
        self._read_checksums = checksums
        self._lock = threading.Lock()
        self._opened: _Renamed | None = None

    def read(self, part: int, begin: int, end: int) -> np.ndarray:
        """Bits of columns ``begin:end`` of a part. Whole blocks of ``BASE_CHUNK`` are read.

        Raises:
            StoreError: the base is not where it was, or differs.
        """
        low = begin // BASE_CHUNK * BASE_CHUNK
        high = min(-(-end // BASE_CHUNK) * BASE_CHUNK, self._layout.parts[part].numel)
        try:
            bits = read_columns(self._base(), self._layout, part, low, high)
        except (RelexkitError, OSError) as error:
            if isinstance(error, StoreError):
                raise
            raise self._refused(f"cannot be read at {self._place} ({error})") from error
        first = self._first_block[part] + low // BASE_CHUNK
        for number, found in enumerate(block_checksums(bits, BASE_CHUNK)):
            if found != self._checksums[first + number]:
                column = max(begin, low + number * BASE_CHUNK)
                name = self._layout.segments_in(part, column)[0].tensor.name
                raise self._refused(f"differs at {self._place}, in or near tensor {name!r}")
        return bits[begin - low : end - low]

    @property
    def _place(self) -> str:
        return os.environ.get(VARIABLE) or self._reference.place

    @cached_property
    def _checksums(self) -> list[int]:
        checksums = self._read_checksums().tolist()
        if len(checksums) != self._first_block[-1]:
            raise StoreError(
                f"{self._path}: {CHECKSUMS} has {len(checksums)} entries; expected"
                f" {self._first_block[-1]}: restore the store from a copy"
            )
        return checksums

    def _base(self) -> _Renamed:
        with self._lock:
            if self._opened is None:
                opened = hooks.open_checkpoint(self._place)
                close = weakref.finalize(self, opened.close)
                try:
                    self._opened = self._renamed(opened)
                except BaseException:
                    close()
                    raise
            return self._opened

    def _renamed(self, opened: Any) -> _Renamed:
        """The base by the names of the store, if it has what is read of it."""
        places = {}
        for tensor in self._layout.tensors:
            if tensor.tied_to is not None:
                continue
            inside, first = self._reference.tensors.get(tensor.name, (tensor.name, 0))
            info = opened.tensors.get(inside)
            if info is None or info.numel < first + math.prod(tensor.shape):
                raise self._refused(f"has no tensor at {self._place} that is {tensor.name!r}")
            if info.dtype != tensor.dtype and not {info.dtype, tensor.dtype} <= set(FLOAT_DTYPES):
                raise self._refused(f"has {info.dtype} at {self._place} for {tensor.name!r}")
            places[tensor.name] = inside, first
        return _Renamed(opened, places)

    def _refused(self, reason: str) -> StoreError:
        return StoreError(
            f"{self._path}: its base, which it only refers to, {reason}; expected the base with"
            f" sha256 {self._sha256[:16]}: put it back, or set {VARIABLE} to where it is now, a"
            " folder or hf://OWNER/NAME@REVISION"
        )


class _Renamed:
    """A checkpoint by the names of a store."""

    def __init__(self, inner: Any, places: Mapping[str, tuple[str, int]]):
        self._inner, self._places = inner, places
        self.tensors: Mapping[str, TensorInfo] = {
            name: inner.tensors[inside] for name, (inside, _) in places.items()
        }

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        inside, first = self._places[name]
        self._inner.read_into(inside, first + start, out)
