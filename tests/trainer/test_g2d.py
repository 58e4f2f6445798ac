"""G2D from a run's store and rollouts, and the tokens that carried its update; both as commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file
from test_train import settings
from tiny_models import save_tiny_model

from relexkit import Output, RelexkitError, checkout, extrapolate
from relexkit.cli import main
from relexkit.store import TrajectoryStore
from relexkit.trainer.commands.tokens import token_shares
from relexkit.trainer.config import G2DConfig
from relexkit.trainer.experiments.g2d import g2d
from relexkit.trainer.loop.rollout_log import read_rollouts
from relexkit.trainer.loop.train import train

TASK = {"name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make_easy"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """Three steps of LamPO with DelTA, recorded: the combination."""
    options = {"task": TASK, "advantage": "lampo", "token_weighting": "delta", "token_shares": True}
    return train(settings(base, tmp_path_factory.mktemp("runs") / "run", **options))


OPTIONS = G2DConfig(learning_rate=1e-3, train_batch_size=4, eval_num_problems=10)


def test_one_run_gives_every_k(run, tmp_path):
    found = g2d(run, [1, 3], tmp_path / "out", OPTIONS)
    rollouts = read_rollouts(run / "rollouts").to_pandas()
    for summary, step in zip(found, (1, 3), strict=True):
        told, folder = summary["informativeness"], tmp_path / "out" / f"step-{step}"
        assert told["rollouts"] == 16 * step
        assert told["accuracy"] == pytest.approx(rollouts[rollouts.step <= step].right.mean())
        pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        assert len(pairs) == told["pairs"] > 0
        right = {(row.prompt, row.text): row.right for row in rollouts.itertuples()}
        assert all(
            right[pair["prompt"], pair["chosen"]] and not right[pair["prompt"], pair["rejected"]]
            for pair in pairs
        )
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(metrics) == summary["dpo_steps"] == -(-len(pairs) // 4)
        assert metrics[0]["loss"] == pytest.approx(
            np.log(2), rel=1e-4
        )  # the policy is its own reference
        warm = load_file(
            checkout(TrajectoryStore(run / "run.zarr"), step, tmp_path / f"warm-{step}")
            / "model.safetensors"
        )
        final = load_file(folder / "final" / "model.safetensors")
        moved = [float((final[name] - warm[name]).abs().max()) for name in final]
        assert 0 < max(moved) < 1e-3 * (summary["dpo_steps"] + 1)
    assert (
        found[0]["before"]["greedy"]["accuracy"]
        == g2d(run, [1, 3], tmp_path / "out", OPTIONS)[0]["before"]["greedy"]["accuracy"]
    )


def test_the_recorded_run_is_extrapolated_like_any_other(run, tmp_path):
    """LamPO with DelTA, recorded, extrapolated: the prediction loads, and RELEX of the last steps
    goes on from them.
    """
    (prediction,) = extrapolate(
        TrajectoryStore(run / "run.zarr"), [5], tmp_path / "out", output=Output(rounding="nearest")
    )
    last = load_file(
        checkout(TrajectoryStore(run / "run.zarr"), 3, tmp_path / "last") / "model.safetensors"
    )
    started = load_file(
        checkout(TrajectoryStore(run / "run.zarr"), 0, tmp_path / "base") / "model.safetensors"
    )
    predicted = load_file(prediction.folder / "model.safetensors")
    moved, further = (
        torch.cat([(w[n] - started[n]).flatten() for n in sorted(w)]) for w in (last, predicted)
    )
    assert torch.cosine_similarity(moved, further, dim=0) > 0.8
    assert further.norm() > moved.norm()


def test_finished_steps_are_kept_and_other_settings_refused(run, tmp_path):
    g2d(run, [2], tmp_path, OPTIONS)
    before = (tmp_path / "step-2" / "final" / "model.safetensors").stat().st_mtime_ns
    g2d(run, [2, 3], tmp_path, OPTIONS)
    assert (tmp_path / "step-2" / "final" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RelexkitError, match="was not made with these settings"):
        g2d(run, [2], tmp_path, G2DConfig(beta=0.2))


@pytest.mark.parametrize(
    "options",
    [{"start": "base"}, {"reference": "base"}, {"pairs": "fresh"}, {"max_pairs_per_prompt": 1}],
    ids=str,
)
def test_options_have_effects(run, tmp_path, options):
    plain, changed = OPTIONS, G2DConfig(**{**vars(OPTIONS), **options})
    models = []
    for name, config in (("plain", plain), ("changed", changed)):
        g2d(run, [3], tmp_path / name, config)
        models.append(load_file(tmp_path / name / "step-3" / "final" / "model.safetensors"))
    assert any(not torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_command_prints_a_table_and_json(run, tmp_path, capsys):
    words = [
        "g2d",
        str(run),
        "--steps",
        "3",
        "-o",
        str(tmp_path / "out"),
        "--learning_rate",
        "1e-3",
        "--eval_num_problems",
        "10",
    ]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"][0]["step"] == 3
    assert main(words) == 0
    assert "before DPO" in capsys.readouterr().out


def test_steps_that_are_not_recorded_are_refused(run, tmp_path):
    with pytest.raises(RelexkitError, match="step 80"):
        g2d(run, [1, 80], tmp_path, OPTIONS)
    assert not list(tmp_path.iterdir())


def test_rollouts_of_another_run_or_tokenizer_are_refused(run, base, tmp_path):
    other_base = save_tiny_model(tmp_path / "base", seed=5)
    other = train(settings(other_base, tmp_path / "other", task=TASK, max_steps=1, record_every=0))
    with pytest.raises(RelexkitError, match="was not sampled by the run"):
        g2d(run, [1], tmp_path / "out", OPTIONS, rollouts=other / "rollouts")
    shifted = tmp_path / "shifted"
    shutil.copytree(run / "rollouts", shifted)
    for path in shifted.glob("*.parquet"):
        table = parquet.read_table(path)
        ids = pa.array(
            [[token + 1 for token in row] for row in table.column("prompt_ids").to_pylist()],
            pa.list_(pa.int32()),
        )
        parquet.write_table(
            table.set_column(table.schema.get_field_index("prompt_ids"), "prompt_ids", ids), path
        )
    with pytest.raises(RelexkitError, match="another tokenizer"):
        g2d(run, [1], tmp_path / "out", OPTIONS, rollouts=shifted)
    with pytest.raises(RelexkitError, match="is not the folder of a training run"):
        g2d(tmp_path, [1], tmp_path / "out", OPTIONS)


def test_no_pairs_leave_nothing(run, tmp_path):
    with pytest.raises(RelexkitError, match="give no preference pair"):
        g2d(
            run,
            [1],
            tmp_path / "out",
            G2DConfig(**{**vars(OPTIONS), "max_length": 1, "min_difficulty": 1.0}),
        )
    assert not (tmp_path / "out" / "step-1").exists()


def test_tokens_of_a_run(run, capsys):
    found = token_shares(run, top=3)
    assert sum(
        share for name, share in found["classes"].items() if name != "shared"
    ) == pytest.approx(1)
    assert found["weighted"]
    assert len(found["tokens"]) == 3
    assert found["tokens"][0]["share"] >= found["tokens"][1]["share"]
    first = token_shares(run, until=1)
    assert first["rollouts"] == 16
    assert main(["tokens", str(run), "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert "on both sides" in printed
    assert "with coefficients" in printed
    assert main(["tokens", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == found["classes"]


def test_tokens_that_were_not_measured_are_refused(base, tmp_path):
    folder = train(settings(base, tmp_path / "run", max_steps=1, record_every=0))
    with pytest.raises(RelexkitError, match="train with token_shares: true"):
        token_shares(folder)
    with pytest.raises(RelexkitError, match="no rollouts up to step 0"):
        token_shares(folder, until=0)
