"""Runs whose rollouts come from an engine, and the correction of what it samples differently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from relexkit import RelexkitError, TrajectoryStore
from relexkit.trainer.config import GRPOConfig, build_config
from relexkit.trainer.credit.importance import importance_metrics, importance_ratios
from relexkit.trainer.loop.rollout_log import read_rollouts
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.train import train

ENGINES = Path(__file__).parent / "other_engine.py"
NEEDED = {"model": "m", "task": "t", "output": "o"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def settings(base: Path, output: Path, **options: Any) -> GRPOConfig:
    defaults = {
        "task": {"name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make"},
        "max_steps": 3,
        "generation_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "device": "cpu",
        "vllm_importance_sampling_mode": "token_truncate",
    }
    return GRPOConfig(model=str(base), output=str(output), **{**defaults, **options})


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "final" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_an_engine_has_the_weights_of_every_step_and_a_resume_repeats_it(base, tmp_path):
    """With the same weights it says of its tokens what the policy says: a step late would show."""
    whole = train(settings(base, tmp_path / "whole", engine=f"{ENGINES}:exact"))
    for entry in read_log(whole):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    for steps in (1, 3):
        parted = train(
            settings(base, tmp_path / "parted", engine=f"{ENGINES}:exact", max_steps=steps)
        )
    assert torch.equal(weights(whole), weights(parted))
    assert read_rollouts(whole / "rollouts").equals(read_rollouts(parted / "rollouts"))
    assert len(TrajectoryStore(whole / "run.zarr").steps) == 3
    table = read_rollouts(whole / "rollouts").to_pandas()
    assert [len(row) for row in table.logprobs] == [len(row) for row in table.completion_ids]


def test_what_an_engine_samples_differently_is_corrected(base, tmp_path):
    options = {"engine": f"{ENGINES}:coarse", "max_steps": 1}
    corrected = train(settings(base, tmp_path / "on", **options))
    plain = train(
        settings(base, tmp_path / "off", vllm_importance_sampling_correction=False, **options)
    )
    first, second = (read_log(folder)[0] for folder in (corrected, plain))
    assert first["sampling/sampling_logp_difference/mean"] > 1e-4
    assert first["sampling/importance_sampling_ratio/max"] > 1 + 1e-4
    assert "sampling/importance_sampling_ratio/max" not in second
    assert not torch.equal(weights(corrected), weights(plain))
    never = {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 0}
    still = train(settings(base, tmp_path / "masked", **options, **never))
    assert read_log(still)[0]["grad_norm"] == 0  # every token lies outside


def test_ratios_are_those_of_the_formula():
    own = [torch.log(torch.tensor([0.5, 0.1, 0.9])), torch.log(torch.tensor([0.2]))]
    other = [torch.log(torch.tensor([0.25, 0.4, 0.9])), torch.tensor([math.nan])]

    def ratios(mode: str, low: float | None, high: float | None) -> list[list[float]]:
        config = build_config(
            NEEDED
            | {
                "engine": "e.py:e",
                "vllm_importance_sampling_mode": mode,
                "vllm_importance_sampling_clip_min": low,
                "vllm_importance_sampling_clip_max": high,
            }
        )
        return [
            [round(value, 4) for value in row.tolist()]
            for row in importance_ratios(own, other, config)
        ]

    assert ratios("token_truncate", None, 1.5) == [[1.5, 0.25, 1.0], [1.0]]
    assert ratios("token_truncate", 0.5, None) == [[2.0, 0.5, 1.0], [1.0]]
    assert ratios("token_mask", None, 1.5) == [[0.0, 0.25, 1.0], [1.0]]
    assert ratios("token_mask", 0.5, 3.0) == [[2.0, 0.0, 1.0], [1.0]]
    assert ratios("sequence_truncate", 0.75, 3.0) == [[0.75] * 3, [1.0]]
    assert ratios("sequence_mask", None, 3.0) == [[0.5] * 3, [1.0]]
    assert ratios("sequence_mask", 0.75, None) == [[0.0] * 3, [1.0]]
    metrics = importance_metrics(own, other, None)
    away = [math.log(2), math.log(4), 0.0]
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(sum(away) / 3)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_importance_sampling_clip_max": 2.0}, "belongs to an engine; give --engine"),
        ({"engine": "e.py:e", "token_weighting": "delta"}, "look into the model while it"),
        (
            {"engine": "e.py:e", "vllm_importance_sampling_clip_min": 4.0},
            "clip_min: 4.0 is not below vllm_importance_sampling_clip_max, 3.0",
        ),
        (
            {
                "engine": "e.py:e",
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None,
            },
            "vllm_importance_sampling_mode: needs a range to cut to",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(RelexkitError, match=message):
        build_config(NEEDED | options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"gave object without load\(\); expected"),
        ("short", "gave 2 tokens and 1 log-probabilities; expected 1 to 4 tokens and one for each"),
        ("absent", "absent"),
    ],
)
def test_engines_that_do_not_keep_their_word_are_named(base, tmp_path, name, message):
    with pytest.raises(RelexkitError, match=message):
        train(settings(base, tmp_path / name, engine=f"{ENGINES}:{name}"))
