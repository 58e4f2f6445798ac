"""Hostile input: random damage to every format, in processes that may use little memory and are watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_changes_to_every_format_are_refused_or_harmless(tmp_path: Path, name: str) -> None:
    check(fuzz(tmp_path, 10_000, name), 10_000)
