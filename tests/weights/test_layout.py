"""The flat parameter space: every element has exactly one place, however small the parts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relexkit.store import build_layout
from relexkit.weights.dtypes import FLOAT_DTYPES
from relexkit.weights.layout import SCOPES, Layout, layer_of, module_of, scope_of

ENCODINGS = {"float32": "float", "bfloat16": "sparse", "float16": "exact"}

Tensors = list[tuple[str, tuple[int, ...], str]]

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
dtypes = st.sampled_from(["float32", "bfloat16", "float16", "int64", "bool"])
tensor_lists = st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=12).map(
    lambda kinds: [(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds)]
)
limits = st.fixed_dictionaries(
    {encoding: st.integers(1, 60) for encoding in (*ENCODINGS.values(), "fixed")}
)


def units(shape: tuple[int, ...], dtype: str) -> int:
    """Elements of a float tensor, bytes of another."""
    count = 8 if dtype == "int64" else 1
    for extent in shape:
        count *= extent
    return count


@settings(max_examples=200, deadline=None)
@given(tensors=tensor_lists, part_numel=limits)
def test_every_element_has_one_place_and_every_place_one_element(
    tensors: Tensors, part_numel: dict
) -> None:
    layout = build_layout(tensors, ENCODINGS, part_numel=part_numel)
    owner: dict[tuple[int, int], tuple[str, int]] = {}
    for spec, (name, shape, dtype) in zip(layout.tensors, tensors, strict=True):
        assert (spec.name, spec.shape, spec.dtype, spec.numel) == (
            name,
            shape,
            dtype,
            units(shape, dtype),
        )
        position = 0
        for segment in layout.segments_of(spec):
            part = layout.parts[segment.part]
            assert part.dtype == dtype
            assert part.encoding == ENCODINGS.get(dtype, "fixed")
            assert segment.start == position
            assert segment.numel > 0
            for i in range(segment.numel):
                place = (segment.part, segment.offset + i)
                assert place not in owner
                owner[place] = (name, position + i)
            position += segment.numel
        assert position == spec.numel
    places = {(p, i) for p, part in enumerate(layout.parts) for i in range(part.numel)}
    assert set(owner) == places
    for part in layout.parts:
        assert part.numel <= part_numel[part.encoding]
    moving = sum(units(s, d) for _, s, d in tensors if d in FLOAT_DTYPES)
    assert layout.num_parameters == moving


@settings(max_examples=100, deadline=None)
@given(tensors=tensor_lists, part_numel=limits, data=st.data())
def test_segments_in_a_window_are_the_window_clipped(
    tensors: Tensors, part_numel: dict, data: st.DataObject
) -> None:
    layout = build_layout(tensors, ENCODINGS, part_numel=part_numel)
    for number, part in enumerate(layout.parts):
        begin = data.draw(st.integers(0, part.numel))
        end = data.draw(st.integers(begin, part.numel))
        covered: list[int] = []
        for segment in layout.segments_in(number, begin, end):
            assert segment.numel > 0
            whole = [s for s in layout.segments_of(segment.tensor) if s.part == number]
            assert len(whole) == 1
            assert segment.start - whole[0].start == segment.offset - whole[0].offset
            assert segment.offset >= whole[0].offset
            assert segment.offset + segment.numel <= whole[0].offset + whole[0].numel
            covered += range(segment.offset, segment.offset + segment.numel)
        assert covered == list(range(begin, end))
        assert sum(s.numel for s in layout.segments_in(number)) == part.numel


@settings(max_examples=50, deadline=None)
@given(tensors=tensor_lists, part_numel=limits)
def test_json_round_trip(tensors: Tensors, part_numel: dict) -> None:
    alike = len(tensors) > 1 and tensors[0][1:] == tensors[1][1:]
    tied = {"t1": "t0"} if alike else {}
    layout = build_layout(tensors, ENCODINGS, tied, part_numel)
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert [again.segments_in(p) for p in range(len(again.parts))] == [
        layout.segments_in(p) for p in range(len(layout.parts))
    ]


def test_a_tensor_larger_than_a_part_continues_in_the_next_ones() -> None:
    small = {"sparse": 10, "exact": 10, "float": 10, "fixed": 10}
    layout = build_layout(
        [("a", (3,), "bfloat16"), ("b", (5, 5), "bfloat16"), ("c", (4,), "bfloat16")],
        ENCODINGS,
        None,
        small,
    )
    assert [p.numel for p in layout.parts] == [3, 10, 10, 9]
    b = layout.tensors[1]
    assert [(s.part, s.offset, s.start, s.numel) for s in layout.segments_of(b)] == [
        (1, 0, 0, 10),
        (2, 0, 10, 10),
        (3, 0, 20, 5),
    ]
    assert [(s.tensor.name, s.start, s.numel) for s in layout.segments_in(3, 3, 7)] == [
        ("b", 23, 2),
        ("c", 0, 2),
    ]


def test_tied_tensors_have_no_place_and_count_once() -> None:
    tensors = [("embed", (7, 3), "float32"), ("head", (7, 3), "float32"), ("mask", (5,), "bool")]
    layout = build_layout(tensors, ENCODINGS, {"head": "embed"})
    assert layout.num_parameters == 21
    assert [t.name for t in layout.moving_tensors] == ["embed"]
    assert list(layout.segments_of(layout.tensors[1])) == []
    assert layout.tensors[1].tied_to == "embed"
    assert sorted((p.numel, p.encoding) for p in layout.parts) == [(5, "fixed"), (21, "float")]


def test_scalars_and_empty_tensors_are_moving_tensors() -> None:
    layout = build_layout([("empty", (0, 8), "bfloat16"), ("scalar", (), "bfloat16")], ENCODINGS)
    assert [t.numel for t in layout.moving_tensors] == [0, 1]
    assert [p.numel for p in layout.parts] == [1]
    assert [s.tensor.name for s in layout.segments_in(0)] == ["scalar"]


NAMES = [
    # name, layer, module
    ("model.layers.11.self_attn.q_proj.weight", 11, "self_attn.q_proj"),
    ("model.layers.0.input_layernorm.weight", 0, "input_layernorm"),
    ("model.layers.3.mlp.experts.7.up_proj.weight", 3, "mlp.experts.7.up_proj"),
    ("model.embed_tokens.weight", None, "embed_tokens"),
    ("model.norm.weight", None, "norm"),
    ("lm_head.weight", None, "lm_head"),
    ("transformer.h.5.attn.c_attn.weight", 5, "attn.c_attn"),
    ("transformer.h.5.attn.c_attn.bias", 5, "attn.c_attn.bias"),
    ("h.0.ln_1.weight", 0, "ln_1"),
    (
        "transformer.h.10.self_attention.query_key_value.weight",
        10,
        "self_attention.query_key_value",
    ),
    ("transformer.word_embeddings.weight", None, "transformer.word_embeddings"),
    ("bert.encoder.layer.2.attention.self.query.weight", 2, "attention.self.query"),
    ("bert.encoder.layer.2.output.LayerNorm.bias", 2, "output.LayerNorm.bias"),
    ("transformer.blocks.7.ffn.up_proj.weight", 7, "ffn.up_proj"),
    ("model.language_model.layers.4.mlp.gate_proj.weight", 4, "mlp.gate_proj"),
    ("weight", None, "weight"),
]


@pytest.mark.parametrize(("name", "layer", "module"), NAMES)
def test_layers_and_modules_of_several_architectures(
    name: str, layer: int | None, module: str
) -> None:
    assert layer_of(name) == layer
    assert module_of(name) == module
    assert scope_of(name, "tensor") == name
    assert scope_of(name, "global") == "global"
    assert scope_of(name, "module") == module
    assert scope_of(name, "layer") == (module if layer is None else f"layer {layer}")


def test_a_tensor_outside_the_layers_is_not_mistaken_for_one_inside() -> None:
    assert layer_of("model.layers_norm.3.weight") is None
    assert layer_of("model.layers.norm") is None
    assert layer_of("model.mylayers.3.weight") is None


def test_an_unknown_scope_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=f"scope 'row' is unknown: choose one of {', '.join(SCOPES)}"
    ):
        scope_of("a", "row")
