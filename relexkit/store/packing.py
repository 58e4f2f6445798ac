"""Tensors packed into the parts of a new store, and parts dealt to the processes that write it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from relexkit.store.encodings.table import ENCODINGS
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.layout import Factors, Layout, Part, TensorSpec
from relexkit.weights.safetensors_io import TensorInfo

_PARTS = 32  # are enough for processes to share evenly; more would be more files a step
_LEAST_NUMEL = 2**25  # of a part that is cut for that reason


def build_layout(
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    encodings: Mapping[str, str],
    tied: Mapping[str, str] | None = None,
    part_numel: Mapping[str, int] | None = None,
    factors: Mapping[str, Factors] | None = None,
    still: Collection[str] = (),
) -> Layout:
    """Pack ``tensors`` (name, shape, dtype; in order) into parts.

    Args:
        encodings: encoding of each float dtype that occurs; other dtypes become ``fixed`` parts.
        tied: alias name -> name of the tensor whose elements it shares.
        part_numel: largest part by encoding; if not given what the encoding allows, less where
            there would be fewer than ``_PARTS`` parts for processes to share.
        factors: tensors whose deltas are kept as factors.
        still: float tensors that no step moves; they get sparse parts of their own, whose log stays
            empty.
    """
    tied, limits, factors = tied or {}, part_numel or {}, factors or {}
    total = sum(TensorInfo(shape, dtype).numel for _, shape, dtype in tensors)
    enough = max(_LEAST_NUMEL, 1 << (-(-total // _PARTS) - 1).bit_length())
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
        encoding = (
            "fixed"
            if dtype not in FLOAT_DTYPES
            else "sparse"
            if name in still
            else encodings[dtype]
        )
        limit = limits.get(encoding, min(ENCODINGS[encoding].part_numel, enough))
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


def owned_parts(layout: Layout, rank: int, size: int) -> list[int]:
    """The parts that a process writes: the largest first, each to the process that has the
    least.
    """
    loads = [0] * size
    owned: list[list[int]] = [[] for _ in range(size)]
    for part in sorted(range(len(layout.parts)), key=lambda p: -layout.parts[p].numel):
        least = loads.index(min(loads))
        loads[least] += layout.parts[part].numel
        owned[least].append(part)
    return sorted(owned[rank])
