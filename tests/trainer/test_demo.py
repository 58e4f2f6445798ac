"""The demo on few steps and problems: every part is there, and its words follow its numbers."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from relexkit.cli import main
from relexkit.trainer.commands import demo
from relexkit.trainer.policy.small_model import FOLDER


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "PROBLEMS", 24)


def test_the_whole_story(tmp_path, capsys, short):
    assert main(["demo", "-o", str(tmp_path / "demo"), "--steps", "8"]) == 0
    printed = capsys.readouterr().out
    for command in (
        "train",
        "spectrum",
        "backtest",
        "advise",
        "extrapolate",
        "evaluate",
        "sweep",
        "report",
    ):
        assert f"$ relexkit {command} " in printed
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    names = [model["name"] for model in summary["models"]]
    predicted = [f"{method} 4 -> {target}" for method in demo.METHODS for target in (8, 16)]
    assert names == ["step 4", "base", "step 8", *predicted]
    assert all(model["num_problems"] == 24 for model in summary["models"])
    for line in demo.verdicts(summary):
        assert line in printed
    for method in demo.METHODS:
        for target in (8, 16):
            assert load_file(
                tmp_path / "demo" / "predicted" / method / f"step-{target}" / "model.safetensors"
            )
    sweep = json.loads((tmp_path / "demo" / "sweep.json").read_text())
    assert sweep["last_step"] == 4
    assert (
        " --task arithmetic --to 8 16 --until 4 --method drift two-point relex average "
        in sweep["command"]
    )
    assert sweep["command"] in (tmp_path / "demo" / "report.html").read_text()
    assert "average at 4" in {candidate["name"] for candidate in sweep["candidates"]}
    assert sweep["recommendation"] in printed.replace("\n", " ")
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "demo" / "figures").glob("*.png"))


def test_verdicts_follow_the_intervals():
    def model(name: str, accuracy: float, low: float = 0.0, high: float = 0.0) -> dict:
        difference = {"accuracy": accuracy - 0.5, "interval": [low, high]}
        return {"name": name, "greedy": {"accuracy": accuracy}, "difference": difference}

    summary = {
        "until": 30,
        "targets": [60, 120],
        "models": [
            model("step 30", 0.5),
            model("base", 0.4),
            model("step 60", 0.65),
            model("relex 30 -> 60", 0.2, -0.4, -0.2),
            model("model 30 -> 60", 0.6, 0.02, 0.18),
            model("model 30 -> 120", 0.55, -0.05, 0.15),
        ],
    }
    lines = demo.verdicts(summary)
    assert lines[0] == "Training gained +25.0 points of greedy accuracy in 60 steps."
    assert [line.split(" step 30")[0] for line in lines[1:]] == [
        "relex 30 -> 60 loses to",
        "model 30 -> 60 wins against",
        "model 30 -> 120 cannot be told from",
    ]


def test_too_few_steps_are_refused(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path), "--steps", "3"]) == 1
    assert "--steps 3 is too small; expected at least 8" in capsys.readouterr().err


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
