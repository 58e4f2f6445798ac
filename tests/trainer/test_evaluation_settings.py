"""Task and length come from the run that a store or a model belongs to, unless told otherwise."""

from __future__ import annotations

import json
import shutil

import pytest
from test_train import settings
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

from relexkit import Recorder, TrajectoryStore, checkout
from relexkit.cli import main
from relexkit.trainer.evaluation.settings import KEPT
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
        "belongs to no training run that names its task; expected --task" in capsys.readouterr().err
    )
    assert main(["evaluate", "nowhere", "--task", "{name: file"]) == 1
    assert "is no YAML" in capsys.readouterr().err


def test_a_length_that_does_not_fit_names_the_option(run, capsys):
    task = f"{{name: file, path: {run.parent}/t.jsonl}}"
    assert main(["evaluate", str(run.parent / "base"), "--task", task]) == 1
    assert "give --max-completion-length" in capsys.readouterr().err


def moved(run, folder):
    """The store of the run, alone in a folder."""
    folder.mkdir()
    shutil.copytree(run / "run.zarr", folder / "moved.zarr")
    return folder / "moved.zarr"


def test_a_store_that_was_moved_knows_its_task_and_length(run, tmp_path, capsys):
    place = moved(run, tmp_path / "alone")
    for command in (("evaluate",), ("sweep",)):
        words = ["--to", 6, "--method", "relex"] if command == ("sweep",) else []
        found = asked(capsys, *command, place, *words)
        assert found["task"] == "t.jsonl"
        assert found["num_problems" if words else "max_completion_length"] == (20 if words else 3)
    written = checkout(TrajectoryStore(place), 2, tmp_path / "step-2")
    found = asked(capsys, "evaluate", written)
    assert (found["task"], found["max_completion_length"]) == ("t.jsonl", 3)


def test_probe_takes_the_answers_and_the_length_of_the_run(run, tmp_path, capsys):
    place = moved(run, tmp_path / "alone")
    probed = [asked(capsys, "probe", p, "--num-problems", 5) for p in (run / "run.zarr", place)]
    assert probed[0] == probed[1]
    assert probed[0]["num_tokens"] == 5  # an answer is one digit, one token
    words = ["--generate", "12>", "--steps", 2, 4, "--at", 4]
    found = asked(capsys, "probe", place, *words)["completion"]
    assert (
        found == asked(capsys, "probe", place, *words, "--max-completion-length", 3)["completion"]
    )
    assert main(["probe", str(place), "--task", "{name: nothing}"]) == 1
    assert "task 'nothing' is unknown" in capsys.readouterr().err


def test_a_store_in_the_folder_of_another_run_is_no_part_of_it(run, tmp_path, capsys):
    place = moved(run, tmp_path / "other")
    (place.parent / "config.yaml").write_text("task: arithmetic\nmax_completion_length: 3\n")
    assert main(["evaluate", str(place)]) == 1
    assert "lies in the folder of a run with arithmetic; give --task" in capsys.readouterr().err
    task = f"{{name: file, path: {run.parent}/t.jsonl}}"
    assert asked(capsys, "evaluate", place, "--task", task)["max_completion_length"] == 3


@pytest.mark.parametrize("reward", [False, True])
def test_a_task_that_is_code_does_not_run_because_a_store_names_it(
    run, tmp_path, capsys, monkeypatch, reward
):
    monkeypatch.chdir(tmp_path)
    code = "from pathlib import Path\nPath('ran').touch()\nmake = print\n"
    (tmp_path / "mine.py").write_text(code)
    task = {"name": "file", "path": "t.jsonl", "reward": ["exact", "mine.py:make"]}
    kept = json.dumps({"task": task if reward else "mine.py:make"}).encode()
    with Recorder(tiny_model(), "run.zarr", tokenizer=tiny_tokenizer(), files={KEPT: kept}):
        pass
    for gone in (False, True):
        if gone:
            (tmp_path / "mine.py").unlink()
        for command in (["evaluate"], ["probe"], ["sweep", "--to", "9"]):
            assert main([command[0], "run.zarr", *command[1:]]) == 1
            said = capsys.readouterr().err
            assert "its task is code, mine.py:make" in said
            assert said.count("there is no mine.py here") == gone
            assert "expected --task" in said
    assert not (tmp_path / "ran").exists()
