"""The real loggers, offline, across a resume, and what is said where one is missing."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_train import settings
from tiny_models import save_tiny_model

from relexkit import RelexkitError
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.loop import loggers
from relexkit.trainer.loop.loggers import LOGGERS, logger_names
from relexkit.trainer.loop.train import train

LOG = """
import sys
from functools import partial
from pathlib import Path
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.loop.loggers import LOGGERS
from relexkit.trainer.loop.run_log import RunLog

name, folder, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
config = GRPOConfig(model="m", task="arithmetic", output=str(folder), report_to=name)
make = partial(LOGGERS[name], folder, step, config)
with RunLog(folder, step, 5, loggers=[make], active=True) as log:
    for done in range(step + 1, step + 4):
        advice = "keep training" if done == 2 else None
        log.write(done, {"reward": done / 4, "rewards/math/mean": float("nan")}, advice)
"""


def logged_twice(name: str, folder: Path) -> str:
    """Log steps 1 to 3, then go on after step 2; the standard output, which is for results."""
    folder.mkdir()
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "HF_HUB_OFFLINE": "1",
    }
    said = ""
    for step in ("0", "2"):
        command = [sys.executable, "-c", LOG, name, str(folder), step]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    return said


def test_trackio_has_every_step_of_one_run_once(tmp_path):
    assert logged_twice("trackio", tmp_path / "first") == ""
    with sqlite3.connect(tmp_path / "first" / "trackio" / "relexkit.db") as database:
        query = "SELECT run_name, step, metrics FROM metrics ORDER BY step"
        rows = database.execute(query).fetchall()
    database.close()
    assert {name for name, _, _ in rows} == {"first"}
    assert [step for _, step, _ in rows] == [1, 2, 3, 4, 5]
    assert [json.loads(found)["reward"] for _, _, found in rows] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert json.loads(rows[1][2])["advice"] == "keep training"


def records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB, pieces with a header of 7 bytes."""
    place, record = 7, b""  # after wandb's own header
    while place < len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def histories(folder: Path) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Of every offline run below ``folder``, in order: id, and the rows of its history."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted(folder.rglob("*.wandb")):
        identity, rows = "", []
        for content in records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            identity = record.run.run_id or identity
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows += [row] if row else []
        found[path.parent.name] = [(identity, row) for row in rows]
    return found


@pytest.mark.filterwarnings("default")  # of wandb's reader
def test_wandb_writes_offline_runs_of_one_id(tmp_path):
    assert logged_twice("wandb", tmp_path / "first") == ""
    found = histories(tmp_path / "first" / "wandb")
    rows = [row for run in found.values() for row in run]
    assert len(found) == 2
    assert {identity for identity, _ in rows} == {
        (tmp_path / "first" / "wandb" / "run-id").read_text()
    }
    assert [row["_step"] for _, row in rows] == [1, 2, 3, 3, 4, 5]
    assert [row["reward"] for _, row in rows] == [0.25, 0.5, 0.75, 0.75, 1.0, 1.25]
    assert rows[1][1]["advice"] == "keep training"


def test_names_are_those_of_trl(monkeypatch):
    assert logger_names("none") == logger_names([]) == []
    assert logger_names("tensorboard") == ["tensorboard"]
    assert logger_names(["wandb", "trackio"]) == ["wandb", "trackio"]
    assert logger_names("all") == list(LOGGERS)
    with pytest.raises(RelexkitError, match="'comet' is unknown; expected tensorboard, trackio"):
        logger_names(["comet"])
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "trackio" else name)
    assert logger_names("all") == ["tensorboard", "wandb"]
    with pytest.raises(RelexkitError, match=r"trackio is not installed; install relexkit\[log\]"):
        logger_names("trackio")


def test_a_missing_package_is_said_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    config = GRPOConfig(model="no/model", task="?", output=str(tmp_path / "o"), report_to="wandb")
    with pytest.raises(RelexkitError, match="wandb is not installed"):
        train(config)
    assert not (tmp_path / "o").exists()


def test_a_run_reports_to_what_it_is_told(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    options = {"max_steps": 1, "save_steps": 0, "record_every": 0}
    folder = train(settings(base, tmp_path / "out", report_to="none", **options))
    assert not (folder / "events").exists()
    train(settings(base, tmp_path / "out", **(options | {"max_steps": 2})))  # the same run
    assert list((folder / "events").iterdir())
