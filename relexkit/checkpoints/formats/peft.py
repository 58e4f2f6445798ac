"""PEFT adapters: a run whose steps are LoRA adapters of one base model. The factors are read, never
the dense delta.

A step is a sub-folder with ``adapter_config.json`` and ``adapter_model.safetensors`` in it, in
``lora_adapter/`` or in ``actor/lora_adapter/`` (verl). The delta of a target is ``alpha / r * B
A``, with rsLoRA ``alpha / sqrt(r) * B A`` (Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv
2312.03732), ``r`` and ``alpha`` possibly by pattern; ``modules_to_save`` and trained biases are
whole tensors. Variants whose delta is something else are refused by name.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints.formats.huggingface import (
    SafetensorsFiles,
    TorchFiles,
    trainer_metrics,
)
from relexkit.checkpoints.formats.key_names import without_wrappers
from relexkit.checkpoints.formats.peft_config import CONFIG, MERGE, read_config, read_settings
from relexkit.checkpoints.model_names import in_memory
from relexkit.checkpoints.protocol import Checkpoint, Run, WholeTensors
from relexkit.checkpoints.same_tensors import refuse_quantised
from relexkit.checkpoints.small_files import model_files, read_small
from relexkit.checkpoints.tied import split_heads, with_heads
from relexkit.errors import CheckpointError
from relexkit.weights.dtypes import FLOAT_DTYPES, bits_dtype, nonfinite_index, widen_bits
from relexkit.weights.layout import Factors
from relexkit.weights.safetensors_io import TensorInfo

WEIGHTS, WEIGHTS_BIN = "adapter_model.safetensors", "adapter_model.bin"
_INSIDE = (".", "lora_adapter", "actor/lora_adapter", "actor/huggingface/lora_adapter")
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(?:\.default)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>A|B)(?:\.default)?")
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")


def find(folder: Path) -> Path | None:
    """The folder with the adapter, in or below a step's folder."""
    return next(
        (folder / inside for inside in _INSIDE if (folder / inside / CONFIG).is_file()), None
    )


class Adapter(WholeTensors, ABC):
    """LoRA factors and whole tensors under the names that an adapter file gives them, wherever they
    lie.

    Attributes:
        factors: weights of the base whose delta is a product, with its shape, rank and scale.
        saved: weights and biases of the base that the adapter holds whole -> their names in the
            file.
        base_name: what the configuration calls the base, if it does.
    """

    base_name: Any = None

    def __init__(self, where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]):
        self.where, self.tensors = where, tensors
        self._settings = read_settings(config, f"{where}/{CONFIG}")
        self._sort_tensors()

    @property
    def adapter(self) -> Adapter:
        """See ``relexkit.checkpoints.Checkpoint``."""
        return self

    @abstractmethod
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Raw bits of elements ``start:start+len(out)`` of a stored tensor."""

    def check_base(self, base: Checkpoint) -> None:
        """Refuse a base that the adapter was not trained on, as far as it holds some of it."""

    def _sort_tensors(self) -> None:
        """Decide for every stored tensor what it is; anything unknown is an error."""
        pairs: dict[tuple[str, str], dict[str, str]] = {}
        self.saved: dict[str, str] = {}
        self.base_layers: dict[str, str] = {}
        for key in self.tensors:
            plain = without_wrappers(key).removeprefix("module.")
            short = plain.removeprefix(PREFIX)
            embedding, factor = _EMBEDDING.fullmatch(short), _FACTOR.fullmatch(short)
            match = embedding or factor
            if match:
                pairs.setdefault((match["module"], "embedding" if embedding else "linear"), {})[
                    match["side"]
                ] = key
            elif short.endswith(".base_layer.weight"):
                self.base_layers[short.removesuffix(".base_layer.weight") + ".weight"] = key
            elif ".lora_" in short or plain == short:
                raise CheckpointError(
                    f"{self.where}: holds {key!r}, which is neither a LoRA factor nor a"
                    f" whole tensor; {MERGE}"
                )
            else:
                self.saved[_SAVED.sub("", short).replace(".base_layer.", ".")] = (
                    key  # a trained bias of a target
                )
        if not pairs:
            raise CheckpointError(
                f"{self.where}: holds no LoRA factors; the training did not gather them before"
                " saving"
            )
        self._keys: dict[str, tuple[str, str]] = {}
        self.factors: dict[str, Factors] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: self.tensors[key].shape for name, key in self.saved.items()
        }
        for (module, kind), sides in pairs.items():
            if set(sides) != {"A", "B"}:
                raise CheckpointError(
                    f"{self.where}: {module!r} has only lora_{next(iter(sides))}; expected both"
                    " factors"
                )
            self._keys[f"{module}.weight"] = sides["A"], sides["B"]
            self._describe(module, kind, sides["A"], sides["B"])

    def _describe(self, module: str, kind: str, key_a: str, key_b: str) -> None:
        a, b = self.tensors[key_a], self.tensors[key_b]
        if len(a.shape) < 2 or len(b.shape) < 2 or not a.numel or not b.numel:
            raise CheckpointError(
                f"{self.where}: the factors of {module!r} have shapes {list(a.shape)} and"
                f" {list(b.shape)}; they were saved without being gathered (DeepSpeed ZeRO-3 or"
                " FSDP): gather them before save_pretrained()"
            )
        if a.dtype not in FLOAT_DTYPES or a.dtype != b.dtype:
            raise CheckpointError(
                f"{self.where}: the factors of {module!r} are {a.dtype} and {b.dtype}; expected one"
                " float dtype"
            )
        rank, scale = self._settings.rank_of(module), self._settings.scale_of(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{self.where}: the factors of {module!r} have rank {a.shape[0]} and {b.shape[1]};"
                f" {CONFIG} says {rank}"
            )
        if scale == 0:
            raise CheckpointError(
                f"{self.where}: {module!r} has alpha 0, so its delta is zero; correct alpha_pattern"
                f" in {CONFIG}"
            )
        shape: tuple[int, ...] = (b.shape[0], *a.shape[1:])
        if kind == "linear" and len(a.shape) > 2:
            kind = "convolution"
        elif kind == "embedding" or self._settings.fan_in_fan_out:
            kind, shape = (
                ("embedding" if kind == "embedding" else "transposed"),
                (a.shape[1], b.shape[0]),
            )
        self.shapes[f"{module}.weight"] = shape
        columns = TensorInfo(shape[1:], a.dtype).numel
        self.factors[f"{module}.weight"] = Factors(
            rows=shape[0],
            columns=columns,
            rank=rank,
            scale=scale,
            dtype=a.dtype,
            kind=kind,  # type: ignore[arg-type]
        )

    def factor_bits(self, name: str) -> np.ndarray:
        """Raw bits of ``left`` and ``right`` of a tensor's delta, flat, in the order of
        ``Factors``.

        Raises:
            CheckpointError: a number is not finite.
        """
        spec, (a, b) = self.factors[name], (self._whole(key) for key in self._keys[name])
        if spec.kind in ("embedding", "transposed"):
            return np.concatenate(
                [a.reshape(spec.rank, -1).T.ravel(), b.reshape(-1, spec.rank).T.ravel()]
            )
        return np.concatenate([b, a])

    def _whole(self, key: str) -> np.ndarray:
        info = self.tensors[key]
        bits = np.empty(info.numel, bits_dtype(info.dtype))
        self.read_into(key, 0, bits)
        bad = nonfinite_index(bits, info.dtype)
        if bad is not None:
            raise CheckpointError(
                f"{self.where}: {key!r} is NaN or infinite at element {bad}; expected finite"
                " factors"
            )
        return bits


class AdapterCheckpoint(Adapter):
    """One adapter as it is stored; see ``relexkit.checkpoints.Checkpoint``. Opening reads headers
    only.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.description = f"PEFT adapter {folder}"
        config = read_config(folder)
        read_settings(config, str(folder / CONFIG))  # before any weights are looked for
        self.base_name = config.get("base_model_name_or_path")
        safe = (folder / WEIGHTS).is_file()
        if not safe and not (folder / WEIGHTS_BIN).is_file():
            raise CheckpointError(
                f"{folder}: has {CONFIG} but no {WEIGHTS}; the step is incomplete"
            )
        self._file = (SafetensorsFiles if safe else TorchFiles)(
            {folder / (WEIGHTS if safe else WEIGHTS_BIN): None}
        )
        try:
            super().__init__(str(folder), config, self._file.tensors)
        except BaseException:
            self.close()
            raise

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``relexkit.checkpoints.Checkpoint``."""
        self._file.read_into(name, start, out)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def files(self) -> dict[str, bytes]:
        """Adapter configuration and tokenizer."""
        return {**model_files(self.folder), CONFIG: read_small(self.folder / CONFIG)}

    def metrics(self) -> dict[str, float]:
        """See ``trainer_metrics``."""
        return trainer_metrics(self.folder)


class AdaptedCheckpoint(WholeTensors):
    """An adapter over its base: the tensors of the merged model; see
    ``relexkit.checkpoints.Checkpoint``.

    Args:
        opened: what the run opened, the adapter or a view of it with its metrics and files.

    Attributes:
        factors: tensors whose delta is a product, with its shape, rank and scale.
        still: the float tensors of the base that the adapter leaves alone.

    Raises:
        CheckpointError: the base lacks an adapted tensor, has it with another shape, or is another
            base.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint, opened: Checkpoint):
        self._adapter, self._base = adapter, base
        self.description, self.files, self.metrics, self.close = (
            opened.description,
            opened.files,
            opened.metrics,
            opened.close,
        )
        self.factors = adapter.factors
        for name, shape in adapter.shapes.items():
            self._check_in_base(name, shape)
        adapter.check_base(base)
        for name, key in adapter.base_layers.items():
            self._check_in_base(name, adapter.tensors[key].shape)
            if not self._equals_base(key, name):
                raise CheckpointError(
                    f"{adapter.where}: {key!r} differs from the base; the adapter was trained on"
                    " another one"
                )
        self.tensors: dict[str, TensorInfo] = {
            name: adapter.tensors[adapter.saved[name]] if name in adapter.saved else info
            for name, info in base.tensors.items()
        }
        touched = adapter.shapes.keys()
        self.still = frozenset(
            n for n, i in self.tensors.items() if i.dtype in FLOAT_DTYPES and n not in touched
        )

    def _check_in_base(self, name: str, shape: tuple[int, ...]) -> None:
        info, folder = self._base.tensors.get(name), self._adapter.where
        refuse_quantised(self._base, "the base of the adapter")
        if info is None:
            raise CheckpointError(
                f"{folder}: adapts {name!r}, which the base does not have; give the base that the"
                " adapter was trained on"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{folder}: adapts {name!r} with shape {list(shape)}; the base has"
                f" {list(info.shape)}: give its own base"
            )

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Bits of a tensor that the adapter holds whole, or of the base where it leaves it
        alone.
        """
        if name in self._adapter.saved:
            self._adapter.read_into(self._adapter.saved[name], start, out)
        elif name in self.factors:
            raise CheckpointError(f"{self._adapter.where}: {name!r} is adapted; read its factors")
        else:
            self._base.read_into(name, start, out)

    def factor_bits(self, name: str) -> np.ndarray:
        """See ``Adapter``."""
        return self._adapter.factor_bits(name)

    def is_zero(self) -> bool:
        """True if the delta is zero in every tensor; reads the factors and the whole tensors."""
        for name, spec in self.factors.items():
            bits = self.factor_bits(name)
            magnitude = bits.dtype.type(
                np.iinfo(bits.dtype).max >> 1
            )  # without the sign: -0.0 is zero too
            cut = spec.rows * spec.rank
            if (bits[:cut] & magnitude).any() and (bits[cut:] & magnitude).any():
                return False
        return all(self._equals_base(key, name) for name, key in self._adapter.saved.items())

    def check_trained(self) -> None:
        """Refuse an adapter without effect.

        Raises:
            CheckpointError: its delta is zero in every tensor.
        """
        if self.is_zero():
            raise CheckpointError(
                f"{self._adapter.where}: every delta of the adapter is zero; the step was not"
                " trained (learning rate 0), was not gathered before saving, or holds the initial"
                " adapter: leave it out with --steps"
            )

    def _equals_base(self, key: str, name: str) -> bool:
        saved, info = self._adapter.tensors[key], self._base.tensors[name]
        if saved.dtype not in (info.dtype, "float32"):
            return False
        bits, original = (
            np.empty(saved.numel, bits_dtype(saved.dtype)),
            np.empty(info.numel, bits_dtype(info.dtype)),
        )
        self._adapter.read_into(key, 0, bits)
        self._base.read_into(name, 0, original)
        return np.array_equal(bits, widen_bits(original, info.dtype, saved.dtype))


class AdaptedRun:
    """A run of adapters over its base; see ``relexkit.checkpoints.Run``."""

    def __init__(self, run: Run, base: Checkpoint):
        self._run, self._base = run, base
        self.description, self.steps, self.notes, self.left_out = (
            run.description,
            run.steps,
            run.notes,
            run.left_out,
        )

    def checkpoint(self, step: int) -> AdaptedCheckpoint:
        """Open one step.

        Raises:
            CheckpointError: the adapter does not fit the base; the message names the step.
        """
        opened = self._run.checkpoint(step)
        try:
            return AdaptedCheckpoint(opened.adapter, self._base, opened)
        except BaseException as error:
            opened.close()
            if isinstance(error, CheckpointError):
                raise CheckpointError(f"step {step}: {error}") from None
            raise


def over_base(run: Run, base: Checkpoint, step: int) -> tuple[Run, Checkpoint]:
    """``run`` and ``base`` unchanged; if the steps (``step`` is one) are adapters, the merged view
    of the run, and the base under the adapter's names, with a tied head that is now a tensor of its
    own.
    """
    with closing(run.checkpoint(step)) as first:
        adapter = first.adapter
        if adapter is None:
            return run, base
        base = in_memory(base, adapter.shapes)
        base = with_heads(base, split_heads(adapter.shapes, base.tensors))
        return AdaptedRun(run, base), base


def named_base(run: Run, step: int) -> str | None:
    """The base that the adapters of a run name, None if its steps are not adapters.

    Raises:
        CheckpointError: they name none that is a folder here.
    """
    with closing(run.checkpoint(step)) as first:
        adapter = first.adapter
        if adapter is None:
            return None
        if isinstance(adapter.base_name, str) and Path(adapter.base_name).is_dir():
            return adapter.base_name
        raise CheckpointError(
            f"{run.description}: are adapters of {adapter.base_name!r}, which is not a folder here;"
            " give the base model with --base DIR or --base hf://OWNER/NAME"
        )
