"""Tied heads: what the tensors say over all steps decides, whoever wrote the head and whatever the
flag claims.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import EMBEDDING, HEAD, Weights, raw_bits, write_checkpoint
from safetensors.torch import load_file

from relexkit import TrajectoryStore, apply, checkout, import_checkpoints
from relexkit.checkpoints.tied import with_tie
from relexkit.errors import CheckpointError, RelexkitError
from relexkit.materialize import round_checkpoint
from relexkit.weights.safetensors_io import TensorInfo


def tensors(seed: int, head: str) -> Weights:
    """``head``: absent, equal to the embedding, or another."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        EMBEDDING: torch.randn(7, 3, generator=generator),
        "model.norm.weight": torch.randn(3, generator=generator),
    }
    if head == "equal":
        found[HEAD] = found[EMBEDDING].clone()
    elif head == "other":
        found[HEAD] = torch.randn(7, 3, generator=generator)
    return found


def imported(
    folder: Path, base: str, *steps: str, config: dict[str, Any] | None = None
) -> tuple[TrajectoryStore, list[str]]:
    write_checkpoint(folder / "base", tensors(0, base), config=config)
    for step, head in enumerate(steps, 1):
        write_checkpoint(folder / "run" / f"step_{step}", tensors(step, head))
    result = import_checkpoints(
        folder / "run", folder / "s.zarr", base=folder / "base", encoding="exact"
    )
    result.store.verify()
    return result.store, result.notes


def state(store: TrajectoryStore, name: str, row: int) -> np.ndarray:
    spec = next(t for t in store.layout.tensors if t.name == name)
    part = store.layout.parts[spec.part]
    return store.read_state(spec.part, row, 0, part.numel)[spec.offset : spec.offset + spec.numel]


@pytest.mark.parametrize(
    ("base", "steps"),
    [
        ("equal", ("equal", "equal")),
        ("absent", ("equal", "equal")),
        ("equal", ("absent", "absent")),
        ("absent", ("equal", "absent")),
    ],
)
def test_equal_heads_are_one_tensor_wherever_they_are_written(
    tmp_path: Path, base: str, steps: tuple[str, ...]
) -> None:
    store, notes = imported(tmp_path, base, *steps, config={"tie_word_embeddings": True})
    assert {t.name: t.tied_to for t in store.layout.tensors if t.tied_to} == {HEAD: EMBEDDING}
    assert not any("differs" in note for note in notes)
    np.testing.assert_array_equal(
        state(store, EMBEDDING, 1), raw_bits(tensors(2, "absent")[EMBEDDING])
    )


def test_no_head_anywhere_is_one_tensor(tmp_path: Path) -> None:
    store, _ = imported(
        tmp_path, "absent", "absent", "absent", config={"tie_word_embeddings": True}
    )
    assert HEAD not in {t.name for t in store.layout.tensors}


@pytest.mark.parametrize("base", ["equal", "absent"])
def test_heads_that_drift_apart_are_both_kept_and_said(tmp_path: Path, base: str) -> None:
    store, notes = imported(tmp_path, base, "equal", "other", config={"tie_word_embeddings": True})
    assert not any(t.tied_to for t in store.layout.tensors)
    assert (
        f"{HEAD} differs from {EMBEDDING} although config.json says they are tied: both are"
        " recorded" in notes
    )
    np.testing.assert_array_equal(state(store, HEAD, 1), raw_bits(tensors(2, "other")[HEAD]))
    np.testing.assert_array_equal(state(store, HEAD, -1), raw_bits(tensors(0, "absent")[EMBEDDING]))


def test_an_untied_model_is_not_remarked_on(tmp_path: Path) -> None:
    store, notes = imported(tmp_path, "other", "other", config={"tie_word_embeddings": False})
    assert not any(t.tied_to for t in store.layout.tensors)
    assert not any("differs" in note for note in notes)


@pytest.mark.parametrize(
    ("base", "step", "config"),
    [("absent", "equal", {"tie_word_embeddings": False}), ("other", "absent", None)],
)
def test_a_missing_head_that_cannot_be_the_embedding_is_refused(
    tmp_path: Path, base: str, step: str, config: Any
) -> None:
    with pytest.raises(
        CheckpointError, match=r"(has the unexpected|lacks) tensor 'lm_head.weight'"
    ):
        imported(tmp_path, base, step, config=config)


def test_a_second_import_sees_the_same_heads(tmp_path: Path) -> None:
    imported(tmp_path, "absent", "equal", "equal")
    write_checkpoint(tmp_path / "run" / "step_3", tensors(3, "equal"))
    result = import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base")
    assert result.added == [3]
    write_checkpoint(tmp_path / "run" / "step_4", tensors(4, "other"))
    with pytest.raises(
        CheckpointError, match="differ but were tied so far; import into a new store"
    ):
        import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base")


# -- what is written -------------------------------------------------------------------------------

CAUSAL = {"architectures": ["LlamaForCausalLM"]}


def written_config(folder: Path, store: TrajectoryStore, step: int) -> dict[str, Any]:
    return json.loads((checkout(store, step, folder / "out") / "config.json").read_text())


@pytest.mark.parametrize(
    ("heads", "claim", "said"),
    [
        ("other", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ("other", {}, {"tie_word_embeddings": False}),
        (
            "other",
            {"text_config": {"tie_word_embeddings": True}},
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
        ),
        ("other", {"text_config": {}}, {"text_config": {"tie_word_embeddings": False}}),
        ("absent", {}, {"tie_word_embeddings": True}),
        ("absent", {"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
        ("equal", {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ("equal", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ],
)
def test_the_written_configuration_says_what_the_written_tensors_are(
    heads: str, claim: dict[str, Any], said: dict[str, Any], tmp_path: Path
) -> None:
    store, _ = imported(tmp_path, heads, heads, heads, config=CAUSAL | claim)
    written = written_config(tmp_path, store, 2)
    assert said.items() <= written.items()


def test_a_model_without_a_head_says_nothing(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForSequenceClassification"]}
    store, _ = imported(tmp_path, "absent", "absent", config=config)
    assert "tie_word_embeddings" not in written_config(tmp_path, store, 1)


@pytest.mark.parametrize("config", [b"{", b"[]", b'{"architectures": 3}', b'"text"', b"\xff"])
def test_a_configuration_that_is_none_stays_as_it_is(config: bytes) -> None:
    two = {HEAD: TensorInfo((7, 3), "float32"), EMBEDDING: TensorInfo((7, 3), "float32")}
    one = {EMBEDDING: TensorInfo((7, 3), "float32")}
    assert with_tie(config, one, {}) == config
    if b"architectures" not in config:
        assert with_tie(config, two, {}) == config


def test_equal_heads_are_rounded_alike(tmp_path: Path) -> None:
    """Stochastic rounding depends on the name: head and embedding would drift apart."""
    write_checkpoint(tmp_path / "a", tensors(1, "equal"), config={"tie_word_embeddings": True})
    rounded = load_file(round_checkpoint(tmp_path / "a", tmp_path / "b") / "model.safetensors")
    assert torch.equal(rounded[HEAD], rounded[EMBEDDING])
    assert json.loads((tmp_path / "b/config.json").read_text())["tie_word_embeddings"] is True


def test_a_model_that_ties_what_the_store_keeps_apart_is_refused(tmp_path: Path) -> None:
    store, _ = imported(tmp_path, "equal", "other", "other")
    model = torch.nn.Module()
    model.model, model.model.embed_tokens = torch.nn.Module(), torch.nn.Embedding(7, 3)
    model.model.norm, model.lm_head = (
        torch.nn.LayerNorm(3, bias=False),
        torch.nn.Linear(3, 7, False),
    )
    weights = np.zeros((len(store.layout.moving_tensors), 2))
    weights[:, 1] = 1.0
    apply(store, model, weights)
    torch.testing.assert_close(model.lm_head.weight.data, tensors(2, "other")[HEAD])
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(RelexkitError, match=r"the model ties .* load the model with tie_word"):
        apply(store, model, weights)
