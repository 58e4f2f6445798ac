"""The flat parameter space: which tensor lies where, what is tied, and which coordinates belong to
a scope.

Tensors are packed in a fixed order into *parts*, one-dimensional arrays of one dtype and one
encoding. A tensor that is larger than a part is cut into consecutive parts. A part is the unit of
files on disk and of parallel work.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.safetensors_io import ITEM_BYTES, TensorInfo

Scope = Literal["tensor", "layer", "module", "global"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SCOPE_MEANINGS: dict[Scope, str] = {
    "tensor": "every tensor by itself",
    "layer": "all tensors of a layer together",
    "module": "the same module of all layers together, such as mlp.up_proj",
    "global": "the whole model as one vector",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of the model.

    ``part`` and ``offset`` say where its first element lies; it continues at offset 0 of the
    following parts if it is longer than its first part. ``numel`` counts elements, for a tensor
    that is not float its bytes. ``tied_to`` names the tensor whose storage it shares; it has then
    no place of its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: int
    offset: int
    numel: int
    tied_to: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """How the delta of one tensor is kept as ``scale * left @ right``, ``left [rows, rank]`` and
    ``right [rank, columns]``.

    The tensor is read as a matrix of ``rows x columns`` in its own order. ``dtype`` is that of the
    factors. ``kind`` says how the adapter file holds them: ``B`` and ``A``; transposed, as ``A^T``
    and ``B^T`` (``fan_in_fan_out`` and embeddings); or as the kernels of two convolutions.
    """

    rows: int
    columns: int
    rank: int
    scale: float
    dtype: str
    kind: Literal["linear", "transposed", "embedding", "convolution"] = "linear"

    @property
    def numel(self) -> int:
        """Numbers in both factors."""
        return self.rank * (self.rows + self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One flat array of ``numel`` elements of ``dtype``. ``encoding`` says how its steps are stored
    (a name of ``relexkit.store.encodings``); ``factors``, what a low-rank delta is made of.
    """

    numel: int
    dtype: str
    encoding: str
    factors: Factors | None = None

    @property
    def moves(self) -> bool:
        """True if there are deltas; what is not float is the base's in every step."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``start:start+numel`` of ``tensor`` lie at ``offset:offset+numel`` of ``part``."""

    tensor: TensorSpec
    part: int
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """All tensors, in checkpoint order, and all parts."""

    tensors: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]

    @property
    def num_parameters(self) -> int:
        """Number of float parameters that can move, each shared one counted once."""
        return sum(part.numel for part in self.parts if part.moves)

    @property
    def moving_tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that have deltas: float ones that are not an alias of another."""
        return tuple(t for t in self.tensors if t.tied_to is None and t.dtype in FLOAT_DTYPES)

    def aliases(self) -> dict[str, list[str]]:
        """Name of a tensor -> names of the tensors that are tied to it."""
        aliases: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.tied_to:
                aliases.setdefault(tensor.tied_to, []).append(tensor.name)
        return aliases

    def segments_of(self, tensor: TensorSpec) -> Iterator[Segment]:
        """The pieces of ``tensor`` in order of its elements; nothing for an alias."""
        if tensor.tied_to is not None:
            return
        part, offset, start = tensor.part, tensor.offset, 0
        while start < tensor.numel:
            numel = min(tensor.numel - start, self.parts[part].numel - offset)
            yield Segment(tensor, part, offset, start, numel)
            part, offset, start = part + 1, 0, start + numel

    def segments_in(self, part: int, begin: int = 0, end: int | None = None) -> list[Segment]:
        """The pieces that lie in columns ``begin:end`` of ``part``, clipped to them, in column
        order.
        """
        whole = self._by_part[part]
        end = self.parts[part].numel if end is None else end
        first = bisect_right(whole, begin, key=lambda s: s.offset + s.numel)
        clipped = []
        for segment in itertools.islice(whole, first, None):
            if segment.offset >= end:
                break
            low, high = max(segment.offset, begin), min(segment.offset + segment.numel, end)
            if low < high:
                start = segment.start + low - segment.offset
                clipped.append(Segment(segment.tensor, part, low, start, high - low))
        return clipped

    @property
    def _by_part(self) -> list[list[Segment]]:
        cached = self.__dict__.get("_segments")
        if cached is None:
            cached = [[] for _ in self.parts]
            for tensor in self.tensors:
                for segment in self.segments_of(tensor):
                    cached[segment.part].append(segment)
            for segments in cached:
                segments.sort(key=lambda s: s.offset)
            self.__dict__["_segments"] = cached
        return cached

    def to_json(self) -> dict:
        """Plain lists and dictionaries, as kept in the attributes of a store."""
        parts = [
            {key: value for key, value in asdict(p).items() if key != "factors" or value}
            for p in self.parts
        ]
        return {"tensors": [asdict(t) for t in self.tensors], "parts": parts}

    def check(self) -> None:
        """Refuse a layout with impossible values or overlapping tensors.

        Raises:
            ValueError: what is wrong, with the name of the tensor or the number of the part.
        """
        for number, part in enumerate(self.parts):
            _check_part(number, part)
        specs = {tensor.name: tensor for tensor in self.tensors}
        if len(specs) != len(self.tensors):
            raise ValueError("two tensors have the same name")
        for tensor in self.tensors:
            _check_tensor(tensor, self.parts, specs)
        for number, segments in enumerate(self._by_part):
            ends = [0, *(s.offset + s.numel for s in segments)]
            if [s.offset for s in segments] != ends[:-1] or ends[-1] != self.parts[number].numel:
                raise ValueError(f"the tensors of part {number} overlap or leave a gap")

    @classmethod
    def from_json(cls, document: dict) -> Layout:
        """Inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: it is not a layout.
        """
        tensors = tuple(
            TensorSpec(**{**t, "shape": tuple(t["shape"])}) for t in document["tensors"]
        )
        parts = [
            {**p, "factors": Factors(**p["factors"])} if "factors" in p else p
            for p in document["parts"]
        ]
        layout = cls(tensors, tuple(Part(**p) for p in parts))
        layout.check()
        return layout


def _are_counts(*values: object) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _check_part(number: int, part: Part) -> None:
    words = isinstance(part.dtype, str) and isinstance(part.encoding, str)
    if not words or not _are_counts(part.numel) or part.numel > 2**31 - 1:
        raise ValueError(
            f"part {number} is of {part.numel} elements, {part.dtype}, {part.encoding}"
        )
    factors = part.factors
    if factors is not None and not (
        _are_counts(factors.rows, factors.columns, factors.rank)
        and factors.rows * factors.columns == part.numel
        and factors.dtype in FLOAT_DTYPES
        and isinstance(factors.scale, (int, float))
        and math.isfinite(factors.scale)
    ):
        raise ValueError(f"the factors of part {number} do not give its {part.numel} elements")


def _check_tensor(
    tensor: TensorSpec, parts: Sequence[Part], specs: Mapping[str, TensorSpec]
) -> None:
    where = f"tensor {tensor.name!r}"
    if not isinstance(tensor.name, str) or tensor.dtype not in ITEM_BYTES:
        raise ValueError(f"{where} is of dtype {tensor.dtype!r}")
    if not _are_counts(*tensor.shape):
        raise ValueError(f"{where} has the shape {list(tensor.shape)}")
    info, moves = TensorInfo(tensor.shape, tensor.dtype), tensor.dtype in FLOAT_DTYPES
    if tensor.numel != (info.numel if moves else info.num_bytes):
        raise ValueError(f"{where} has the shape {list(tensor.shape)} but {tensor.numel} elements")
    if tensor.tied_to is not None:
        owner = specs.get(tensor.tied_to)
        if owner is None or owner.tied_to is not None or owner.shape != tensor.shape:
            raise ValueError(f"{where} is tied to {tensor.tied_to!r}, which is not such a tensor")
        return
    if not _are_counts(tensor.part, tensor.offset) or tensor.part >= len(parts):
        raise ValueError(f"{where} lies in part {tensor.part}, at {tensor.offset}")
    part, remaining, room = tensor.part, tensor.numel, parts[tensor.part].numel - tensor.offset
    while True:
        spec = parts[part]
        if spec.moves != moves or (moves and spec.dtype != tensor.dtype):
            raise ValueError(f"{where} of dtype {tensor.dtype} lies in a part of {spec.dtype}")
        if room < 0:
            raise ValueError(f"{where} begins beyond the end of part {part}")
        remaining -= room
        if remaining <= 0:
            return
        part += 1
        if part >= len(parts):
            raise ValueError(f"{where} goes on beyond the last part")
        room = parts[part].numel


_LAYER = re.compile(r"(?:^|\.)(layers|h|blocks|layer)\.(\d+)(?=\.|$)")


def layer_of(name: str) -> int | None:
    """Index of the transformer layer that a tensor belongs to, or None (embeddings, final norm,
    head).
    """
    match = _LAYER.search(name)
    return int(match.group(2)) if match else None


def module_of(name: str) -> str:
    """Module type of a tensor: its name without the path to the layer and without ``.weight``.

    >>> module_of("model.layers.3.self_attn.q_proj.weight")
    'self_attn.q_proj'
    """
    match = _LAYER.search(name)
    short = name[match.end() + 1 :] if match else name.removeprefix("model.")
    return short.removesuffix(".weight") or short


def scope_of(name: str, scope: str) -> str:
    """Name of the group that tensor ``name`` falls into under ``scope`` (one of ``SCOPES``)."""
    if scope == "tensor":
        return name
    if scope == "global":
        return "global"
    if scope == "layer":
        layer = layer_of(name)
        return f"layer {layer}" if layer is not None else module_of(name)
    if scope == "module":
        return module_of(name)
    raise ValueError(f"scope {scope!r} is unknown: choose one of {', '.join(SCOPES)}")
