"""The adapter of a live PEFT model: which of its weights are the base, which are trained, and a
copy of those.

Of the whole model only the factors and the tensors that the adapter holds whole
(``modules_to_save``, trained biases) are copied after a step, so it does not matter that a trainer
merges the adapter into a 16-bit base and takes it out again, which leaves the base changed by
rounding.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relexkit.checkpoints import Checkpoint
from relexkit.checkpoints.formats.peft import PREFIX, AdaptedCheckpoint, Adapter
from relexkit.checkpoints.formats.peft_config import CONFIG
from relexkit.checkpoints.stored import StoredBase
from relexkit.checkpoints.tied import split_heads
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import RelexkitError
from relexkit.record.live_weights import frozen_names, whole_weights
from relexkit.store import TrajectoryStore
from relexkit.store.encodings.bits import BLOCK
from relexkit.weights.dtypes import FLOAT_DTYPES, bits_dtype
from relexkit.weights.layout import Layout
from relexkit.weights.safetensors_io import TensorInfo

if TYPE_CHECKING:
    import torch

_OF_ADAPTER = re.compile(r"(?P<module>.+\.lora_[A-Za-z_]+)\.(?P<adapter>[^.]+)(?P<end>\..+)?")
_SAVED_MODULE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)(?P<end>\..+)")


def peft_model(model: Any) -> Any:
    """``model``, or what DDP and ``torch.compile`` wrap, if it has PEFT adapters; else None."""
    while model is not None and not hasattr(model, "peft_config"):
        model = getattr(model, "module", getattr(model, "_orig_mod", None))
    return model


class LiveAdapter(Adapter):
    """The active adapter of a PEFT model, under the names of an adapter file; values are those of
    the last ``copy``.

    Args:
        weights: name -> shape and dtype of all weights of the model, as they are gathered.

    Attributes:
        base_names: names of the base's tensors -> their names in the live model.

    Raises:
        CheckpointError: the delta of the adapter is not a product of two factors; named.
        RelexkitError: several adapters are active, the adapter is merged, or the base is quantised.
    """

    description = "the model's adapter"

    def __init__(self, model: Any, weights: Mapping[str, TensorInfo]):
        owner = peft_model(model)
        active = _active_adapter(owner)
        self._config = _config_file(owner.peft_config[active])
        self.base_names: dict[str, str] = {}
        self._keys_of: dict[str, str] = {}
        trained = weights.keys() - frozen_names(model)
        for name in weights:
            self._sort_name(name, active, name in trained)
        self._copies: dict[str, torch.Tensor] = {}
        super().__init__(
            "the model",
            json.loads(self._config),
            {key: weights[name] for name, key in self._keys_of.items()},
        )
        plain = {name: weights[live] for name, live in self.base_names.items()}
        for head, embedding in split_heads(self.shapes, plain).items():
            self.base_names[head] = self.base_names[embedding]
        quantised = [
            n
            for n in self.factors
            if n in self.base_names and weights[self.base_names[n]].shape != self.shapes[n]
        ]
        if quantised:
            raise RelexkitError(
                f"the base's {quantised[0]!r} is kept in another shape,"
                f" {list(weights[self.base_names[quantised[0]]].shape)}, probably quantised;"
                " expected the weights themselves: save every step as an adapter and import those"
                " over the base as it was before"
            )

    def _sort_name(self, name: str, active: str, trained: bool) -> None:
        short = name.removeprefix(PREFIX)
        match = _OF_ADAPTER.fullmatch(short) or _SAVED_MODULE.fullmatch(short)
        if match is None:
            plain = short.replace(".base_layer.", ".").replace(".original_module.", ".")
            self.base_names[plain] = name
            if trained:
                self._keys_of[name] = PREFIX + plain
        elif match["adapter"] == active:
            self._keys_of[name] = f"{PREFIX}{match['module']}{match['end'] or ''}"

    def over(self, base: Checkpoint) -> AdaptedCheckpoint:
        """The merged model's tensors, over a base with its own names."""
        return AdaptedCheckpoint(self, base, self)

    def base(self, weights: Checkpoint, files: Mapping[str, bytes]) -> Checkpoint:
        """The live model's ``weights``, those of the base under the base's own names."""
        return _LiveBase(weights, self.base_names, files)

    def leave_out(self, names: Collection[str]) -> None:
        """Tensors that are not recorded although they are adapted."""
        for held in (self.factors, self.saved, self.shapes):
            for name in held.keys() & set(names):
                del held[name]

    def copy(self, model: torch.nn.Module, owned: Collection[str]) -> None:
        """Take over the adapter's values, of the tensors ``owned``. A collective call if they are
        sharded.
        """
        import torch

        held, wanted = (
            self._stored_under(owned),
            self._stored_under(self.shapes),
        )  # what is wanted is so on every process
        with torch.no_grad():
            for name, whole in whole_weights(
                model, {n for n, key in self._keys_of.items() if key in wanted}
            ):
                if self._keys_of[name] in held:
                    self._copies[self._keys_of[name]] = (
                        whole.detach().to("cpu", copy=True).contiguous().view(-1)
                    )

    def _stored_under(self, names: Collection[str]) -> set[str]:
        """Names in an adapter file of what makes up the deltas of these tensors."""
        keys = {self.saved[name] for name in names if name in self.saved}
        return keys | {key for name in names if name in self.factors for key in self._keys[name]}

    def refuse_if_begun(self, base: Checkpoint) -> None:
        """Refuse an adapter whose delta, as copied, is not zero: it belongs to the base of what is
        trained now.

        Raises:
            RelexkitError: it is not zero.
        """
        if not self.over(base).is_zero():
            raise RelexkitError(
                "the adapter is not new: its delta is not zero before the first step; merge it into"
                " the base (merge_and_unload()) and train a new one, or continue its store with"
                " resume_from"
            )

    def differs_from(self, model: torch.nn.Module, store: TrajectoryStore) -> str | None:
        """A tensor of the model's base whose first block is not that of the store. A collective
        call if it is sharded.
        """
        import torch

        stored, different = StoredBase(store), None
        names = {
            live: name
            for name, live in self.base_names.items()
            if name in stored.tensors and live not in self._keys_of
        }
        for live, whole in whole_weights(model, names):
            info = stored.tensors[names[live]]
            bits = bits_dtype(info.dtype)
            ours = np.empty(
                min(BLOCK, info.numel if info.dtype in FLOAT_DTYPES else info.num_bytes), bits
            )
            stored.read_into(names[live], 0, ours)
            first = whole.detach().contiguous().view(-1)[: len(ours)].cpu()
            if info.dtype in FLOAT_DTYPES:  # the store may keep a wider copy
                first = first.to(getattr(torch, info.dtype))
            theirs = first.view(torch.uint8).numpy()[: ours.nbytes]
            if different is None and not np.array_equal(ours.view(np.uint8), theirs):
                different = names[live]
        return different

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Raw bits of elements ``start:start+len(out)`` of a tensor that was copied."""
        import torch

        piece = self._copies[name][start : start + len(out)]
        out[:] = (
            piece.view(torch.int32 if out.dtype.itemsize == 4 else torch.int16)
            .numpy()
            .view(out.dtype)
        )

    def files(self) -> dict[str, bytes]:
        """The adapter's configuration."""
        return {CONFIG: self._config}

    def metrics(self) -> dict[str, float]:
        """Nothing: metrics come with the step."""
        return {}

    def close(self) -> None:
        """Nothing to release."""


class _LiveBase(CheckpointView):
    def __init__(self, weights: Checkpoint, names: Mapping[str, str], files: Mapping[str, bytes]):
        super().__init__(weights, stored=names)
        self._files = dict(files)

    def files(self) -> dict[str, bytes]:
        return self._files


class AdapterSnapshot(AdaptedCheckpoint):
    """A copy of the owned parts of an adapter over the base in a store, readable as a
    checkpoint.
    """

    def __init__(self, adapter: LiveAdapter, store: TrajectoryStore, owned: list[int]):
        super().__init__(adapter, StoredBase(store), adapter)
        self._live, self.owned = adapter, owned
        self._names = {
            segment.tensor.name for part in owned for segment in store.layout.segments_in(part)
        }

    def copy(self, model: torch.nn.Module) -> None:
        """Take over the adapter's values. A collective call if they are sharded."""
        self._live.copy(model, self._names)

    def holds(self, part: int, layout: Layout) -> bool:
        """False for a part whose tensors are not recorded."""
        return all(segment.tensor.name in self._live.shapes for segment in layout.segments_in(part))


def _active_adapter(owner: Any) -> str:
    active = owner.active_adapters
    names = active() if callable(active) else active
    names = [names] if isinstance(names, str) else list(names)
    if len(names) != 1:
        raise RelexkitError(
            f"the model has {len(names)} active adapters, {', '.join(names)}; expected one:"
            " set_adapter(NAME)"
        )
    if any(getattr(module, "merged", False) for module in owner.modules()):
        raise RelexkitError(
            "the adapter is merged into the base; call unmerge_adapter() before recording begins"
        )
    return str(names[0])


def _config_file(config: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / CONFIG).read_bytes()
