"""The demo on few steps and problems: every part is there, and its words follow its numbers."""

from __future__ import annotations

import html
import json

import pytest
from safetensors.torch import load_file

from relexkit import TrajectoryStore
from relexkit.cli import main
from relexkit.gram_matrix.jumps import jumps
from relexkit.trainer.commands import demo
from relexkit.trainer.policy.small_model import FOLDER


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "PROBLEMS", 24)
    monkeypatch.setattr(demo, "PROMPTS", 2)


def test_the_whole_story(tmp_path, capsys, short):
    folder = tmp_path / "demo"
    assert main(["demo", "-o", str(folder), "--steps", "16"]) == 0
    printed = capsys.readouterr().out
    commands = ("train", "spectrum", "backtest", "advise", "extrapolate", "evaluate", "sweep")
    for command in (*commands, "report"):
        assert f"$ relexkit {command} " in printed
    answers = json.loads((folder / "summary.json").read_text())
    names = {kind: [model["name"] for model in answers[kind]] for kind in ("plain", "jumps")}
    assert names["plain"] == ["base", "step 4", "step 8", "step 12", "step 16"]
    assert names["jumps"] == ["step 4", "step 8", "step 12", "step 16"]
    assert [model["name"] for model in answers["predictions"]] == [
        "step 8",
        "step 16",
        *(f"{method} 8 -> {target}" for method in demo.PREDICTIONS for target in (16, 32)),
    ]
    assert all(m["num_problems"] == 24 for kind in names for m in answers[kind])
    assert jumps(TrajectoryStore(folder / "jumps" / "run.zarr")).tolist() == [8, 16]
    assert TrajectoryStore(folder / "walk" / "run.zarr").steps.tolist() == list(range(1, 9))
    assert answers["verdicts"] == demo.verdicts(answers)
    assert load_file(folder / "predicted" / "step-16" / "model.safetensors")
    sweep = json.loads((folder / "sweep.json").read_text())
    assert sweep["last_step"] == 8
    assert html.escape(sweep["command"]) in (folder / "report.html").read_text()
    assert (folder / "figures" / "demo.png").stat().st_size > 10_000


def test_verdicts_follow_the_numbers():
    def model(name: str, accuracy: float, low: float = 0.0, high: float = 0.0) -> dict:
        difference = {"accuracy": accuracy - 0.5, "interval": [low, high]}
        return {"name": name, "greedy": {"accuracy": accuracy}, "difference": difference}

    trained = [model(f"step {step}", 0.4 + step / 200) for step in (10, 20, 30, 40)]
    answers = {
        "until": 20,
        "plain": [model("base", 0.4), *trained],
        "jumps": [model(f"step {step}", 0.41 + step / 200) for step in (10, 20, 30, 40)],
        "walk": [model("base", 0.4), model("step 12", 0.75)],
        "predictions": [
            trained[1],
            trained[3],
            model("relex 20 -> 40", 0.2, -0.4, -0.2),
            model("drift 20 -> 40", 0.6, 0.02, 0.18),
            model("drift 20 -> 80", 0.55, -0.05, 0.15),
        ],
    }
    lines = demo.verdicts(answers)
    assert lines[0] == "Training from step 20 to 40 took greedy accuracy from 0.500 to 0.600."
    assert [line.split(" holding")[0].split(", which ")[1] for line in lines[1:4]] == [
        "is worse than",
        "is better than",
        "does not differ from",
    ]
    assert "10 trained steps reach 0.510 (plain: 0.450) and 20 reach 0.610" in lines[4]
    assert "(plain: 0.500, and 0.550 after 30)" in lines[4]
    assert "step 12 without any jump has 0.750" in lines[5]


def test_steps_that_do_not_fit_are_refused(tmp_path, capsys):
    for steps in ("12", "30"):
        assert main(["demo", "-o", str(tmp_path), "--steps", steps]) == 1
        assert "expected a multiple of 4, at least 16" in capsys.readouterr().err


def test_a_run_beside_that_fails_ends_the_demo_in_one_line(tmp_path, capsys, short, monkeypatch):
    monkeypatch.setattr(demo, "_train_here", lambda plan: None)
    (tmp_path / "jumps").write_text("in the way")
    assert main(["demo", "-o", str(tmp_path), "--steps", "16"]) == 1
    said = capsys.readouterr().err
    assert "the demo ends here because this command failed: relexkit train" in said
    assert "Traceback" not in said


def test_the_embedded_model_is_small_and_half_way(tmp_path):
    import torch

    from relexkit.trainer.evaluation.evaluate import evaluate
    from relexkit.trainer.evaluation.settings import EvaluationSettings
    from relexkit.trainer.policy.setup import load_model
    from relexkit.trainer.tasks import load_task

    model, tokenizer = load_model(str(FOLDER), torch.device("cpu"))
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 5e6
    for tensor in load_file(FOLDER / "model.safetensors").values():
        assert tensor.dtype == torch.bfloat16
    found = evaluate(
        model,
        tokenizer,
        load_task("arithmetic"),
        EvaluationSettings(num_problems=200, max_completion_length=10, batch_size=200),
    )
    assert 0.35 < found.accuracy < 0.75  # 0.56 of 512 problems where it was made
