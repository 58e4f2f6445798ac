"""The reader of Hugging Face folders: names, nesting, indexes, unsafe files, metrics."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Run, raw_bits, write_checkpoint, write_run

from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.errors import CheckpointError

TINY = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.tensor([1.0, -0.0])}


def check_checkpoint(run: Run, step: int) -> None:
    checkpoint = open_run(run.source).checkpoint(step)
    written = run.weights[step]
    assert set(checkpoint.tensors) == set(written)
    for name, tensor in written.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
        )
        bits = raw_bits(tensor)
        out = np.empty_like(bits)
        checkpoint.read_into(name, 0, out)
        np.testing.assert_array_equal(out, bits)
        low, high = len(bits) // 3, len(bits) // 3 * 2
        piece = np.empty(high - low, bits.dtype)
        checkpoint.read_into(name, low, piece)
        np.testing.assert_array_equal(piece, bits[low:high])
    checkpoint.close()


@pytest.mark.parametrize("layout", ["hf", "sharded", "bin", "sharded-bin"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_layout_gives_the_bits_that_were_written(
    tmp_path: Path, layout: str, dtype: str
) -> None:
    run = write_run(
        tmp_path, steps=[4], dtype=dtype, layout=layout, buffers=True, head="own", density=0.3
    )
    check_checkpoint(run, 4)


@pytest.mark.parametrize(
    "naming", ["checkpoint-{}", "global_step_{}", "global_step{}", "step_{}", "step-{}"]
)
@pytest.mark.parametrize("inside", [".", "huggingface", "actor/huggingface"])
def test_every_name_and_nesting_is_found_and_sorted_as_numbers(
    tmp_path: Path, naming: str, inside: str
) -> None:
    run = write_run(
        tmp_path,
        steps=[10, 9, 100, 2],
        naming=naming,
        inside=inside,
        shapes={"w": (3, 5)},
        density=1.0,
    )
    found = open_run(run.source)
    assert found.steps == [2, 9, 10, 100]
    for step in found.steps:
        check_checkpoint(run, step)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-best",
        "checkpoint-5-old",
        "my-checkpoint-5",
        "checkpoint--5",
        "checkpoint-5.tmp",
        "runs",
    ],
)
def test_other_folders_are_no_steps(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / name, TINY)
    with pytest.raises(
        CheckpointError,
        match=f"{tmp_path.name}: holds no steps; expected sub-folders named checkpoint-N",
    ):
        open_run(tmp_path)
    write_checkpoint(tmp_path / "checkpoint-7", TINY)
    (tmp_path / "checkpoint-8").write_text("a file, not a folder")
    assert open_run(tmp_path).steps == [7]


@pytest.mark.parametrize(
    ("first", "second"), [("checkpoint-5", "step_5"), ("checkpoint-5", "checkpoint-05")]
)
def test_the_same_step_twice_names_both_folders(tmp_path: Path, first: str, second: str) -> None:
    for name in (first, second):
        write_checkpoint(tmp_path / name, TINY)
    with pytest.raises(CheckpointError, match="step 5 occurs twice") as caught:
        open_run(tmp_path)
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match="nothing: no such folder; expected one with a sub-folder for each step",
    ):
        open_run(tmp_path / "nothing")


def test_a_step_without_weights_names_the_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-1", TINY)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(
        CheckpointError,
        match=r"step 2: .*holds no weights; expected model.safetensors, pytorch_model.bin",
    ):
        open_run(tmp_path).checkpoint(2)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    """Two saves in one folder: what is imported is what ``from_pretrained`` would have loaded."""
    write_checkpoint(tmp_path / "checkpoint-1", {"single": torch.zeros(3)})
    write_checkpoint(tmp_path / "checkpoint-1", TINY, layout="sharded", shards=2)
    assert set(open_run(tmp_path).checkpoint(1).tensors) == {"single"}


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"pickled": torch.zeros(3)}, layout="bin")
    write_checkpoint(tmp_path, TINY)
    assert set(open_checkpoint(tmp_path).tensors) == set(TINY)


def set_weight_map(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["relative", "absolute", "below"])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path / "other", TINY)
    write_checkpoint(tmp_path / "model" / "below", TINY)
    target = {
        "relative": "../other/model.safetensors",
        "absolute": str(tmp_path / "other" / "model.safetensors"),
        "below": "below/model.safetensors",
    }[kind]
    set_weight_map(tmp_path / "model", dict.fromkeys(TINY, target))
    with pytest.raises(
        CheckpointError, match=r"names the file '.*'; expected a plain file name in the same folder"
    ):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_an_index_that_names_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    set_weight_map(tmp_path, {"a.weight": name})
    with pytest.raises(CheckpointError, match=r"index.json: names"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"weight_map": 3}',
        '{"weight_map": ["a"]}',
        "{}",
        "\xff\xfe",
        '{"weight_map": {}}',
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index.json: is not a valid index"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_and_a_tensor_that_is_not_in_its_shard_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, layout="sharded", shards=2)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="tensor 'ghost' is in the index but not in the file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names model-00002-of-00002.safetensors, which does not exist"
    ):
        open_checkpoint(tmp_path)


def test_a_file_is_closed_after_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, layout="sharded", shards=2)
    broken = tmp_path / "model-00002-of-00002.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(CheckpointError, match="is truncated"):
            open_checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# -- pickles ---------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["torch", "bare", "inside", "old"])
def test_a_malicious_pickle_is_never_executed(tmp_path: Path, form: str) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "pytorch_model.bin"
    if form == "bare":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:
        state: Any = (
            {"w": torch.ones(2), "x": Malicious(marker)} if form == "inside" else Malicious(marker)
        )
        torch.save(state, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: cannot be read safely"
    ) as caught:
        open_checkpoint(tmp_path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)


def test_the_pickle_of_that_test_is_malicious(tmp_path: Path) -> None:
    torch.save(Malicious(tmp_path / "executed"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_pickle_that_is_no_dictionary_of_tensors_is_refused(tmp_path: Path) -> None:
    for content in ([torch.ones(2)], {"a": 3}, {"a": {"b": torch.ones(2)}}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="is not a dictionary of tensors"):
            open_checkpoint(tmp_path)


def test_a_truncated_pickle_is_refused_and_names_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "step_3"
    write_checkpoint(folder, TINY, layout="bin")
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"step 3: .*pytorch_model.bin: cannot be read"):
            open_run(tmp_path).checkpoint(3)


def test_views_in_a_pickle_are_read_as_their_values(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    state = {"t": whole.T, "slice": whole[1:3, ::2], "flat": whole.reshape(-1)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in state.items():
        out = np.empty(tensor.numel(), np.uint16)
        checkpoint.read_into(name, 0, out)
        np.testing.assert_array_equal(out, raw_bits(tensor), err_msg=name)


def test_a_pickle_in_the_old_format_is_read_or_refused_with_a_reason(tmp_path: Path) -> None:
    torch.save(TINY, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        open_checkpoint(tmp_path)


# -- files and metrics -----------------------------------------------------------------------------


def test_configuration_and_tokenizer_files_are_kept_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, config={"model_type": "llama"})
    kept = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "preprocessor_config.json",
        "qwen.tiktoken",
    }
    for name in kept:
        (tmp_path / name).write_bytes(name.encode() + b"\x00\xff")
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "rng_state.pth",
        "trainer_state.json",
        "scheduler.pt",
        "xconfig.json",
    ):
        (tmp_path / name).write_bytes(b"no")
    (tmp_path / "vocab").mkdir()
    files = open_checkpoint(tmp_path).files()
    assert set(files) == kept | {"config.json"}
    for name in kept:
        assert files[name] == name.encode() + b"\x00\xff"


def metrics_of(folder: Path, text: str) -> dict[str, float]:
    write_checkpoint(folder, TINY)
    (folder / "trainer_state.json").write_bytes(text.encode("latin-1"))
    return open_checkpoint(folder).metrics()


def test_metrics_are_the_entries_of_the_steps_own_number(tmp_path: Path) -> None:
    history = [
        {"step": 4, "reward": 9.0},
        {
            "step": 5,
            "epoch": 1.0,
            "reward": 0.25,
            "kl": 1e-3,
            "text": "no",
            "flags": [1],
            "nan": float("nan"),
        },
        {"step": 5, "eval_loss": 2},
    ]
    state = json.dumps({"global_step": 5, "log_history": history})
    assert metrics_of(tmp_path, state) == {"reward": 0.25, "kl": 1e-3, "eval_loss": 2.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"global_step": 1}',
        '{"log_history": 3, "global_step": 1}',
        "\xff\xfe\x00",
        '{"global_step": 1, "log_history": [3]}',
        '{"global_step": 1, "log_history": null}',
        '{"global_step": 1, "log_history": [{"step": 1, "reward": 1e999}]}',
        '{"global_step": 1, "log_history": {"step": 1}}',
        '{"global_step": 1, "log_history": [{"step": 1, "huge": 1' + "0" * 400 + "}]}",
        "[" * 100_000,
    ],
)
def test_a_broken_trainer_state_means_no_metrics(tmp_path: Path, text: str) -> None:
    assert metrics_of(tmp_path, text) == {}


def test_no_trainer_state_means_no_metrics(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY)
    assert open_checkpoint(tmp_path).metrics() == {}
