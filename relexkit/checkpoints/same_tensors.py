"""What the checkpoints of a run must have in common with its base and its store: tensors, shapes,
dtypes, one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

from relexkit.checkpoints.protocol import Checkpoint
from relexkit.errors import CheckpointError
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.layout import Factors, Layout

WIDENED = {"float32": ("bfloat16", "float16")}
"""Dtypes that may stand for a dtype in the base."""


def check_tensors(
    expected: dict[str, tuple[tuple[int, ...], str]],
    found: Checkpoint,
    reference: str,
    where: str,
    *,
    widen: bool = False,
) -> None:
    """Same names, shapes and dtypes; with ``widen`` a 16-bit tensor may stand for a float32 one."""
    missing = [n for n in expected if n not in found.tensors]
    extra = [n for n in found.tensors if n not in expected]
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [
            f"has the unexpected {_some(extra)}"
        ] * bool(extra)
        raise CheckpointError(
            f"{where} {' and '.join(parts)}, compared with {reference}; expected the same tensors"
            " everywhere: convert them alike (a tied output head is either in all of them or in"
            " none)"
        )
    for name, (shape, dtype) in expected.items():
        info = found.tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}; expected {list(shape)} as"
                f" in {reference}"
            )
        allowed = (dtype, *(WIDENED.get(dtype, ()) if widen else ()))
        if info.dtype not in allowed:
            hint = ""
            if widen and dtype in FLOAT_DTYPES and info.dtype == "float32":
                hint = (
                    f": round the base first with `relexkit round --dtype {dtype} --rounding"
                    " nearest`"
                )
            raise CheckpointError(
                f"{where}: tensor {name!r} has dtype {info.dtype}; expected {dtype} as in"
                f" {reference}{hint}"
            )
        if dtype not in FLOAT_DTYPES and dtype.startswith("float"):
            raise CheckpointError(
                f"{where}: tensor {name!r} has dtype {dtype}; expected float32, bfloat16 or"
                " float16: convert the checkpoints"
            )


def factors_in(layout: Layout) -> dict[str, Factors]:
    """The tensors of a layout whose deltas are kept as factors."""
    return {
        s.tensor.name: p.factors
        for n, p in enumerate(layout.parts)
        if p.factors
        for s in layout.segments_in(n)
    }


def check_factors(expected: Mapping[str, Factors], found: Checkpoint, where: str) -> None:
    """The adapter of a step has the store's targets, ranks, scales and dtypes."""
    held: Mapping[str, Factors] = getattr(found, "factors", {})
    if held.keys() != expected.keys():
        raise CheckpointError(
            f"{where}: adapts {len(held)} tensors, not the {len(expected)} of the store, among them"
            f" {sorted(held.keys() ^ expected.keys())[0]!r}; expected one adapter throughout:"
            " import into a new store"
        )
    for name, spec in expected.items():
        if held[name] != spec:
            raise CheckpointError(
                f"{where}: the adapter of {name!r} has {_words(held[name])}; expected"
                f" {_words(spec)} as in the store: import into a new store"
            )


def _words(spec: Factors) -> str:
    return f"rank {spec.rank}, scale {spec.scale:g}, {spec.dtype}, {spec.kind}"


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:3])
    return f"tensor{'s' * (len(names) > 1)} {shown}" + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
