"""Runs: names of steps, what is whole, which format is taken, step maps, and what is recognised and
refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import LLAMA_SHAPES, Weights, write_checkpoint
from sharded import assert_reads, write_dcp, write_verl

from relexkit import import_checkpoints
from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.cli import main
from relexkit.errors import CheckpointError


def weights(step: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in LLAMA_SHAPES.items()}


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-7",
        "global_step_7",
        "global_step7",
        "global_steps_7",
        "step_7",
        "step-7",
        "step7",
        "iter_0000007",
        "DAPO-step-7",
        "global_step7_hf",
    ],
)
def test_every_name_of_a_step(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / name, weights())
    (tmp_path / "best_global_step9").mkdir()
    (tmp_path / "step_8_universal").mkdir()
    assert open_run(tmp_path).steps == [7]


@pytest.mark.parametrize("below", ["_actor", "checkpoints"])
def test_steps_may_lie_one_level_below_the_run(tmp_path: Path, below: str) -> None:
    write_checkpoint(tmp_path / below / "global_step3", weights())
    write_checkpoint(tmp_path / "global_step5_hf", weights())
    assert open_run(tmp_path).steps == [3, 5]


def test_names_in_flight_are_reported_and_not_taken(tmp_path: Path) -> None:
    for name in ("tmp_step_9", "tmp-checkpoint-9", "old_step_4", "checkpoint-9.incomplete"):
        write_checkpoint(tmp_path / name, weights())
    write_checkpoint(tmp_path / "step_4", weights())
    run = open_run(tmp_path)
    assert run.steps == [4]
    assert set(run.left_out) == {
        "tmp_step_9",
        "tmp-checkpoint-9",
        "old_step_4",
        "checkpoint-9.incomplete",
    }
    assert set(run.left_out.values()) == {"is the name of a checkpoint that is being written"}


def test_steps_without_their_marker_are_left_out(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / "trainer" / f"checkpoint-{step}", weights())
        (tmp_path / "trainer" / f"checkpoint-{step}" / "training_args.bin").write_bytes(b"")
        write_checkpoint(tmp_path / "broadcasts" / f"step_{step}", weights())
        write_verl(tmp_path / "verl" / f"global_step_{step}" / "actor", weights(), (2,))
    (tmp_path / "trainer" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (tmp_path / "broadcasts" / "step_1" / "STABLE").touch()
    (tmp_path / "verl" / "latest_checkpointed_iteration.txt").write_text("1")
    for name, reason in (
        ("trainer", "has no trainer_state.json, which Trainer writes last"),
        ("broadcasts", "has no STABLE, which prime-rl writes last"),
        ("verl", "was being written: latest_checkpointed_iteration.txt says 1"),
    ):
        run = open_run(tmp_path / name)
        assert run.steps == [1], name
        assert list(run.left_out) == ["step 2"]
        assert reason in run.left_out["step 2"]
        with pytest.raises(CheckpointError, match=r"step 2: .*written"):
            run.checkpoint(2)


def test_missing_ranks_and_truncated_chunks_are_left_out_and_never_zero(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_verl(tmp_path / "v" / f"global_step_{step}", weights(step), (2,))
        write_dcp(tmp_path / "d" / f"step-{step}", weights(step), 2)
    (tmp_path / "v" / "global_step_2" / "model_world_size_2_rank_1.pt").unlink()
    chunk = tmp_path / "d" / "step-2" / "__1_0.distcp"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    for name in ("v", "d"):
        run = open_run(tmp_path / name)
        assert (run.steps, list(run.left_out)) == ([1, 3], ["step 2"])
        assert_reads(run.checkpoint(3), weights(3))


def side_by_side(source: Path, step: int, *, shards: bool = True, export: bool = True) -> None:
    """A verl step: float32 shards, and its bfloat16 export beside them."""
    actor = source / f"global_step_{step}" / "actor"
    if shards:
        write_verl(actor, weights(step), (2,))
    if export:
        write_checkpoint(actor / "huggingface", {n: t.bfloat16() for n, t in weights(step).items()})


def test_the_most_precise_source_is_taken_and_said_and_can_be_overridden(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        side_by_side(tmp_path, step)
    run = open_run(tmp_path)
    assert run.description == f"verl FSDP shards in {tmp_path.name}"
    assert run.notes == [
        "read as verl FSDP shards, float32, 3 steps",
        "also there: Hugging Face folders, bfloat16, 3 steps (--format huggingface)",
    ]
    assert_reads(run.checkpoint(2), weights(2))
    other = open_run(tmp_path, source_format="huggingface")
    assert_reads(other.checkpoint(2), {n: t.bfloat16() for n, t in weights(2).items()})
    assert_reads(open_checkpoint(tmp_path / "global_step_2"), weights(2))
    assert (
        next(
            iter(
                open_checkpoint(
                    tmp_path / "global_step_2", source_format="huggingface"
                ).tensors.values()
            )
        ).dtype
        == "bfloat16"
    )


def test_of_equal_precision_the_plain_folder_is_taken(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-1", weights())
    write_dcp(tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0", weights(), 2, prefix="model.")
    assert open_run(tmp_path).description == f"Hugging Face folders in {tmp_path.name}"


def test_a_precise_source_that_lacks_most_steps_is_not_taken(tmp_path: Path) -> None:
    """verl rotates its shards away and may keep the exports."""
    for step in (1, 2, 3, 4, 5):
        side_by_side(tmp_path, step, shards=step > 3)
    run = open_run(tmp_path)
    assert (run.steps, run.description) == (
        [1, 2, 3, 4, 5],
        f"Hugging Face folders in {tmp_path.name}",
    )
    assert "verl FSDP shards, float32, 2 steps (--format verl)" in run.notes[1]
    side_by_side(tmp_path, 3)
    run = open_run(tmp_path)
    assert (run.steps, run.description) == ([3, 4, 5], f"verl FSDP shards in {tmp_path.name}")
    assert run.left_out == {
        "step 1": "has no verl FSDP shards",
        "step 2": "has no verl FSDP shards",
    }


def test_an_unknown_or_absent_format_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step_1", weights())
    with pytest.raises(
        CheckpointError,
        match="--format gguf is unknown; choose one of peft, huggingface, verl, dcp, deepspeed",
    ):
        open_run(tmp_path, source_format="gguf")
    with pytest.raises(
        CheckpointError, match="holds no dcp checkpoints; leave --format out to see what is there"
    ):
        open_run(tmp_path, source_format="dcp")


@pytest.mark.parametrize(
    ("files", "command"),
    [
        (
            ["actor/dist_ckpt/.metadata"],
            "python -m verl.model_merger merge --backend megatron --local_dir {0}/actor",
        ),
        (
            ["common.pt", "metadata.json", ".metadata"],
            r"AutoBridge.from_hf_pretrained('BASE').export_ckpt('{0}', ",
        ),
        (["mp_rank_00/model_optim_rng.pt"], r"export_ckpt('{0}', "),
        (
            ["policy/weights/iter_0000000/common.pt", "policy/weights/iter_0000000/metadata.json"],
            (
                "convert_megatron_to_hf.py --config {0}/config.yaml --megatron-ckpt-path"
                " {0}/policy/weights/iter_0000000"
            ),
        ),
        (
            ["pytorch_model_fsdp_rank0.bin"],
            "a file for each rank that does not describe the whole (LOCAL_STATE_DICT",
        ),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, files: list[str], command: str
) -> None:
    step = tmp_path / "global_step_5"
    for name in files:
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).touch()
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path)
    assert command.format(step) in str(caught.value)
    assert "step 5" in str(caught.value)


def test_an_export_beside_an_unsupported_layout_is_taken(tmp_path: Path) -> None:
    (tmp_path / "step_5" / "actor" / "dist_ckpt").mkdir(parents=True)
    write_checkpoint(tmp_path / "step_5" / "actor" / "huggingface", weights())
    assert_reads(open_run(tmp_path).checkpoint(5), weights())


# -- step maps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_map", "steps"), [("2", [0, 20, 40, 80]), ("1/10", [0, 1, 2, 4]), ("1", [0, 10, 20, 40])]
)
def test_a_factor_makes_steps_of_labels(tmp_path: Path, step_map: str, steps: list[int]) -> None:
    for label in (0, 10, 20, 40):
        write_checkpoint(tmp_path / f"step_{label}", weights(label))
    run = open_run(tmp_path, step_map=step_map)
    assert run.steps == steps
    assert_reads(run.checkpoint(steps[2]), weights(20))
    assert run.checkpoint(steps[2]).metrics() == {"label": 20.0}


def test_a_table_makes_steps_of_labels_and_is_kept_as_a_metric(tmp_path: Path) -> None:
    for label in (0, 1, 2, 3):
        write_checkpoint(tmp_path / "run" / f"step_{label}", weights(label))
    (tmp_path / "map.json").write_text(json.dumps({"1": 7, "3": 8}))
    result = import_checkpoints(
        tmp_path / "run", tmp_path / "s.zarr", step_map=str(tmp_path / "map.json")
    )
    assert result.store.steps.tolist() == [7, 8]
    assert result.left_out == {"step 2": "the step map does not name it"}
    assert result.store.metrics()["label"].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("step_map", "message"),
    [
        ("0", "--step-map 0 is not positive"),
        ("-2", "is not positive"),
        ("1/3", "makes step 0.333333 of label 1"),
        ("nowhere.json", "--step-map nowhere.json is neither a number nor a file"),
    ],
)
def test_a_wrong_factor_is_refused(tmp_path: Path, step_map: str, message: str) -> None:
    write_checkpoint(tmp_path / "step_1", weights())
    with pytest.raises(CheckpointError, match=message):
        open_run(tmp_path, step_map=step_map)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": 1}', '{"1": -1}', '{"1": "2"}', '{"1": 1.5}', "[" * 100_000]
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path / "step_1", weights())
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"map\.json: is not a step map"):
        open_run(tmp_path, step_map=str(tmp_path / "map.json"))


def test_a_map_that_joins_or_drops_everything_is_refused(tmp_path: Path) -> None:
    for label in (1, 2):
        write_checkpoint(tmp_path / f"step_{label}", weights())
    (tmp_path / "join.json").write_text('{"1": 5, "2": 5}')
    (tmp_path / "none.json").write_text('{"8": 5}')
    with pytest.raises(CheckpointError, match="makes step 5 of the labels 1 and 2"):
        open_run(tmp_path, step_map=str(tmp_path / "join.json"))
    with pytest.raises(CheckpointError, match="the step map leaves no step"):
        open_run(tmp_path, step_map=str(tmp_path / "none.json"))


# -- commands --------------------------------------------------------------------------------------


def test_info_names_the_format_of_a_run_and_of_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 3):
        side_by_side(tmp_path / "run", step)
    write_checkpoint(tmp_path / "run" / "global_step_4", {}, config={})
    assert main(["info", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for words in (
        "verl FSDP shards in run, float32",
        "Hugging Face folders, bfloat16, 2 steps",
        "1,472 elements in 20",
    ):
        assert words in said.replace("\n", " "), said
    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["steps"], document["dtype"], list(document["left_out"])) == (
        [1, 3],
        "float32",
        ["step 4"],
    )
    assert main(["info", str(tmp_path / "run" / "global_step_1" / "actor"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"].startswith("verl FSDP shards of 2 ranks")
    assert main(["info", str(tmp_path / "nowhere")]) == 1
    assert main(["info", str(tmp_path)]) == 1


def test_import_of_shards_says_what_it_took_and_the_store_keeps_the_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "base", weights(0))
    for step in (1, 2, 3):
        side_by_side(tmp_path / "run", step)
    (tmp_path / "run" / "global_step_2" / "actor" / "model_world_size_2_rank_0.pt").unlink()
    given = [
        "import",
        str(tmp_path / "run"),
        "-o",
        str(tmp_path / "s.zarr"),
        "--base",
        str(tmp_path / "base"),
    ]
    assert main([*given, "--encoding", "exact"]) == 0
    said = capsys.readouterr()
    assert "read as verl FSDP shards, float32, 2 steps\n" in said.err
    assert "step 2 left out: " in said.err
    assert "verl FSDP shards in run" in said.out
    assert (
        main(
            [
                *given[:3],
                str(tmp_path / "h.zarr"),
                *given[4:],
                "--format",
                "huggingface",
                "--encoding",
                "exact",
            ]
        )
        == 1
    )
    assert "relexkit round BASE --dtype bfloat16" in capsys.readouterr().err
