"""DeepSpeed ZeRO: files that DeepSpeed wrote and our own of other shapes, against its own
conversion; damage, code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LLAMA_SHAPES, Weights, write_checkpoint
from safetensors.torch import load_file
from sharded import Malicious, assert_reads, write_zero

from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.errors import CheckpointError

DATA = Path(__file__).parents[1] / "data" / "zero"


def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    found = {n: torch.randn(s, generator=generator) for n, s in LLAMA_SHAPES.items()}
    return found | {"model.one": torch.tensor([0.5]), "model.position_ids": torch.arange(9)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_wrote_reads_as_deepspeed_reads_it(stage: int) -> None:
    """``tests/data/make_zero.py`` made both. Only the frozen layer is 16 bits wide: it has no
    master.
    """
    checkpoint = open_checkpoint(DATA / f"stage{stage}")
    assert f"DeepSpeed ZeRO-{stage} float32 partitions of 2 ranks" in checkpoint.description
    reference = load_file(DATA / f"stage{stage}" / "reference.safetensors")
    assert checkpoint.tensors["embed_tokens.weight"].dtype == "float32"
    assert {"lm_head.weight", "frozen.bias", "ids"} <= set(checkpoint.tensors)
    if stage == 1:  # their tool forgets what is frozen
        assert "frozen.bias" not in reference
        module = torch.load(DATA / "stage1" / "global_step2" / MODEL, weights_only=False)["module"]
        reference |= {n: t for n, t in module.items() if n.startswith("frozen.")}
    reference["ids"] = reference["ids"].to(
        getattr(torch, checkpoint.tensors["ids"].dtype)
    )  # their tool makes it float32
    assert_reads(checkpoint, reference)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_ranks_and_frozen_parameters(tmp_path: Path, stage: int, world: int) -> None:
    """By our own writer (``sharded.write_zero``)."""
    tensors = weights()
    write_zero(
        tmp_path,
        tensors,
        world,
        stage=stage,
        frozen=["model.norm.weight", "model.layers.0.mlp.up_proj.weight"],
    )
    assert_reads(open_checkpoint(tmp_path), tensors)


def test_below_trainers_folder_the_masters_go_before_the_16_bit_export(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        write_checkpoint(
            folder, {n: t.bfloat16() for n, t in weights().items()}, config={"model_type": "llama"}
        )
        write_zero(folder / f"global_step{step}", weights(), 2, stage=3)
    run = open_run(tmp_path)
    assert run.notes[0] == "read as DeepSpeed ZeRO partitions, float32, 2 steps"
    assert_reads(run.checkpoint(4), weights())
    assert set(run.checkpoint(4).files()) == {"config.json"}
    assert open_run(tmp_path, source_format="huggingface").dtype == "bfloat16"  # type: ignore[attr-defined]


def test_of_two_tags_the_latest_is_taken(tmp_path: Path) -> None:
    write_zero(tmp_path / "checkpoint-9" / "global_step8", {"w": torch.zeros(3)}, 1, stage=2)
    write_zero(tmp_path / "checkpoint-9" / "global_step9", {"w": torch.ones(3)}, 1, stage=2)
    (tmp_path / "checkpoint-9" / "latest").write_text("global_step8\n")
    assert_reads(open_run(tmp_path).checkpoint(9), {"w": torch.zeros(3)})


def resave(path: Path, change: Callable[[Any], object]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def drop_embedding(content: Any) -> None:
    content["param_shapes"][0].pop("model.embed_tokens.weight")


OPTIMIZER = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (
            2,
            lambda f: (f / OPTIMIZER).unlink(),
            r"optim_states\.pt file of rank 1 is missing; copy all of them",
        ),
        (3, lambda f: (f / OPTIMIZER.replace("rank_1", "rank_2")).unlink(), "holds 2 of 3"),
        (
            3,
            lambda f: (f / f"zero_pp_rank_1_{MODEL}").unlink(),
            r"holds 2 of 3 \*_model_states\.pt files",
        ),
        (2, lambda f: (f / MODEL).unlink(), r"has no \*_model_states\.pt"),
        (
            2,
            lambda f: (f / OPTIMIZER).write_bytes((f / OPTIMIZER).read_bytes()[:-5]),
            "it is truncated",
        ),
        (
            2,
            lambda f: shutil.copy(f / MODEL, f / MODEL.replace("00", "01")),
            "is split by tensor parallelism",
        ),
        (
            2,
            lambda f: resave(f / OPTIMIZER, lambda c: c.pop("optimizer_state_dict")),
            "is not a ZeRO optimizer state",
        ),
        (
            2,
            lambda f: resave(f / MODEL, lambda c: c.pop("param_shapes")),
            "does not list param_shapes",
        ),
        (2, lambda f: resave(f / MODEL, drop_embedding), r"its parameters take [\d,]+ of [\d,]+"),
        (
            3,
            lambda f: resave(
                f / f"zero_pp_rank_0_{MODEL}", lambda c: c["param_shapes"][0].popitem()
            ),
            "elements of a rank",
        ),
        (
            2,
            lambda f: resave(
                f / MODEL, lambda c: c["param_shapes"][0].update(w=torch.Size([9999]))
            ),
            "its pieces hold",
        ),
        (
            2,
            lambda f: resave(f / MODEL, lambda c: c.update(shared_params=[3])),
            "not described as DeepSpeed does",
        ),
        (
            2,
            lambda f: resave(f / MODEL, lambda c: c["module"].update({3: torch.ones(2)})),
            "not described as DeepSpeed does",
        ),
        (
            2,
            lambda f: resave(f / MODEL, lambda c: c.update(param_shapes=[3])),
            "has 1 groups of parameters",
        ),
        (
            2,
            lambda f: resave(f / MODEL, lambda c: c.update(param_shapes=[3, 4])),
            "not described as DeepSpeed does",
        ),
    ],
)
def test_damage_is_refused_by_name(
    tmp_path: Path, stage: int, change: Callable[[Path], object], message: str
) -> None:
    write_zero(tmp_path, weights(), 3, stage=stage)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [OPTIMIZER, MODEL])
def test_code_in_any_file_is_refused_and_the_folders_scripts_are_not_run(
    tmp_path: Path, name: str
) -> None:
    marker = tmp_path / "executed"
    write_zero(tmp_path / "step", weights(), 2, stage=2)
    (tmp_path / "step" / "zero_to_fp32.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    open_checkpoint(tmp_path / "step")
    resave(tmp_path / "step" / name, lambda c: c.update(x=Malicious(marker)))
    with pytest.raises(
        CheckpointError, match=rf"{name}: cannot be read safely: it refers to 'posix.mkdir'"
    ):
        open_checkpoint(tmp_path / "step")
    assert not marker.exists()
