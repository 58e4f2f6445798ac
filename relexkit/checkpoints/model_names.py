"""Names of tensors in memory against names on disk.

A model in memory may hold its tensors under other names than its checkpoints, and several of them
as one: the experts of a mixture lie apart on disk and fused in memory, a vision model's language
part moved between releases. What transformers writes is taken from its own conversion; what it does
by prefix when it loads (``h.0`` for ``transformer.h.0``) is found by comparing names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from relexkit.checkpoints.protocol import Checkpoint, Run
from relexkit.checkpoints.view import CheckpointView, RunView
from relexkit.weights.safetensors_io import TensorInfo


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint lies in memory: in ``name``, from element ``start`` on."""

    name: str
    start: int
    shape: tuple[int, ...]

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        """True if the tensor is all of ``name``, which has ``shape``."""
        return self.start == 0 and self.shape == shape


class OnDisk(CheckpointView):
    """A checkpoint with the names of memory, seen under the names that are written to disk."""

    def __init__(self, checkpoint: Checkpoint, places: Mapping[str, Place]):
        super().__init__(checkpoint)
        moved = {n: p for n, p in places.items() if _is_at(p, checkpoint.tensors)}
        left = {place.name for place in moved.values()}
        self._places = moved
        self.tensors = {
            **{n: i for n, i in checkpoint.tensors.items() if n not in left},
            **{n: TensorInfo(p.shape, checkpoint.tensors[p.name].dtype) for n, p in moved.items()},
        }

    def place(self, name: str) -> tuple[str, int]:
        """See ``CheckpointView``."""
        place = self._places.get(name)
        return (name, 0) if place is None else (place.name, place.start)


def _is_at(place: Place, tensors: Mapping[str, TensorInfo]) -> bool:
    info = tensors.get(place.name)
    return info is not None and place.start + TensorInfo(place.shape, info.dtype).numel <= (
        info.numel
    )


def named_alike(run: Run, base: Checkpoint, first: Checkpoint) -> tuple[Run, Checkpoint]:
    """Run and base under the same names: those on disk where one has the names of memory, those of
    the run where they differ by a prefix; unchanged if nothing helps.

    Args:
        first: a checkpoint of the run, open.
    """
    if first.tensors.keys() == base.tensors.keys():
        return run, base
    files = {**base.files(), **first.files()}
    places = config_places(files.get("config.json", b""))
    if places:
        on_disk = OnDisk(first, places), OnDisk(base, places)
        if _num_common(*on_disk) > _num_common(first, base):
            first, base = on_disk
            run = RunView(run, lambda checkpoint: OnDisk(checkpoint, places))
    return run, under_prefix(base, first.tensors)


def _num_common(first: Checkpoint, second: Checkpoint) -> int:
    pairs = ((first.tensors.get(name), info) for name, info in second.tensors.items())
    return sum(mine is not None and mine.shape == info.shape for mine, info in pairs)


def under_prefix(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint with the prefix that ``names`` have before its own names, or without the one
    that they lack; itself if there is no such prefix.
    """
    added = common_prefix(checkpoint.tensors, names)
    removed = common_prefix(names, checkpoint.tensors) if not added else ""
    if not added and not removed:
        return checkpoint
    wanted = set(names)
    stored = {}
    for name in checkpoint.tensors:
        other = added + name if added else name.removeprefix(removed)
        stored[other if other in wanted or name not in wanted else name] = name
    return CheckpointView(checkpoint, stored=stored)


def common_prefix(short: Collection[str], long: Collection[str]) -> str:
    """The prefix, ending in a dot, that makes most of the names that only ``long`` has out of names
    that only ``short`` has; empty if there is none.

    >>> common_prefix(["wte.weight", "h.0.ln.weight"], ["transformer.wte.weight", "lm_head.weight"])
    'transformer.'
    """
    mine, theirs = set(short) - set(long), set(long) - set(short)
    prefixes: Counter[str] = Counter()
    for name in theirs:
        pieces = name.split(".")
        for cut in range(1, len(pieces)):
            if ".".join(pieces[cut:]) in mine:
                prefixes[".".join(pieces[:cut]) + "."] += 1
    prefix, count = max(
        prefixes.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0)
    )
    return prefix if 2 * count >= len(theirs) else ""


def in_memory(base: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The base under the names of memory, as far as the tensors are the same, if ``names``, those
    that an adapter changes, are such names.
    """
    if all(name in base.tensors for name in names):
        return base
    places = config_places(base.files().get("config.json", b""))
    renamed = {
        n: places[n].name if n in places and _is_whole(n, places, base) else n for n in base.tensors
    }
    view: Checkpoint = CheckpointView(base, stored={new: old for old, new in renamed.items()})
    if sum(n in view.tensors for n in names) <= sum(n in base.tensors for n in names):
        view = base
    lacking = {n for n in names if n not in view.tensors}
    prefix = common_prefix(view.tensors, lacking) if lacking else ""
    if not prefix:
        return view
    bare = {n for n in view.tensors if prefix + n not in view.tensors and n not in names}
    return CheckpointView(view, stored={prefix + n if n in bare else n: n for n in view.tensors})


def _is_whole(name: str, places: Mapping[str, Place], base: Checkpoint) -> bool:
    shared = sum(place.name == places[name].name for place in places.values())
    return shared == 1 and places[name].is_whole(base.tensors[name].shape)


# -- transformers ----------------------------------------------------------------------------------


def config_places(config: bytes) -> dict[str, Place]:
    """Place in memory of every tensor that transformers writes for this ``config.json``; empty if
    it does not know the architecture, or has another way to write it.

    Builds the model without memory for its weights. Never runs code of a checkpoint.
    """
    try:
        document = json.loads(config)
        architecture = document["architectures"][0]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return {}
    import torch
    import transformers

    kind = getattr(transformers, str(architecture), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return {}
    settings: Any = kind.config_class
    try:
        with torch.device("meta"):
            model = kind(settings.from_dict(document))
    except Exception:  # a configuration of another release, or damaged: names stay as they are
        return {}
    return model_places(model)


def model_places(model: Any) -> dict[str, Place]:
    """Name on disk -> place in the ``state_dict`` of a live transformers model, for what it writes;
    empty for another model.
    """
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # a release whose names in memory are those on disk
        return {}
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return {}
    empty = {
        name: torch.empty(tensor.shape, device="meta")
        for name, tensor in model.state_dict().items()
    }
    owner = {tensor.untyped_storage()._cdata: name for name, tensor in empty.items()}
    try:
        with _uncopied():
            written = revert_weight_conversion(model, dict(empty))
    except Exception:  # an operation that needs values: nothing is known then
        return {}
    places = {}
    for name, tensor in written.items():
        held = owner.get(tensor.untyped_storage()._cdata)
        if held is None or not tensor.is_contiguous():
            return {}  # transposed or interleaved on disk: no piece of memory is the tensor
        places[name] = Place(held, tensor.storage_offset(), tuple(tensor.shape))
    return places


def _uncopied() -> AbstractContextManager[Any]:
    """A mode in which ``contiguous`` copies nothing, so that a piece of a tensor stays a view of
    it.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Uncopied(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.Tensor.contiguous:
                return args[0]
            return function(*args, **(kwargs or {}))

    return Uncopied()
