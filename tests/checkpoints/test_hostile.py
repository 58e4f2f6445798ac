"""Hostile input: random damage to every format, in processes that may use little memory and are
watched.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import google_crc32c
import pytest
import torch
from fuzz_readers import WRITERS, read_all
from runs import write_checkpoint
from sharded import Malicious, write_dcp

from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.checkpoints.formats.peft import read_settings
from relexkit.errors import CheckpointError, StoreError
from relexkit.store import TrajectoryStore

SCRIPT = Path(__file__).parents[1].joinpath("fuzz_readers.py")
FORMATS = (
    "safetensors",
    "safetensors-index",
    "bin",
    "verl",
    "dcp",
    "zero-2",
    "zero-3",
    "peft",
    "peft-bin",
    "store",
)


def fuzz(folder: Path, count: int, *formats: str) -> dict[str, dict[str, int]]:
    command = [
        sys.executable,
        str(SCRIPT),
        str(folder),
        "--count",
        str(count),
        "--formats",
        *formats,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(outcomes: dict[str, dict[str, int]], count: int) -> None:
    for name, outcome in outcomes.items():
        assert outcome["refused"] + outcome["read"] == count
        assert outcome["refused"] > count / 4, f"{name}: the damage hardly matters"


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    check(fuzz(tmp_path, 40, *FORMATS), 40)


def test_links_that_lead_back_are_neither_followed_for_ever_nor_taken_for_steps(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoint-1", {"w": torch.ones(3)})
    (run / "checkpoint-2").symlink_to(run / "checkpoint-2")
    (run / "_actor").symlink_to(run)
    (run / "checkpoint-1" / "actor").symlink_to(run / "checkpoint-1")
    (run / "checkpoint-1" / "huggingface").symlink_to(run / "checkpoint-1" / "huggingface")
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "model.safetensors").symlink_to(
        run / "checkpoint-3" / "model.safetensors"
    )
    assert open_run(run).steps == [1]


def test_a_chunk_that_claims_more_than_its_bytes_is_refused_when_opened(tmp_path: Path) -> None:
    write_dcp(tmp_path, {"w": torch.ones(3)}, 1)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    huge = torch.Size([2**40])
    metadata.state_dict_metadata["w"].size = metadata.state_dict_metadata["w"].chunks[0].sizes = (
        huge
    )
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"the chunk of shape \[1099511627776\] is said to have \d+ bytes"
    ):
        open_checkpoint(tmp_path)


def test_a_dtype_that_no_store_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp", {"w": torch.ones(3, dtype=torch.complex64)}, 1)
    torch.save({"w": torch.ones(3, dtype=torch.complex64)}, tmp_path / "pytorch_model.bin")
    for folder in (tmp_path / "dcp", tmp_path):
        with pytest.raises(CheckpointError, match=r"complex64|ComplexFloatStorage"):
            open_checkpoint(folder)


PICKLED = [
    name for name in FORMATS if name not in ("safetensors", "safetensors-index", "peft", "store")
]


def pickled_files(folder: Path) -> list[Path]:
    return [
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
    ]


@pytest.mark.parametrize("name", PICKLED)
def test_code_in_any_file_of_any_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "step")
    files = pickled_files(tmp_path / "step")
    assert files
    for path in files:
        original = path.read_bytes()
        if (
            path.suffix == ".distcp"
        ):  # a chunk lies at its place: the pickle of the archive is exchanged
            continue  # tests/test_dcp.py
        if original[:2] == b"PK":
            torch.save(Malicious(tmp_path / "executed"), path)
        else:
            path.write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
        with pytest.raises(
            CheckpointError, match=r"cannot be read safely: it refers to 'posix\.mkdir'"
        ):
            read_all(tmp_path / "step")
        path.write_bytes(original)
    read_all(tmp_path / "step")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", PICKLED)
def test_an_archive_that_would_unpack_to_more_than_its_size_is_refused_unread(
    tmp_path: Path, name: str
) -> None:
    WRITERS[name](tmp_path / "step")
    bomb = tmp_path / "bomb"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**27))
    for path in pickled_files(tmp_path / "step"):
        original = path.read_bytes()
        path.write_bytes(bomb.read_bytes())
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            read_all(tmp_path / "step")
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("safetensors", "config.json"),
        ("safetensors-index", "model.safetensors.index.json"),
        ("peft", "adapter_config.json"),
        ("verl", "huggingface/tokenizer.json"),
    ],
)
def test_a_small_file_that_is_huge_is_refused_unread(tmp_path: Path, name: str, file: str) -> None:
    WRITERS[name](tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(CheckpointError, match=rf"{Path(file).name}: has more than [\d,]+ bytes"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*b", "a?" * 30 + "a" * 30, "(a|a)" * 30, ".*.*.*.*.*x", "a{1,9}{1,9}{1,9}"],
)
def test_a_pattern_that_could_be_tried_for_ever_is_refused(pattern: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {pattern: 1}}
    with pytest.raises(CheckpointError, match="of module names is too complex to be tried safely"):
        read_settings(config, "x").rank_of("a" * 60 + "!")


def test_an_index_of_a_store_that_points_far_beyond_its_shard_is_refused(tmp_path: Path) -> None:
    WRITERS["store"](tmp_path / "store")
    shard = next(
        p
        for p in sorted((tmp_path / "store" / "base").rglob("*"))
        if p.is_file() and p.name != "zarr.json"
    )
    content = bytearray(shard.read_bytes())
    count = 1
    content[-20:-4] = struct.pack("<QQ", 0, 2**40) * count
    content[-4:] = struct.pack("<I", google_crc32c.value(bytes(content[-20:-4])))
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="the shard is truncated"):
        TrajectoryStore(tmp_path / "store").verify()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_changes_to_every_format_are_refused_or_harmless(
    tmp_path: Path, name: str
) -> None:
    check(fuzz(tmp_path, 10_000, name), 10_000)
