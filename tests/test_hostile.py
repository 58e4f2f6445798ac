"""Hostile input: random damage to every format, in processes that may use little memory and are watched."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import write_checkpoint
from sharded import write_dcp

from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.errors import CheckpointError

SCRIPT = Path(__file__).with_name("fuzz_readers.py")
FORMATS = ("safetensors", "safetensors-index", "bin", "verl", "dcp", "zero-2", "zero-3")


def fuzz(folder: Path, count: int, *formats: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, str(SCRIPT), str(folder), "--count", str(count), "--formats", *formats]
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


def test_links_that_lead_back_are_neither_followed_for_ever_nor_taken_for_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoint-1", {"w": torch.ones(3)})
    (run / "checkpoint-2").symlink_to(run / "checkpoint-2")
    (run / "_actor").symlink_to(run)
    (run / "checkpoint-1" / "actor").symlink_to(run / "checkpoint-1")
    (run / "checkpoint-1" / "huggingface").symlink_to(run / "checkpoint-1" / "huggingface")
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "model.safetensors").symlink_to(run / "checkpoint-3" / "model.safetensors")
    assert open_run(run).steps == [1]


def test_a_chunk_that_claims_more_than_its_bytes_is_refused_when_opened(tmp_path: Path) -> None:
    write_dcp(tmp_path, {"w": torch.ones(3)}, 1)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    huge = torch.Size([2**40])
    metadata.state_dict_metadata["w"].size = metadata.state_dict_metadata["w"].chunks[0].sizes = huge
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"the chunk of shape \[1099511627776\] is said to have \d+ bytes"):
        open_checkpoint(tmp_path)


def test_a_dtype_that_no_store_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp", {"w": torch.ones(3, dtype=torch.complex64)}, 1)
    torch.save({"w": torch.ones(3, dtype=torch.complex64)}, tmp_path / "pytorch_model.bin")
    for folder in (tmp_path / "dcp", tmp_path):
        with pytest.raises(CheckpointError, match=r"complex64|ComplexFloatStorage"):
            open_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_changes_to_every_format_are_refused_or_harmless(tmp_path: Path, name: str) -> None:
    check(fuzz(tmp_path, 10_000, name), 10_000)
