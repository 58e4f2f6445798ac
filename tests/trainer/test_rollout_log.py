"""The rollout log: one table from many files, whole files only, cut where a resume begins."""

from __future__ import annotations

import errno
import re
from dataclasses import asdict, fields, replace

import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as parquet
import pytest

from relexkit import RelexkitError
from relexkit.trainer.loop.rollout_log import Rollout, read_rollouts, truncate_after, write_step

ONE = Rollout(
    step=1,
    problem="a",
    prompt="2+2=",
    text="4",
    prompt_ids=[4, 12, 4, 14],
    completion_ids=[6, 1],
    logprobs=[-0.25, -0.5],
    truncated=False,
    reward=1.0,
    right=True,
    advantage=0.75,
)
EMPTY = replace(
    ONE,
    problem="b",
    text="",
    completion_ids=[],
    logprobs=[],
    truncated=True,
    reward=0.0,
    right=True,
    advantage=-0.75,
)


def write_steps(folder, steps, processes=1):
    for step in steps:
        for process in range(processes):
            rows = [
                replace(row, step=step, problem=f"{row.problem}{process}") for row in (ONE, EMPTY)
            ]
            write_step(folder, step, rows, process=process)


def test_what_is_written_is_read_in_order(tmp_path):
    write_steps(tmp_path, [10, 2, 1], processes=2)
    table = read_rollouts(tmp_path)
    assert table.column("step").to_pylist() == [1] * 4 + [2] * 4 + [10] * 4
    assert table.column("problem").to_pylist() == ["a0", "b0", "a1", "b1"] * 3
    assert table.column_names == [field.name for field in fields(Rollout)]
    assert table.to_pylist()[0] == asdict(replace(ONE, problem="a0"))
    assert table.to_pylist()[1] == asdict(replace(EMPTY, problem="b0"))
    chosen = read_rollouts(tmp_path, columns=["reward", "text"], steps=[2, 10])
    assert chosen.column_names == ["reward", "text"]
    assert chosen.num_rows == 8


def test_other_tools_read_the_folder_as_one_table(tmp_path):
    write_steps(tmp_path, [1, 2])
    (tmp_path / ".step-00000003-process-0.parquet.partial").write_bytes(
        b"half a file"
    )  # what a kill leaves
    assert pyarrow.dataset.dataset(tmp_path).count_rows() == 4
    frame = pd.read_parquet(tmp_path)
    assert frame["reward"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert frame["logprobs"][0].tolist() == [-0.25, -0.5]
    assert read_rollouts(tmp_path).num_rows == 4
    meta = parquet.ParquetFile(tmp_path / "step-00000001-process-0.parquet").metadata
    assert {meta.row_group(0).column(i).compression for i in range(meta.num_columns)} == {"ZSTD"}


def test_a_step_that_is_written_again_replaces_the_former_one(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_step(tmp_path, 2, [replace(ONE, step=2, text="5")])
    assert read_rollouts(tmp_path, columns=["text"]).column("text").to_pylist() == ["4", "", "5"]


def test_truncation_keeps_what_a_resume_goes_on_from(tmp_path):
    write_steps(tmp_path, [1, 5, 9], processes=2)
    truncate_after(tmp_path, 5)
    assert sorted(set(read_rollouts(tmp_path).column("step").to_pylist())) == [1, 5]
    truncate_after(tmp_path, 0)
    with pytest.raises(RelexkitError, match="holds no rollouts; expected those of a training run"):
        read_rollouts(tmp_path)
    truncate_after(tmp_path / "absent", 3)


def test_a_full_disk_leaves_the_former_steps_and_nothing_half_written(tmp_path, monkeypatch):
    write_steps(tmp_path, [1])

    def write_half(table, file, **_):
        file.write(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_steps(tmp_path, [2])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001-process-0.parquet"]


def test_what_is_missing_or_damaged_is_said(tmp_path):
    write_steps(tmp_path, [1])
    with pytest.raises(RelexkitError, match="holds no rollouts of these steps"):
        read_rollouts(tmp_path, steps=[7])
    (tmp_path / "step-00000002-process-0.parquet").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(
        RelexkitError, match=rf"{re.escape(str(tmp_path))}: a file of rollouts cannot be read"
    ):
        read_rollouts(tmp_path)
