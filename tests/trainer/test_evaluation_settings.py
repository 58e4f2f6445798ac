"""Task and length come from the run that a store or a model belongs to, unless told otherwise."""

from __future__ import annotations

import json

import pytest
from test_train import settings
from tiny_models import save_tiny_model

from relexkit.cli import main
from relexkit.trainer.loop.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    base = save_tiny_model(root / "base")
    rows = [{"prompt": f"{n:02d}>", "answer": str(n % 10)} for n in range(30)]
    (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "file", "path": str(root / "t.jsonl"), "num_validation": 20}
    options = {"max_steps": 4, "max_completion_length": 3, "save_steps": 0}
    return train(settings(base, root / "out", task=task, **options))


def asked(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_takes_both_from_the_run(run, capsys):
    for place in (run / "run.zarr", run / "final"):
        found = asked(capsys, "evaluate", place)
        assert (found["task"], found["max_completion_length"]) == ("t.jsonl", 3)
        assert found["models"][0]["num_problems"] == 20
    found = asked(capsys, "evaluate", run / "final", "--max-completion-length", 2, "--split", "all")
    assert found["max_completion_length"] == 2
    assert found["models"][0]["num_problems"] == 30


def test_a_whole_file_of_any_size_can_be_asked(run, capsys):
    task = f"{{name: file, path: {run.parent}/t.jsonl}}"
    for split in ("all", "validation"):
        found = asked(capsys, "evaluate", run / "final", "--task", task, "--split", split)
        assert found["models"][0]["num_problems"] == 30


def test_sweep_takes_both_from_the_run_and_marks_what_was_stopped(run, capsys):
    found = asked(capsys, "sweep", run / "run.zarr", "--to", 5, 6, 8, "--method", "relex", "drift")
    assert found["task"] == "t.jsonl"
    assert "--max-completion-length 3" in found["command"]
    assert "num_validation" in found["command"]
    for candidate in found["candidates"]:
        assert candidate["stopped"] == (candidate["num_problems"] < found["num_problems"])


def test_without_a_run_the_task_is_asked_for_before_anything_slow(run, capsys):
    assert main(["evaluate", str(run.parent / "base")]) == 1
    assert (
        "belongs to no training run that says its task; expected --task" in capsys.readouterr().err
    )
    assert main(["evaluate", "nowhere", "--task", "{name: file"]) == 1
    assert "is no YAML" in capsys.readouterr().err


def test_a_length_that_does_not_fit_names_the_option(run, capsys):
    task = f"{{name: file, path: {run.parent}/t.jsonl}}"
    assert main(["evaluate", str(run.parent / "base"), "--task", task]) == 1
    assert "give --max-completion-length" in capsys.readouterr().err
