"""Predicted and recorded weights straight into a model in memory, without a folder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from relexkit.checkpoints.model_names import common_prefix, model_places
from relexkit.errors import RelexkitError
from relexkit.materialize.recorded import recorded_bits
from relexkit.materialize.sums import stream_sums
from relexkit.store import TrajectoryStore
from relexkit.weights.dtypes import FLOAT_DTYPES, Rounding, round_bits, to_float32
from relexkit.weights.layout import Layout, Segment, TensorSpec

if TYPE_CHECKING:
    import torch


def apply(
    store: TrajectoryStore,
    model: torch.nn.Module,
    weights: np.ndarray,
    *,
    rounding: Rounding = "stochastic",
    seed: int = 0,
    memory_budget_bytes: int = 2**28,
) -> None:
    """Load ``theta_0 + M^T a`` into a model in place, tensor by tensor, on whatever device it is;
    of a model that FSDP2 has split over processes, what this process holds.

    Tensors that are not float keep the model's values. An error while reading leaves the model
    partly changed.

    Args:
        model: its ``state_dict`` has the store's tensors (tied ones under either name; a
            transformers model also where it holds them under other names, or several as one).
        weights: ``a``, ``[N, T]`` over the store's moving tensors, as one row of
            ``predict_weights``, or ``[T]`` for all of them alike; all zero for the base.
        rounding: used where a parameter is less precise than float32.

    Raises:
        RelexkitError: the model lacks a tensor, or has it with another shape.
    """
    import torch

    expected = (len(store.layout.moving_tensors), len(store.steps))
    if weights.ndim == 1:
        weights = np.broadcast_to(weights, (expected[0], len(weights)))
    if weights.shape[:1] != expected[:1] or weights.ndim != 2 or weights.shape[1] > expected[1]:
        raise RelexkitError(
            f"weights of shape {list(weights.shape)}; expected {list(expected)}, one row of"
            f" predict_weights, or [{expected[1]}] for all tensors alike"
        )
    targets = _Targets(store, model, rounding, seed)

    def consume(_: int, segment: Segment, values: np.ndarray) -> None:
        targets.write(segment, values)

    with torch.no_grad():
        stream_sums(store, weights[None], consume, memory_budget_bytes, None)


def apply_step(
    store: TrajectoryStore,
    model: torch.nn.Module,
    step: int,
    *,
    rounding: Rounding = "stochastic",
    seed: int = 0,
) -> None:
    """Load a recorded step, 0 for the base, into a model in place: the weights that ``checkout``
    writes, bit for bit where the model's dtype holds them.

    Tensors that are not float keep the model's values. One pass over the step's part of the store.

    Args:
        model, rounding, seed: as for ``apply``.

    Raises:
        RelexkitError: the model lacks a tensor, or has it with another shape.
        StoreError: the step is not recorded.
    """
    import torch

    targets = _Targets(store, model, rounding, seed)
    with torch.no_grad():
        for segment, bits in recorded_bits(store, step):
            targets.write(segment, to_float32(bits, segment.tensor.dtype))


class _Targets:
    """The memory of a model's tensors, which float32 values are rounded into."""

    def __init__(
        self, store: TrajectoryStore, model: torch.nn.Module, rounding: Rounding, seed: int
    ):
        self._flat = _flat_tensors(store, _named_as_stored(store.layout, model))
        self._rounding, self._seed = rounding, seed

    def write(self, segment: Segment, values: np.ndarray) -> None:
        """Values ``float32 [segment.numel]`` into every tensor that shares the segment's."""
        import torch

        name, start = segment.tensor.name, segment.start
        for first, target in self._flat[name]:
            low, high = max(start, first), min(start + segment.numel, first + len(target))
            if low >= high:
                continue
            dtype = str(target.dtype).removeprefix("torch.")
            held = values[low - start : high - start]
            bits = round_bits(held, dtype, self._rounding, seed=self._seed, tensor=name, start=low)
            block = torch.from_numpy(bits.view(f"int{bits.itemsize * 8}")).view(target.dtype)
            target[low - first : high - first].copy_(block)


def _named_as_stored(layout: Layout, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state by the store's names: those of memory, and where tensors of the store are
    missing there, those on disk, as pieces of what memory holds, or with a prefix.
    """
    state = dict(model.state_dict())
    names = [t.name for t in layout.moving_tensors]
    lacking = {n for n in names if not state.keys() & {n, *layout.aliases().get(n, ())}}
    if not lacking:
        return state
    for name, place in model_places(model).items():
        whole = state[place.name]
        if name in lacking and whole.is_contiguous():
            piece = whole.view(-1)[place.start : place.start + math.prod(place.shape)]
            state[name] = piece.view(place.shape)
    lacking -= state.keys()
    added, removed = common_prefix(lacking, state), common_prefix(state, lacking)
    for name in lacking:
        other = added + name if added else name.removeprefix(removed)
        if other in state:
            state[name] = state[other]
    return state


def _flat_tensors(
    store: TrajectoryStore, state: dict[str, torch.Tensor]
) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """For each moving tensor, flat views of its memory in this process, each with the element that
    it begins with, under its own name and those tied to it; no views of a tensor that no step moves
    and the model lacks.
    """
    shared = store.layout.aliases()
    flat: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for tensor in store.layout.moving_tensors:
        names = [name for name in (tensor.name, *shared.get(tensor.name, ())) if name in state]
        wrong = [name for name in names if tuple(state[name].shape) != tensor.shape]
        for name in names:
            if (
                str(state[name].dtype).removeprefix("torch.") not in FLOAT_DTYPES
                or not state[name].is_contiguous()
            ):
                raise RelexkitError(
                    f"tensor {name!r} of the model is {state[name].dtype}, contiguous"
                    f" {state[name].is_contiguous()}; expected contiguous {', '.join(FLOAT_DTYPES)}"
                )
        if not names and _is_still(store, tensor):
            flat[tensor.name] = []
            continue
        if wrong or not names:
            problem = f"has it with shape {list(state[wrong[0]].shape)}" if wrong else "lacks it"
            raise RelexkitError(
                f"tensor {tensor.name!r} of shape {list(tensor.shape)}: the model {problem}"
            )
        flat[tensor.name] = [_held_here(name, state[name].detach()) for name in names]
    _refuse_shared(flat)
    return flat


def _is_still(store: TrajectoryStore, tensor: TensorSpec) -> bool:
    """True if no step moves the part that a tensor lies in."""
    parts = {segment.part for segment in store.layout.segments_of(tensor)}
    return not any(store.encoding(part).touched(store, part) for part in parts)


def _held_here(name: str, tensor: Any) -> tuple[int, torch.Tensor]:
    """The first element that this process holds of a tensor, and a flat view of what it holds.

    Raises:
        RelexkitError: a tensor that is not split by rows, as FSDP2 does.
    """
    if not hasattr(tensor, "to_local"):
        return 0, tensor.view(-1)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise RelexkitError(
            f"tensor {name!r} is split as {tensor.placements}; expected whole rows in every process"
        )
    return offsets[0] * math.prod(tensor.shape[1:]), tensor.to_local().view(-1)


def _refuse_shared(flat: dict[str, list[tuple[int, torch.Tensor]]]) -> None:
    """Refuse a model in which tensors that differ in the store are one parameter."""
    owner: dict[int, str] = {}
    for name, views in flat.items():
        for _, view in views:
            other = owner.setdefault(view.data_ptr(), name) if view.data_ptr() else name
            if other != name:
                raise RelexkitError(
                    f"the model ties {name!r} to {other!r}, which are two tensors in the store;"
                    " load the model with tie_word_embeddings=False"
                )
