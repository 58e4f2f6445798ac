"""Log-probabilities along a run, and generation from extrapolated logits, against models written
out and loaded again.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

from relexkit import Prediction, RelexkitError, TrajectoryStore, checkout, extrapolate
from relexkit.cli import main
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.experiments.outputs import (
    extrapolated_completion,
    logit_extrapolation,
    output_linearity,
    text_logprobs,
)
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.policy.setup import load_model

TEXTS = ["12>0468", "7+8=15", ""]
CPU = torch.device("cpu")
ON_CPU = Loading(device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    folder = tmp_path_factory.mktemp("run")
    config = GRPOConfig(
        model=str(save_tiny_model(folder / "base")),
        output=str(folder / "out"),
        max_steps=5,
        device="cpu",
        task={"name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make"},
        generation_batch_size=16,
        num_generations=4,
        max_completion_length=4,
        learning_rate=1e-2,
    )
    train(config)
    return TrajectoryStore(folder / "out" / "run.zarr")


def test_logprobs_are_those_of_every_prefix() -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    found = text_logprobs(model, tokenizer, TEXTS[:2])
    expected = []
    for text in TEXTS[:2]:
        tokens = tokenizer(text)["input_ids"]
        for end in range(1, len(tokens)):
            logits = model(torch.tensor([tokens[:end]])).logits[0, -1]
            expected.append(float(logits.log_softmax(dim=-1)[tokens[end]].detach()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_steps_and_predictions_are_those_of_written_checkpoints(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    found = output_linearity(
        store, TEXTS, targets=[8.0], prediction=Prediction(method="two-point"), loading=ON_CPU
    )
    assert found.steps.tolist() == [1, 2, 3, 4, 5]
    for row, step in ((0, 1), (4, 5)):
        model, tokenizer = load_model(str(checkout(store, step, tmp_path / str(step))), CPU)
        np.testing.assert_allclose(
            found.logprobs[row], text_logprobs(model, tokenizer, TEXTS[:2]), atol=1e-5
        )
    [written] = extrapolate(store, [8.0], tmp_path / "predicted", Prediction(method="two-point"))
    model, tokenizer = load_model(str(written.folder), CPU)
    np.testing.assert_allclose(
        found.predicted[0], text_logprobs(model, tokenizer, TEXTS[:2]), atol=1e-5
    )
    for k in (0, 3):
        line = np.polyfit(found.steps, found.logprobs[:, k], 1)
        assert found.continued[0, k] == pytest.approx(np.polyval(line, 8.0))
        assert found.r2[k] == pytest.approx(
            np.corrcoef(found.steps, found.logprobs[:, k])[0, 1] ** 2, abs=1e-6
        )


@pytest.mark.parametrize("factor", [0.0, 1.5, -1.0])
def test_extrapolated_completion_equals_a_loop_without_cache(factor: float) -> None:
    earlier, later, tokenizer = tiny_model(0).eval(), tiny_model(1).eval(), tiny_tokenizer()
    found = extrapolated_completion(
        earlier, later, tokenizer, "12>", factor=factor, max_completion_length=6
    )
    tokens, expected = tokenizer("12>")["input_ids"], []
    for _ in range(6):
        first, second = (m(torch.tensor([tokens])).logits[0, -1].detach() for m in (earlier, later))
        best = int((second + factor * (second - first)).argmax())
        if best == tokenizer.eos_token_id:
            break
        tokens.append(best)
        expected.append(best)
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_logits_at_the_later_step_are_its_own(store: TrajectoryStore, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(checkout(store, 5, tmp_path / "5")), CPU)
    expected = extrapolated_completion(
        model, model, tokenizer, "12>", factor=0.0, max_completion_length=4
    )
    assert logit_extrapolation(
        store, ["12>"], steps=(2, 5), target=5.0, max_completion_length=4, loading=ON_CPU
    ) == [expected]
    assert logit_extrapolation(
        store, ["12>"], steps=(0, 5), target=5.0, max_completion_length=4, loading=ON_CPU
    ) == [expected]


def test_command(
    store: TrajectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    assert (
        main(
            [
                "probe",
                store.path,
                "--texts",
                str(tmp_path / "texts.txt"),
                "--to",
                "8",
                "--method",
                "two-point",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "R² on the step" in out
    assert "step 8" in out
    assert main(["probe", store.path, "--texts", str(tmp_path / "texts.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 11
    assert (
        main(["probe", store.path, "--generate", "12>", "--steps", "2", "5", "--at", "9", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["prompt"] == "12>"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "nothing"], "task 'nothing' is unknown"),
        (["--generate", "1"], "--generate needs --steps I J and --at STEP"),
        (
            ["--generate", "1", "--steps", "5", "2", "--at", "9"],
            "expected an earlier recorded step",
        ),
        (["--generate", "1", "--steps", "2", "77", "--at", "99"], "step 77 is not recorded"),
    ],
)
def test_bad_input_says_what_to_do(
    store: TrajectoryStore, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", store.path, *extra]) == 1
    assert message in capsys.readouterr().err


def test_empty_texts_are_a_stated_error(store: TrajectoryStore) -> None:
    with pytest.raises(RelexkitError, match="hold no token to predict"):
        output_linearity(store, ["", " "], loading=ON_CPU)
