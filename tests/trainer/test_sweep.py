"""The sweep on a tiny trained run: what it says of a candidate is what its written checkpoint
scores.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

from relexkit import (
    Options,
    Output,
    Prediction,
    Recorder,
    RelexkitError,
    TrajectoryStore,
    checkout,
    extrapolate,
)
from relexkit.cli import main
from relexkit.trainer.commands.sweep import _as_typed
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.evaluation.evaluate import evaluate
from relexkit.trainer.evaluation.settings import EvaluationSettings
from relexkit.trainer.experiments.sweep import Candidate, Grid, sweep
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.policy.setup import load_model
from relexkit.trainer.tasks import load_task

SETTINGS = EvaluationSettings(num_problems=16, max_completion_length=4)
TASK = f"{Path(__file__).parents[1] / 'dense_task.py'}:make_for_sweep"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    folder = tmp_path_factory.mktemp("run")
    config = GRPOConfig(
        model=str(save_tiny_model(folder / "base")),
        output=str(folder / "out"),
        task={"name": TASK},
        max_steps=6,
        generation_batch_size=16,
        num_generations=4,
        max_completion_length=4,
        learning_rate=1e-2,
        device="cpu",
    )
    train(config)
    return TrajectoryStore(folder / "out" / "run.zarr")


def test_grid_multiplies_relex_only_by_its_options() -> None:
    found = Grid(
        to=(10, 20), method=("two-point", "relex"), scale=(1.0, 0.5), rank=(1, 2), window=(4, 5)
    ).candidates(6)
    assert len(found) == 2 * 2 * (1 + 4)
    assert len({c.name for c in found}) == len(found)
    assert (
        Candidate(method="relex", target=20.0, scale=0.5, options=Options(rank=2, window=5))
        in found
    )
    assert "relex at 20 (rank 2, window 5, scale 0.5)" in {c.name for c in found}


def test_scores_are_those_of_written_checkpoints(store: TrajectoryStore, tmp_path: Path) -> None:
    task = load_task(TASK)
    grid = Grid(to=(8, 12), until=4, method=("two-point", "hold"), scale=(1.0, 0.5), full=True)
    found = sweep(store, task, grid, SETTINGS)
    candidates, outcome = found.candidates, found.race
    for candidate, standing in zip(candidates, outcome.standings, strict=True):
        [written] = extrapolate(
            store,
            [candidate.target],
            tmp_path / candidate.name,
            Prediction(until=4, method=candidate.method, scale=candidate.scale),
        )
        model, tokenizer = load_model(str(written.folder), torch.device("cpu"))
        expected = evaluate(model, tokenizer, task, SETTINGS)
        np.testing.assert_array_equal(standing.values, expected.values(), err_msg=candidate.name)
    held = next(
        s
        for c, s in zip(candidates, outcome.standings, strict=True)
        if c.method == "hold" and c.scale == 1
    )
    np.testing.assert_array_equal(held.values, outcome.baseline.values)
    assert held.against.difference == 0
    assert outcome.num_answers == outcome.full_answers == 16 * 7


def test_rounded_weights_score_as_a_written_checkpoint(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    task = load_task(TASK)
    grid = Grid(to=(8,), method=("two-point",))
    found = sweep(store, task, grid, SETTINGS, Loading(dtype="bfloat16", rounding="nearest"))
    [written] = extrapolate(
        store,
        [8.0],
        tmp_path,
        Prediction(method="two-point"),
        output=Output(dtype="bfloat16", rounding="nearest"),
    )
    model, tokenizer = load_model(str(written.folder), torch.device("cpu"))
    expected = evaluate(model, tokenizer, task, SETTINGS)
    np.testing.assert_array_equal(found.race.standings[0].values, expected.values())


def test_document_and_recommendation(store: TrajectoryStore) -> None:
    grid = Grid(to=(8,), method=("two-point", "relex"))
    swept = sweep(store, load_task(TASK), grid, replace(SETTINGS, samples=2))
    found = json.loads(json.dumps(swept.document()))
    assert found["winner"] in {c.name for c in swept.candidates}
    assert found["recommendation"] == swept.recommendation()
    assert swept.beats_it == ("Use" in found["recommendation"])
    assert found["last_step"] == 6
    assert ("Use" in found["recommendation"]) == (found["fresh"]["interval"][0] > 0)
    assert found["answers"] <= found["answers_of_full_grid"]


def test_command_writes_only_what_wins(
    store: TrajectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "sweep",
        store.path,
        "--task",
        TASK,
        "--to",
        "8",
        "12",
        "--method",
        "two-point",
        "--num-problems",
        "16",
        "--max-completion-length",
        "4",
        "--write",
        str(tmp_path / "out"),
    ]
    assert main([*given, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (tmp_path / "out").exists() == (found["fresh"]["verdict"] == "above")
    assert ("nothing was written" in said.err) == (found["fresh"]["verdict"] != "above")
    assert main(given) == 0
    assert found["recommendation"] in capsys.readouterr().out


def test_what_means_less_than_it_seems_is_said_and_the_task_is_a_name(
    store: TrajectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "relex", "hold", "--rank", "1", "100", "--num-problems", "16"]
    asked = ["sweep", store.path, "--to", "3", "8", "--until", "500", *words, "--json"]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[:3] == [
        "--until 500: the run ends with step 6; all of it is used",
        "--rank 100: 6 steps have at most 6 directions; all of them are used",
        "--to 3: this step was trained and recorded, and here it is predicted;"
        f" relexkit checkout {store.path} --step 3 -o DIR gives the trained one",
    ]
    command = shlex.split(json.loads(said.out)["command"])
    assert command[command.index("--task") + 1] == TASK
    for task in ("arithmetic", {"name": "t", "size": 2}):
        assert yaml.safe_load(_as_typed(task)) == task
    assert _as_typed({"name": "arithmetic"}) == "arithmetic"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "sums"], "task 'sums' is unknown; expected arithmetic"),
        (
            ["--task", TASK, "--num-problems", "3"],
            "3 validation problems are too few to compare predictions; expected at least 16",
        ),
        (
            ["--task", TASK, "--until", "1", "--method", "model"],
            "1 recorded step cannot tell a drift from a walk",
        ),
    ],
)
def test_bad_input_says_what_to_do(
    store: TrajectoryStore, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", store.path, "--to", "8", "--max-completion-length", "4", *extra]) == 1
    assert message in capsys.readouterr().err


def test_no_candidate_is_a_stated_error(store: TrajectoryStore) -> None:
    with pytest.raises(RelexkitError, match="there is no candidate"):
        sweep(store, load_task(TASK), Grid(to=()), SETTINGS)


def test_what_ignores_the_target_is_one_candidate() -> None:
    grid = Grid(to=(8, 12), method=("hold", "average", "drift"), window=(2, 3))
    assert [(c.method, c.target, c.options.window) for c in grid.candidates(6)] == [
        ("hold", 6, None),
        ("average", 6, 2),
        ("average", 6, 3),
        ("drift", 8, None),
        ("drift", 12, None),
    ]
    assert Grid(to=(8,), method=("average",)).candidates(6)[0].options.window is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_step_is_raced_bit_for_bit(tmp_path, monkeypatch, dtype) -> None:
    """A float32 sum of base and delta differs from what was recorded in the last bit."""
    model = tiny_model().to(dtype)
    generator = torch.Generator().manual_seed(0)
    path, tokenizer = tmp_path / "run.zarr", tiny_tokenizer()
    with Recorder(model, path, encoding="exact", tokenizer=tokenizer) as recorder:
        for step in (1, 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.03 * torch.randn(parameter.shape, generator=generator).to(dtype)
            recorder.record(step)
    seen = []

    def evaluated(model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr("relexkit.trainer.evaluation.evaluate.evaluate", evaluated)
    store, grid = TrajectoryStore(path), Grid(to=(4,), method=("two-point",), full=True)
    sweep(store, load_task(TASK), grid, SETTINGS)
    written = load_file(checkout(store, 2, tmp_path / "2") / "model.safetensors")
    same = [
        all(torch.equal(weights[name], kept.float()) for name, kept in written.items())
        for weights in seen
    ]
    assert same.count(True) == 1
