"""``torch.distributed.checkpoint`` folders: chunks of several ranks, trainers' layouts and names,
damage, code.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import LLAMA_SHAPES, Weights
from sharded import Malicious, assert_reads, write_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from relexkit.checkpoints import open_checkpoint
from relexkit.checkpoints.formats.key_names import model_names
from relexkit.errors import CheckpointError


def weights(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in LLAMA_SHAPES.items()}


OPTIMIZER = {
    "optimizer.state.step": torch.ones(3),
    "train_state": {"step": 4},
    "lr_scheduler": {"last": 3},
}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_and_other_state_does_not(
    tmp_path: Path, world: int, dtype: torch.dtype
) -> None:
    tensors = weights(dtype) | {"model.position_ids": torch.arange(9)}
    if world == 1:
        tensors["model.scale"] = torch.tensor(0.5, dtype=dtype)  # FSDP cuts no scalars
    write_dcp(tmp_path, tensors, world, OPTIMIZER)
    assert_reads(open_checkpoint(tmp_path), tensors)


@pytest.mark.filterwarnings(
    "ignore:.*TypedStorage is deprecated",
    "ignore:.*is deprecated and will be removed:FutureWarning",
)
def test_pytorchs_own_conversion_gives_the_same_bits(tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp", weights(), 3)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    assert_reads(
        open_checkpoint(tmp_path / "dcp"), torch.load(tmp_path / "whole.pt", weights_only=True)
    )


@pytest.mark.parametrize(
    ("inside", "prefix"),
    [
        (".", ""),  # torchtitan
        ("trainer", "app.model."),  # prime-rl
        ("policy/weights", "model."),  # NeMo-RL 1
        ("policy/weights/model", "model."),  # NeMo-RL 2
        ("pytorch_model_fsdp_0", "model."),  # accelerate
    ],
)
def test_every_trainers_place_and_prefix(tmp_path: Path, inside: str, prefix: str) -> None:
    """Layouts from the trainers' sources; the files are written by PyTorch itself."""
    write_dcp(tmp_path / inside, weights(), 2, prefix=prefix)
    assert_reads(open_checkpoint(tmp_path), weights())


def test_metrics_and_configuration_of_trainer_come_from_the_folder_above(tmp_path: Path) -> None:
    write_dcp(tmp_path / "pytorch_model_fsdp_0", weights(), 1, prefix="model.")
    (tmp_path / "trainer_state.json").write_text(
        '{"global_step": 3, "log_history": [{"step": 3, "reward": 0.5}]}'
    )
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.metrics(), checkpoint.files()) == ({"reward": 0.5}, {"config.json": b"{}"})


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["model.norm.weight", "lm_head.weight"], ["model.norm.weight", "lm_head.weight"]),
        (
            ["model.model.norm.weight", "model.lm_head.weight"],
            ["model.norm.weight", "lm_head.weight"],
        ),
        (
            ["model.norm.weight", "model.embed_tokens.weight"],
            ["model.norm.weight", "model.embed_tokens.weight"],
        ),
        (["app.model.model.norm.weight"], ["model.norm.weight"]),
        (
            ["module.model.norm.weight", "module.lm_head.weight"],
            ["model.norm.weight", "lm_head.weight"],
        ),
        (["_orig_mod.layers.0._checkpoint_wrapped_module.w"], ["layers.0.w"]),
        (["_fsdp_wrapped_module.a", "_fsdp_wrapped_module.b._fsdp_wrapped_module.c"], ["a", "b.c"]),
        ([], []),
    ],
)
def test_names_lose_what_wrappers_put_around(keys: list[str], names: list[str]) -> None:
    assert list(model_names(keys).values()) == names


def change_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def set_place(field: str, value: Any) -> Callable[[Path], object]:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            setattr(place, field, value)

    return lambda folder: change_metadata(folder, change)


def drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["model.embed_tokens.weight"].chunks.pop()


def forget_place(metadata: Any) -> None:
    metadata.storage_data.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / ".metadata").unlink(),
            "has no .metadata, which is written last: it was being written",
        ),
        (lambda f: (f / "__1_0.distcp").unlink(), r"__1_0\.distcp: cannot be opened"),
        (
            lambda f: (f / "__1_0.distcp").write_bytes(b"short"),
            r"of __1_0.distcp, which has 5: it is truncated",
        ),
        (
            lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:-30]),
            r"\.metadata: its pickle is damaged",
        ),
        (
            lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})),
            "is not a description of a distributed checkpoint",
        ),
        (
            set_place("relative_path", "../secret"),
            r"lies in '../secret'; expected a plain file name in the same folder",
        ),
        (set_place("relative_path", "/etc/passwd"), r"lies in '/etc/passwd'"),
        (set_place("relative_path", ".."), r"lies in '\.\.'"),
        (set_place("relative_path", "a\0b"), r"is not a file name"),
        (set_place("relative_path", "\ud800"), r"is not a file name"),
        (set_place("offset", -1), "has an impossible place"),
        (set_place("length", 10**12), "it is truncated"),
        (set_place("transform_descriptors", ["zstd"]), r"is stored with the transform \['zstd'\]"),
        (
            lambda f: change_metadata(f, drop_chunk),
            r"'model.embed_tokens.weight': its pieces hold \d+ of 424 elements",
        ),
        (
            lambda f: change_metadata(f, forget_place),
            r"the chunk at \[0, 0\] is stored nowhere; .metadata is damaged",
        ),
    ],
)
def test_damage_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    write_dcp(tmp_path, weights(), 2)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_chunk_that_is_another_tensor_is_refused_when_read(tmp_path: Path) -> None:
    write_dcp(tmp_path, weights(), 2)

    def all_at_one_place(metadata: Any) -> None:
        first = next(iter(metadata.storage_data.values()))
        metadata.storage_data = dict.fromkeys(metadata.storage_data, first)

    change_metadata(tmp_path, all_at_one_place)
    with pytest.raises(
        CheckpointError, match=r"'model.norm.weight': .* is not the chunk that \.metadata describes"
    ):
        open_checkpoint(tmp_path).read_into("model.norm.weight", 0, np.empty(8, np.uint32))


def test_a_checkpoint_of_an_optimizer_alone_is_refused(tmp_path: Path) -> None:
    write_dcp(tmp_path, {}, 1, OPTIMIZER)
    with pytest.raises(CheckpointError, match="holds no tensors of a model"):
        open_checkpoint(tmp_path)


def test_code_in_the_description_or_in_a_chunk_is_refused_by_name(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    write_dcp(tmp_path / "a", weights(), 2)
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(
        CheckpointError, match=r"\.metadata: cannot be read safely: it refers to 'posix.mkdir'"
    ):
        open_checkpoint(tmp_path / "a")
    write_dcp(tmp_path / "b", {"w": torch.ones(3)}, 1)
    torch.save(Malicious(marker), tmp_path / "b" / "__0_0.distcp")
    size = (tmp_path / "b" / "__0_0.distcp").stat().st_size
    set_place("length", size)(tmp_path / "b")
    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp: cannot be read safely: it refers to 'posix.mkdir'"
    ):
        assert_reads(open_checkpoint(tmp_path / "b"), {"w": torch.ones(3)})
    assert not marker.exists()


def test_getattr_is_allowed_for_enumerations_only(tmp_path: Path) -> None:
    write_dcp(tmp_path, weights(), 1)
    payload = (
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x93\x8c\x01x\x86R."
    )
    (tmp_path / ".metadata").write_bytes(payload)
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        open_checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(
        payload.replace(b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x02os")
    )
    with pytest.raises(CheckpointError, match=r"refers to 'builtins\.getattr'"):
        open_checkpoint(tmp_path)
