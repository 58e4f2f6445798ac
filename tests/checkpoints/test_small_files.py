"""What is kept beside the weights: all that a loader may need, in sets that come from one side, and
nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import write_run

from relexkit import checkout, import_checkpoints
from relexkit.checkpoints.small_files import MAX_OTHER_BYTES, merged_files, model_files
from relexkit.errors import CheckpointError
from relexkit.store import SAFE_FILE_NAME

KEPT = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spm.model",
    "source.spm",
    "tiktoken.model",
    "cl100k.tiktoken",
    "normalizer.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "custom_generate/generate.py",
}
WITH_CODE = {"modeling_own.py", "tokenization_own.py", "layers.py", "own_table.json", "words.txt"}
NEVER = {
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "rng_state.pth",
    "all_results.json",
    "model.safetensors.index.json",
    "README.md",
    "LICENSE.txt",
    "zero_to_fp32.py",
    "picture.png",
    ".hidden.json",
    "original/params.json",
    "nested/additional_chat_templates/x.jinja",
}


def write(folder: Path, names: set[str], content: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("code", [False, True])
def test_what_a_loader_may_need_is_kept(code: bool, tmp_path: Path) -> None:
    write(tmp_path, KEPT | WITH_CODE | NEVER)
    if code:
        (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "own.Config"}}')
    assert model_files(tmp_path).keys() == KEPT | (WITH_CODE if code else set())


def test_a_file_that_is_huge_is_refused_or_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"config.json"}, '{"auto_map": {}}')
    (tmp_path / "own_table.json").write_bytes(b" " * (MAX_OTHER_BYTES + 1))
    assert model_files(tmp_path).keys() == {"config.json"}


@pytest.mark.parametrize(
    "name", ["a/../b", "a/b/c/d", "/a", "a//b", "a/.b", "model-1.safetensors", "zarr.json", "a/__b"]
)
def test_names_that_could_harm_are_none(name: str) -> None:
    assert SAFE_FILE_NAME.fullmatch(name) is None


INLINE = {"tokenizer.json": b"run", "tokenizer_config.json": b"run with template"}
FILES = {"tokenizer.json": b"base", "tokenizer_config.json": b"base", "chat_template.jinja": b"b"}


def test_a_tokenizer_comes_from_one_side() -> None:
    assert merged_files(FILES, INLINE) == INLINE  # not the base's template
    assert merged_files(INLINE, FILES) == FILES
    assert merged_files(FILES, {"config.json": b"run"}) == {**FILES, "config.json": b"run"}
    # a template alone is no tokenizer
    assert merged_files(FILES, {"chat_template.jinja": b"r"}) == FILES
    other = {"tokenizer.json": b"run", "additional_chat_templates/x.jinja": b"x"}
    assert merged_files({**FILES, "additional_chat_templates/y.jinja": b"y"}, other) == other


def test_processor_generation_and_code_come_from_one_side_each() -> None:
    base = {
        "preprocessor_config.json": b"b",
        "processor_config.json": b"b",
        "generation_config.json": b"b",
        "modeling.py": b"b",
        "config.json": b"b",
    }
    run = {"preprocessor_config.json": b"r", "config.json": b"r"}
    assert merged_files(base, run) == {
        **dict.fromkeys(("generation_config.json", "modeling.py"), b"b"),
        **run,
    }


def test_files_in_folders_go_through_a_store(tmp_path: Path) -> None:
    run = write_run(tmp_path, shapes={"w": (5,)}, steps=(1, 2))
    names = {"tokenizer.json", "additional_chat_templates/tools.jinja"}
    write(run.folders[1], names, "text")
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    store.verify()
    out = checkout(store, 2, tmp_path / "out")
    assert all((out / name).read_text() == "text" for name in names)


def test_info_lists_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from relexkit.cli import main

    run = write_run(tmp_path, shapes={"w": (5,)}, steps=(1,))
    write(run.folders[1], {"tokenizer.json"}, "12345")
    import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    main(["info", str(tmp_path / "s.zarr"), "--json"])
    assert json.loads(capsys.readouterr().out)["files"]["tokenizer.json"] == 5
    main(["info", str(tmp_path / "s.zarr")])
    assert "tokenizer.json (5 B)" in capsys.readouterr().out


def test_a_large_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relexkit.checkpoints.small_files.read_small.__defaults__", (10,))
    write(tmp_path, {"tokenizer.json"}, "x" * 11)
    with pytest.raises(CheckpointError, match="has more than 10 bytes"):
        model_files(tmp_path)
