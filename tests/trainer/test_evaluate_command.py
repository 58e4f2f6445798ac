"""``relexkit evaluate`` on folders and on steps of a store: each equals an evaluation of the
written checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

from relexkit import Prediction, Recorder, TrajectoryStore, checkout, extrapolate
from relexkit.cli import main
from relexkit.materialize import round_checkpoint
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.policy.setup import load_model
from relexkit.trainer.policy.stored_model import StoredModel

TASK = f"{Path(__file__).parents[1] / 'dense_task.py'}:make"
COMMON = ["--task", TASK, "--max-completion-length", "4", "--samples", "3", "--json"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TrajectoryStore:
    model, path = tiny_model(), tmp_path_factory.mktemp("store") / "run.zarr"
    generator = torch.Generator().manual_seed(0)
    with Recorder(model, path, encoding="exact", tokenizer=tiny_tokenizer()) as recorder:
        for step in (1, 2, 4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
            recorder.record(step, {"learning_rate": 1e-3})
    return TrajectoryStore(path)


def evaluated(capsys, *words: object) -> list[dict]:
    assert main(["evaluate", *map(str, words), *COMMON]) == 0
    return json.loads(capsys.readouterr().out)["models"]


def numbers(model: dict) -> dict:
    return {key: value for key, value in model.items() if key not in ("name", "difference")}


def test_steps_of_a_store_are_their_checkpoints(store, tmp_path, capsys):
    folders = [checkout(store, step, tmp_path / f"step-{step}") for step in (0, 2, 4)]
    predicted = extrapolate(
        store, [6, 9], tmp_path / "predicted", Prediction(until=2, method="two-point")
    )
    words = ["--step", 0, 2, 4, "--to", 6, 9, "--until", 2, "--method", "two-point"]
    in_place = evaluated(capsys, store.path, *words)
    written = evaluated(capsys, *folders, *(p.folder for p in predicted))
    assert [model["name"] for model in in_place] == [
        "base",
        "step 2",
        "step 4",
        "two-point 2 -> 6",
        "two-point 2 -> 9",
    ]
    assert [numbers(model) for model in in_place] == [numbers(model) for model in written]
    assert "difference" not in in_place[0]
    assert in_place[1]["difference"] == written[1]["difference"]


def test_what_means_less_than_it_seems_is_said(store, tmp_path, capsys):
    (tmp_path / "texts").write_text("2+3=5\n")
    line = "--until 500: the run ends with step 4; all of it is used"
    recorded = "--to 2: this step was trained and recorded, and here it is predicted;"
    asked = ["--to", "2", "9", "--method", "relex", "--until", "500"]
    for words in (
        ["evaluate", store.path, "--step", "4", *asked, *COMMON],
        ["probe", store.path, "--texts", str(tmp_path / "texts"), *asked, "--json"],
    ):
        assert main(words) == 0
        said = capsys.readouterr().err
        assert said.count(line) == said.count(recorded) == 1, words
        assert f"relexkit checkout {store.path} --step 2 -o DIR" in said
    evaluated_words = ["evaluate", store.path, "--step", "2", "--to", "2", "9", *COMMON]
    assert main(evaluated_words) == 0  # both are asked for: a comparison
    assert capsys.readouterr().err == ""


def test_without_steps_the_base_and_the_last_one(store, capsys):
    assert [model["name"] for model in evaluated(capsys, store.path)] == ["base", "step 4"]


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_recorded_step_is_put_bit_for_bit(store, tmp_path, step):
    stored = StoredModel(store)
    stored.put_step(step)
    expected = load_model(str(checkout(store, step, tmp_path / "step")), torch.device("cpu"))[0]
    for (name, mine), theirs in zip(
        stored.model.named_parameters(), expected.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounded_weights_are_those_of_a_rounded_checkpoint(store, tmp_path, rounding):
    stored = StoredModel(store, Loading(dtype="bfloat16", rounding=rounding, seed=5))
    stored.put_step(4)
    source = checkout(store, 4, tmp_path / "step-4")
    folder = round_checkpoint(
        source, tmp_path / "rounded", dtype="bfloat16", rounding=rounding, seed=5
    )
    expected = load_model(str(folder), torch.device("cpu"))[0]
    for (name, mine), theirs in zip(
        stored.model.named_parameters(), expected.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert stored.model.model.rotary_emb.inv_freq.dtype == torch.float32
    stored.put(np.zeros((len(store.layout.moving_tensors), len(store.steps))))
    base = (
        load_model(str(checkout(store, 0, tmp_path / "base")), torch.device("cpu"))[0]
        .bfloat16()
        .float()
    )
    if rounding == "nearest":
        for mine, theirs in zip(stored.model.parameters(), base.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_the_table_and_pass_at_k(store, capsys):
    words = [
        "evaluate",
        store.path,
        "--task",
        TASK,
        "--max-completion-length",
        "4",
        "--samples",
        "2",
        "--pass-at",
        "1",
        "2",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for heading in (
        "greedy",
        "sampled",
        "pass@1",
        "pass@2",
        "greedy against base",
        "validation problems",
    ):
        assert heading in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "3"], "step 3 is not recorded"),
        (["--to", "9", "--method", "nothing"], "--method nothing is unknown"),
        (["--samples", "2", "--pass-at", "3"], "pass@3 needs 3 samples"),
        (["--no-greedy"], "leave nothing to evaluate"),
    ],
)
def test_what_cannot_be_evaluated(store, capsys, words, message):
    assert (
        main(["evaluate", store.path, "--task", TASK, "--max-completion-length", "4", *words]) == 1
    )
    assert message in capsys.readouterr().err


def test_a_folder_has_no_steps(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    assert main(["evaluate", str(folder), "--task", TASK, "--step", "3"]) == 1
    assert "is not a store; --step, --to and --dtype need one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "'gpu' is unknown; expected auto, cpu, cuda or cuda:N"), ("cuda:1", "sees no GPU")],
)
def test_a_device_that_is_not_there_is_a_stated_error(store, device, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["evaluate", store.path, *COMMON, "--step", "1", "--device", device]) == 1
    assert message in capsys.readouterr().err
