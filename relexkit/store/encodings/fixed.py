"""Tensors that are not float: the base alone, which every step must have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import zarr

from relexkit.errors import CheckpointError
from relexkit.store.encodings.protocol import Encoding, PartOfStep, PartRow, Place, Recorded
from relexkit.store.fastpath.arrays import WritableArrays
from relexkit.store.passes import blocks
from relexkit.weights.layout import Part


class Fixed(Encoding):
    """Bytes of the base; a step adds nothing."""

    part_numel = 2**27
    moves = False

    def create(self, group: zarr.Group, part: int, spec: Part) -> None:
        """No array."""

    def arrays(self, part: int) -> tuple[str, ...]:
        """See ``Encoding``."""
        return ()

    def open(self, arrays: WritableArrays, part: int, row: int) -> PartRow:
        """Never: there is nothing to write."""
        raise NotImplementedError

    def append(self, step: PartOfStep) -> None:
        """Refuse a step that differs from the base."""
        for begin, end in blocks(step.spec.numel):
            current, base = step.weights(begin, end), step.reference(begin, end)
            if not np.array_equal(current, base):
                at = begin + int((current != base).argmax())
                raise CheckpointError(
                    f"{step.name(at)} is not float and differs from the base; "
                    "expected integer and boolean tensors to stay the same in all steps: --exclude"
                    " keeps the base's values"
                )

    def read_state(self, store: Recorded, place: Place) -> np.ndarray:
        """The base."""
        return store.read_base(place.part, place.begin, place.end)

    def contents(self, store: Recorded, part: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """Nothing that depends on a step."""
        yield from ()

    def touched(self, store: Recorded, part: int) -> bool:
        """Never."""
        return False
