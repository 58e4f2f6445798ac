"""The flat parameter space: which tensor lies where, what is tied, and which coordinates belong to
a scope.

Tensors are packed in a fixed order into *parts*, one-dimensional arrays of one dtype and one
encoding. A tensor that is larger than a part is cut into consecutive parts. A part is the unit of
files on disk and of parallel work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.safetensors_io import ITEM_BYTES, TensorInfo

Encoding = Literal["sparse", "exact", "float", "factors", "fixed"]
"""How a part is stored: sparse update log, dense integer differences, dense float deltas, factors
of a low-rank delta, or base only.
"""

PART_NUMEL: dict[Encoding, int] = {"sparse": 2**28, "exact": 2**25, "float": 2**25, "fixed": 2**27}
"""Largest part by encoding. A dense row of a part is compressed in one piece in memory, hence the
smaller bound. A tensor with factors is a part of its own, whatever its size.
"""

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
    """One flat array of ``numel`` elements of ``dtype``, stored with ``encoding``; ``factors`` with
    that encoding only.
    """

    numel: int
    dtype: str
    encoding: Encoding
    factors: Factors | None = None


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
        return sum(part.numel for part in self.parts if part.encoding != "fixed")

    @property
    def moving_tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors that have deltas: float ones that are not an alias of another."""
        return tuple(t for t in self.tensors if t.tied_to is None and t.dtype in FLOAT_DTYPES)

    def aliases(self) -> dict[str, list[str]]:
        """Name of a tensor -> names of the tensors that are tied to it."""
        found: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.tied_to:
                found.setdefault(tensor.tied_to, []).append(tensor.name)
        return found

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
        end = self.parts[part].numel if end is None else end
        clipped = []
        for segment in self._by_part[part]:
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
        """Refuse a layout in which something cannot be, or lies in the place of something else.

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
    known = part.encoding in get_args(Encoding) and isinstance(part.dtype, str)
    if not known or not _are_counts(part.numel) or part.numel > 2**31 - 1:
        raise ValueError(
            f"part {number} is of {part.numel} elements, {part.dtype}, {part.encoding}"
        )
    if part.encoding != "fixed" and part.dtype not in FLOAT_DTYPES:
        raise ValueError(f"part {number} has steps but the dtype {part.dtype}")
    factors = part.factors
    if (factors is not None) != (part.encoding == "factors"):
        raise ValueError(f"part {number} has factors or the encoding, but not both")
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
        if (spec.encoding == "fixed") == moves or (moves and spec.dtype != tensor.dtype):
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


def build_layout(
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    encodings: dict[str, Encoding],
    tied: dict[str, str] | None = None,
    part_numel: dict[Encoding, int] | None = None,
    factors: Mapping[str, Factors] | None = None,
    still: Collection[str] = (),
) -> Layout:
    """Pack ``tensors`` (name, shape, dtype; in order) into parts.

    Args:
        encodings: encoding of each float dtype that occurs; other dtypes become ``fixed`` parts.
        tied: alias name -> name of the tensor whose elements it shares.
        part_numel: largest part by encoding; ``PART_NUMEL`` if not given.
        factors: tensors whose deltas are kept as factors.
        still: float tensors that no step moves; they get sparse parts of their own, whose log stays
            empty.
    """
    tied, limits, factors = tied or {}, part_numel or PART_NUMEL, factors or {}
    specs: list[TensorSpec] = []
    sizes: list[list] = []  # [numel, dtype, encoding, factors], grown in place
    open_part: dict[tuple[str, bool], int] = {}
    for name, shape, dtype in tensors:
        info = TensorInfo(shape, dtype)
        numel = info.numel if dtype in FLOAT_DTYPES else info.num_bytes
        if name in tied:
            specs.append(
                TensorSpec(
                    name=name,
                    shape=shape,
                    dtype=dtype,
                    part=-1,
                    offset=-1,
                    numel=numel,
                    tied_to=tied[name],
                )
            )
            continue
        if name in factors:
            specs.append(
                TensorSpec(
                    name=name, shape=shape, dtype=dtype, part=len(sizes), offset=0, numel=numel
                )
            )
            sizes.append([numel, dtype, "factors", factors[name]])
            continue
        encoding: Encoding = (
            "fixed"
            if dtype not in FLOAT_DTYPES
            else "sparse"
            if name in still
            else encodings[dtype]
        )
        limit = limits[encoding]
        part = open_part.get((dtype, name in still))
        # a tensor that has to be cut starts a part of its own, and its pieces are the parts that
        # follow
        if part is None or (
            sizes[part][0] + numel > limit and (sizes[part][0] or part != len(sizes) - 1)
        ):
            part = len(sizes)
            sizes.append([0, dtype, encoding, None])
        specs.append(
            TensorSpec(
                name=name, shape=shape, dtype=dtype, part=part, offset=sizes[part][0], numel=numel
            )
        )
        remaining = numel
        while sizes[part][0] + remaining > limit:
            remaining -= limit - sizes[part][0]
            sizes[part][0] = limit
            part = len(sizes)
            sizes.append([0, dtype, encoding, None])
        sizes[part][0] += remaining
        open_part[dtype, name in still] = part
    parts = tuple(Part(numel=n, dtype=d, encoding=e, factors=f) for n, d, e, f in sizes)
    return Layout(tuple(specs), parts)


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
