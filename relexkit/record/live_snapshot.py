"""Copies of a live model's weights, readable as a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from relexkit.checkpoints.protocol import Checkpoint, WholeTensors
from relexkit.errors import RelexkitError
from relexkit.ingest.columns import Columns, equals
from relexkit.record.live_weights import are_whole, describe_weights, whole_weights
from relexkit.store import TrajectoryStore, build_layout
from relexkit.store.encodings.bits import BLOCK
from relexkit.store.encodings.protocol import Place
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.layout import Layout
from relexkit.weights.safetensors_io import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch


class Snapshot(WholeTensors):
    """A copy of the owned parts of a model's weights, readable as a checkpoint."""

    description = "the model"

    def __init__(self, layout: Layout, owned: list[int], still: Collection[str] = ()):
        import torch

        self.owned = owned
        self.tensors = {t.name: TensorInfo(t.shape, t.dtype) for t in layout.tensors}
        self._pieces: dict[str, list[tuple[int, torch.Tensor]]] = {
            t.name: [] for t in layout.tensors
        }
        moving = [
            part
            for part, spec in enumerate(layout.parts)
            if not spec.moves or not all(s.tensor.name in still for s in layout.segments_in(part))
        ]
        self._wanted = {
            s.tensor.name for part in moving for s in layout.segments_in(part)
        }  # the same on every process
        for part in set(owned).intersection(moving):
            spec = layout.parts[part]
            dtype = getattr(torch, spec.dtype) if spec.moves else torch.uint8
            buffer = torch.empty(spec.numel, dtype=dtype, pin_memory=torch.cuda.is_available())
            for segment in layout.segments_in(part):
                piece = buffer[segment.offset : segment.offset + segment.numel]
                self._pieces[segment.tensor.name].append((segment.start, piece))

    @classmethod
    def described(cls, model: torch.nn.Module) -> Snapshot:
        """Names, shapes and dtypes of a model's weights, without values."""
        weights = [
            (name, shape, _dtype_name(dtype)) for name, shape, dtype in describe_weights(model)
        ]
        return cls(build_layout(weights, _encodings("exact")), [])

    @classmethod
    def whole(cls, model: torch.nn.Module, *, keep: bool) -> Snapshot:
        """All weights; every process takes part in gathering them, those with ``keep`` hold them.

        Where nothing has to be gathered they are the model's own, not copied, good until the next
        optimizer step.
        """
        import torch

        described = cls.described(model)
        if are_whole(model):
            for name, weight in whole_weights(model) if keep else ():
                flat = weight.detach().contiguous().view(-1)
                floats = described.tensors[name].dtype in FLOAT_DTYPES
                described._pieces[name] = [(0, flat if floats else flat.view(torch.uint8))]
            return described
        layout = layout_of(described, "exact")
        snapshot = cls(layout, list(range(len(layout.parts))) if keep else [])
        snapshot.copy(model)
        return snapshot

    def copy(self, model: torch.nn.Module) -> None:
        """Take over the model's weights, one tensor at a time. A collective call if they are
        sharded.
        """
        import torch

        with torch.no_grad():
            for name, whole in whole_weights(model, self._wanted):
                pieces = self._pieces[name]
                if pieces:
                    flat = whole.detach().contiguous().view(-1)
                    flat = flat if pieces[0][1].dtype == flat.dtype else flat.view(torch.uint8)
                for start, piece in pieces:
                    piece.copy_(flat[start : start + len(piece)], non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Raw bits of elements ``start:start+len(out)`` of an owned tensor."""
        import torch

        for first, piece in self._pieces[name]:
            low, high = max(start, first), min(start + len(out), first + len(piece))
            if low < high:
                bits = (
                    torch.int32
                    if out.dtype.itemsize == 4
                    else torch.int16
                    if out.dtype.itemsize == 2
                    else torch.uint8
                )
                out[low - start : high - start] = (
                    piece[low - first : high - first].cpu().view(bits).numpy().view(out.dtype)
                )

    def holds(self, part: int, layout: Layout) -> bool:
        """False for a part whose tensors are not recorded."""
        return all(self._pieces[segment.tensor.name] for segment in layout.segments_in(part))

    def files(self) -> dict[str, bytes]:
        """Nothing: files belong to the store."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Nothing: metrics come with the step."""
        return {}

    def close(self) -> None:
        """Nothing to release."""


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise RelexkitError(
            f"the model has a tensor of dtype {name}; expected one of {', '.join(ITEM_BYTES)}"
        )
    return name


def _encodings(float32: str) -> dict[str, str]:
    return {dtype: float32 if dtype == "float32" else "sparse" for dtype in FLOAT_DTYPES}


def layout_of(described: Checkpoint, float32: str, still: Collection[str] = ()) -> Layout:
    """The layout of a store for such checkpoints: float32 tensors in the encoding that is wanted,
    16-bit ones sparse, and what has factors as factors.
    """
    weights = [(name, info.shape, info.dtype) for name, info in described.tensors.items()]
    factors = described.factors
    return build_layout(weights, _encodings(float32), still=still, factors=factors)


def check_equals(snapshot: Any, store: TrajectoryStore, step: int) -> None:
    """The first block of every owned part of a snapshot holds what the store holds at ``step``, to
    its precision.

    Raises:
        RelexkitError: the model holds other weights.
    """
    row = store.row_of(step) if step else -1
    for part in snapshot.owned:
        if snapshot.holds(part, store.layout) and not _same(snapshot, store, part, row):
            raise RelexkitError(
                f"the model does not hold the weights of {f'step {step}' if step else 'the base'}"
                f" of {store.path}; expected the state that was saved with it: load that state, or"
                " record into a new store"
            )


def _same(snapshot: Any, store: TrajectoryStore, part: int, row: int) -> bool:
    place = Place(part, row, 0, min(store.layout.parts[part].numel, BLOCK))
    return equals(store, place, Columns(snapshot, store.layout, "the model"))
