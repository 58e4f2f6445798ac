"""The weights inside a store, the base as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relexkit.checkpoints.protocol import WholeTensors
from relexkit.store import TrajectoryStore
from relexkit.weights.safetensors_io import TensorInfo


class StoredBase(WholeTensors):
    """See ``relexkit.checkpoints.Checkpoint``; tied tensors have the elements of the tensor that
    they share.
    """

    def __init__(self, store: TrajectoryStore):
        self._store = store
        self._specs = {tensor.name: tensor for tensor in store.layout.tensors}
        self.description = f"the base in {store.path}"
        self.tensors = {
            name: TensorInfo(spec.shape, spec.dtype) for name, spec in self._specs.items()
        }

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Raw bits of elements ``start:start+len(out)``."""
        spec = self._specs[name]
        spec = self._specs[spec.tied_to] if spec.tied_to else spec
        for segment in self._store.layout.segments_of(spec):
            low, high = (
                max(start, segment.start),
                min(start + len(out), segment.start + segment.numel),
            )
            if low < high:
                shift = segment.offset - segment.start
                out[low - start : high - start] = self._store.read_base(
                    segment.part, low + shift, high + shift
                )

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files by name."""
        return self._store.files()

    def metrics(self) -> dict[str, float]:
        """Nothing: a base has no step."""
        return {}

    def close(self) -> None:
        """Nothing is held open."""


def stored_pieces(store: TrajectoryStore, row: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """The recorded weights at ``row``, in pieces: tensor, first element, raw bits. One pass over
    the log up to the row.
    """
    aliases = store.layout.aliases()
    for part in range(len(store.layout.parts)):
        for begin, end in store.windows(part):
            state = store.read_state(part, row, begin, end)
            for segment in store.layout.segments_in(part, begin, end):
                low = segment.offset - begin
                for name in (segment.tensor.name, *aliases.get(segment.tensor.name, ())):
                    yield name, segment.start, state[low : low + segment.numel]
