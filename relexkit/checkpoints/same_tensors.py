"""What the checkpoints of a run must have in common with its base and its store: tensors, shapes,
dtypes, one adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from relexkit.checkpoints.protocol import Checkpoint
from relexkit.errors import CheckpointError
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.layout import Factors, Layout

_QUANTISED = re.compile(
    r"\.(qweight|qzeros|SCB|weight_packed|weight_format|absmax|quant_map|quant_state\.\w+)$"
)
_VOCABULARY = re.compile(
    r"(embed_tokens|wte|embed_in|embeddings?|lm_head|embed_out|output)\.weight$"
)

WIDENED = {"float32": ("bfloat16", "float16")}
"""Dtypes that may stand for a dtype in the base."""


def check_tensors(
    expected: dict[str, tuple[tuple[int, ...], str]],
    checkpoint: Checkpoint,
    reference: str,
    where: str,
    *,
    widen: bool = False,
) -> None:
    """Same names, shapes and dtypes; with ``widen`` a 16-bit tensor may stand for a float32 one."""
    missing = [n for n in expected if n not in checkpoint.tensors]
    extra = [n for n in checkpoint.tensors if n not in expected]
    if missing or extra:
        refuse_quantised(checkpoint, where)
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [
            f"has the unexpected {_some(extra)}"
        ] * bool(extra)
        raise CheckpointError(
            f"{where} {' and '.join(parts)}, compared with {reference}; expected the same tensors"
            " everywhere: convert them alike, or name those that only one side has with --exclude"
        )
    for name, (shape, dtype) in expected.items():
        info = checkpoint.tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}; expected {list(shape)} as"
                f" in {reference}{_about_shapes(name, info.shape, shape)}"
            )
        if info.dtype not in (dtype, *(WIDENED.get(dtype, ()) if widen else ())):
            raise CheckpointError(
                f"{where}: tensor {name!r} has dtype {info.dtype}; expected {dtype} as in"
                f" {reference}{_about_dtypes(info.dtype, dtype, is_base=widen)}"
            )
        if dtype not in FLOAT_DTYPES and dtype.startswith("float"):
            raise CheckpointError(
                f"{where}: tensor {name!r} has dtype {dtype}; expected float32, bfloat16 or"
                " float16: convert the checkpoints"
            )


def _about_shapes(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The likely cause of different shapes, and the way out; empty if none is known."""
    if 0 in shape or 0 in expected:
        return (
            ": it was saved without being gathered (DeepSpeed ZeRO-3); import the partitions beside"
            " it with --format deepspeed, or save with stage3_gather_16bit_weights_on_model_save"
        )
    if _VOCABULARY.search(name) and len(shape) == 2 and shape[1:] == expected[1:]:
        return (
            ": the vocabulary was resized; resize the other side alike with"
            " model.resize_token_embeddings(ROWS) and save_pretrained(), and give that folder"
        )
    return ""


def _about_dtypes(dtype: str, expected: str, *, is_base: bool) -> str:
    if dtype not in FLOAT_DTYPES or expected not in FLOAT_DTYPES:
        return ""
    if is_base:
        return (
            ": the run was trained in another precision than the base has; round the base first"
            f" with `relexkit round BASE --dtype {expected} --rounding nearest -o DIR`"
        )
    return (
        ": a trainer may export its last step in another precision (torchtitan does); leave that"
        " step out with --steps, or import into a new store"
    )


def refuse_quantised(checkpoint: Checkpoint, where: str) -> None:
    """Refuse weights that are codes of a quantised model.

    Raises:
        CheckpointError: it holds such tensors; with the way out.
    """
    name = next((n for n in checkpoint.tensors if _QUANTISED.search(n)), None)
    if name is not None:
        raise CheckpointError(
            f"{where} is a quantised copy (it holds {name!r}: 4-bit, 8-bit, GPTQ or AWQ); expected"
            " the weights themselves: give the model that it was made from"
        )


def factors_in(layout: Layout) -> dict[str, Factors]:
    """The tensors of a layout whose deltas are kept as factors."""
    return {
        s.tensor.name: p.factors
        for n, p in enumerate(layout.parts)
        if p.factors
        for s in layout.segments_in(n)
    }


def check_factors(expected: Mapping[str, Factors], checkpoint: Checkpoint, where: str) -> None:
    """The adapter of a step has the store's targets, ranks, scales and dtypes."""
    held = checkpoint.factors
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
