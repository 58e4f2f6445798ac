"""Advantages, token coefficients and measurements inside a training: their effects, the same
whatever the split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import assert_same_run, settings, start, weights
from tiny_models import save_tiny_model

from relexkit import RelexkitError, TrajectoryStore, gram
from relexkit.cli import main
from relexkit.gram_matrix.jumps import jumps
from relexkit.processes import Processes
from relexkit.trainer.config import build_config, dump_config
from relexkit.trainer.credit.assignment import informativeness, rouge_l
from relexkit.trainer.loop.rollout_log import read_rollouts
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.train import check_processes, train
from relexkit.trainer.tasks import Problem

LAMPO_DELTA = {
    "advantage": "lampo",
    "token_weighting": "delta",
    "token_shares": True,
    "gradient_noise_parts": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """Two steps with everything in this file switched on."""
    return train(
        settings(base, tmp_path_factory.mktemp("runs") / "run", max_steps=2, **LAMPO_DELTA)
    )


def test_measurements_agree_with_the_rollout_log(run):
    table = read_rollouts(run / "rollouts").to_pandas()
    for entry, (_, rows) in zip(read_log(run), table.groupby("step"), strict=True):
        shares = {
            name.split("/")[1]: value
            for name, value in entry.items()
            if name.startswith("token_share/")
        }
        assert sum(value for name, value in shares.items() if name != "shared") == pytest.approx(1)
        assert 0 < shares["digits"] < 1
        assert 0 < shares["shared"] <= 1
        mass = {True: 0.0, False: 0.0}
        for row in rows.itertuples():
            assert len(row.token_norms) == len(row.token_weights) == len(row.completion_ids)
            for token, norm in zip(row.completion_ids, row.token_norms, strict=True):
                mass[token >= 5] += (
                    abs(row.advantage) * norm
                )  # the vocabulary of the tiny model ends with its digits
        assert shares["digits"] == pytest.approx(mass[True] / (mass[True] + mass[False]), rel=1e-5)
        assert np.concatenate(rows.token_weights.to_numpy()).mean() == pytest.approx(1, abs=1e-5)
        assert entry["gradient_noise/trace"] > 0
        assert entry["token_share_weighted/digits"] != shares["digits"]


def test_lampo_advantages_are_those_of_the_logged_rollouts(run):
    rows = read_rollouts(run / "rollouts").to_pandas().iloc[:4]
    s = np.array([np.mean(row) for row in rows.logprobs])
    reward = rows.reward.to_numpy(np.float64)
    difference = reward[:, None] - reward[None]
    pair = 1 / (1 + np.exp(np.sign(difference) * (s[:, None] - s[None])))
    np.testing.assert_allclose(rows.advantage, (pair * difference).sum(axis=1) / 3, atol=1e-5)


def test_options_have_effects(base, tmp_path):
    seen = [weights(train(settings(base, tmp_path / "plain", max_steps=2, record_every=0)))]
    for number, options in enumerate(
        [
            {"advantage": "lampo"},
            {"advantage": "lampo", "lampo_temperature": 0.1},
            {"token_weighting": "delta"},
            {"advantage": "lampo", "lampo_length_normalized": False},
            {"token_weighting": "delta", "delta_iterations": 0},
            {"token_weighting": "delta", "delta_min": 0.1, "loss_type": "grpo"},
        ]
    ):
        found = weights(
            train(settings(base, tmp_path / str(number), max_steps=2, record_every=0, **options))
        )
        assert all(not torch.equal(found, other) for other in seen), options
        seen.append(found)


def test_measuring_changes_nothing_but_rounding(base, tmp_path):
    plain = weights(train(settings(base, tmp_path / "plain", max_steps=1, record_every=0)))
    measured = weights(
        train(settings(base, tmp_path / "noise", max_steps=1, record_every=0, token_shares=True))
    )
    assert torch.equal(plain, measured)
    parts = weights(
        train(
            settings(base, tmp_path / "parts", max_steps=1, record_every=0, gradient_noise_parts=4)
        )
    )
    started = load_file(base / "model.safetensors")
    moved = (plain - torch.cat([started[name].flatten() for name in sorted(started)])).norm()
    assert (plain - parts).norm() < 1e-2 * moved


def test_micro_batches_change_rounding_only(base, tmp_path, run):
    folder = train(
        settings(
            base,
            tmp_path / "small",
            max_steps=2,
            micro_batch_tokens=1,
            generation_rows=3,
            **LAMPO_DELTA,
        )
    )
    started = load_file(base / "model.safetensors")
    start_weights = torch.cat([started[name].flatten() for name in sorted(started)])
    assert (weights(folder) - weights(run)).norm() < 1e-2 * (weights(run) - start_weights).norm()
    tables = [read_rollouts(path / "rollouts", steps=[1]).to_pandas() for path in (run, folder)]
    for first, second in zip(*(table.token_weights for table in tables), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.slow
def test_two_processes_agree_with_one(base, tmp_path, run):
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(settings(base, tmp_path / "two", max_steps=2, **LAMPO_DELTA)))
    process = start(config, processes=2)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    tables = [
        read_rollouts(path / "rollouts", steps=[1]).to_pandas() for path in (run, tmp_path / "two")
    ]
    for first, second in zip(*(table.token_weights for table in tables), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)
    for first, second in zip(read_log(run), read_log(tmp_path / "two"), strict=True):
        for name, value in first.items():
            if name.startswith(("token_share", "gradient_noise", "logp", "accuracy")):
                assert second[name] == (
                    value if value is None else pytest.approx(value, rel=2e-2, abs=1e-4)
                ), name


# -- re-grounding ----------------------------------------------------------------------------------

REGROUNDING: dict[str, Any] = {"max_steps": 11, "regrounding": {"train_steps": 3, "jump_steps": 2}}


def test_regrounding_alternates_training_and_jumps(base, tmp_path):
    folder = train(settings(base, tmp_path / "run", **REGROUNDING))
    store = TrajectoryStore(folder / "run.zarr")
    assert store.steps.tolist() == [1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert jumps(store).tolist() == [5, 10]
    assert gram(store).steps.tolist() == [1, 2, 3]
    assert sorted(set(read_rollouts(folder / "rollouts")["step"].to_pylist())) == [
        1,
        2,
        3,
        6,
        7,
        8,
        11,
    ]
    row = {step: index for index, step in enumerate(store.steps.tolist())}
    (part,) = range(len(store.layout.parts))
    numel = store.layout.parts[part].numel
    zero = np.zeros(numel, np.uint32)
    delta = {
        step: store.read_delta(part, row[step], 0, numel, zero).astype(np.float64) for step in row
    }
    for start_at, at, to in (
        (0, 3, 5),
        (5, 8, 10),
    ):  # a jump goes on in the direction of the segment before it
        origin = delta[start_at] if start_at else 0.0
        before, after = delta[at] - origin, delta[to] - origin
        assert before @ after / np.linalg.norm(before) / np.linalg.norm(after) > 0.9
        assert np.linalg.norm(after) > np.linalg.norm(before)


def test_a_run_whose_last_step_is_a_jump_ends_like_any_other(base, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    ends_with_jump = REGROUNDING | {"max_steps": 5, "eval_steps": 4, "eval_num_problems": 5}
    config.write_text(dump_config(settings(base, tmp_path / "run", **ends_with_jump)))
    assert main(["train", str(config)]) == 0
    entries = read_log(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 5]
    assert 0 <= entries[-1]["eval/accuracy"] <= 1  # as after every last step
    first, last = entries[0]["reward"], entries[2]["reward"]
    assert f"{first:.3f} at step 1, {last:.3f} in the last rollouts" in capsys.readouterr().out


def test_a_run_with_jumps_that_is_resumed_ends_with_the_same_bits(base, tmp_path):
    whole = train(settings(base, tmp_path / "whole", **REGROUNDING))
    stopped = settings(base, tmp_path / "stopped", **REGROUNDING | {"max_steps": 7})
    train(stopped)
    train(settings(base, tmp_path / "stopped", **REGROUNDING))
    assert_same_run(whole, tmp_path / "stopped")


def test_two_processes_need_groups_for_every_part_of_the_gradient_noise(base, tmp_path):
    two = Processes()
    two.size = 2
    with pytest.raises(
        RelexkitError, match="gradient_noise_parts: 4 parts of 2 groups in each of 2 processes"
    ):
        check_processes(settings(base, tmp_path / "run", gradient_noise_parts=4), two)


# -- rewards, informativeness, bad input -----------------------------------------------------------


def test_rouge_l_by_hand():
    problem = Problem(key="1", prompt="p", answer="", reference="add three and four to get seven")
    assert rouge_l(problem, "add three and four to get seven") == pytest.approx(1)
    assert rouge_l(problem, "three plus four is seven") == pytest.approx(
        2 * (3 / 5) * (3 / 7) / (3 / 5 + 3 / 7)
    )
    with pytest.raises(RelexkitError, match="problem 1 has no reference solution"):
        rouge_l(Problem(key="1", prompt="p", answer="7"), "7")


def test_rouge_is_added_to_the_reward_but_not_to_what_is_right(base, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            f'{{"prompt": "{n:02d}>", "answer": "x", "solution": "0 1 2 3 4 5 6 7 8 9"}}\n'
            for n in range(40)
        )
    )
    task = {"name": "file", "path": str(data), "reference": "solution", "num_validation": 5}
    options = {"rouge_weight": 3.0, "max_completion_length": 1, "max_steps": 1, "record_every": 0}
    folder = train(settings(base, tmp_path / "run", task=task, **options))
    table = read_rollouts(folder / "rollouts").to_pandas()
    assert not table.right.any()
    for row in table.itertuples():  # one of ten words, in full, or none of them
        assert row.reward == pytest.approx(3 * 2 * 0.1 / 1.1 if row.text.isdigit() else 0.0)
    assert table.reward.max() > 0


def test_informativeness_by_hand():
    right = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    logp = (
        [torch.tensor([-1.0, -3.0])]
        + [torch.full((3,), -4.0)] * 11
        + [torch.full((2,), -1.0)] * 3
        + [torch.tensor([-2.0])]
    )
    found = informativeness(right, logp)
    assert found == {
        "mixed": 2,
        "margin": pytest.approx(2.0 + 1.0),
        "rate": 2.0,
        "square": pytest.approx(1 / 16 + 1 + 9 / 16),
    }


def test_a_run_with_nothing_to_learn_from_says_so(base, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n:02d}>", "answer": "x"}}\n' for n in range(40)))
    options = {
        "task": {"name": "file", "path": str(data), "num_validation": 5},
        "max_steps": 10,
        "record_every": 0,
    }
    train(settings(base, tmp_path / "run", **options))
    errors = capsys.readouterr().err
    assert errors.count("nothing to learn from for 10 steps") == 1
    assert "none was right: take easier problems" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta_min": 1.3}, "delta_min: 1.3 is more than delta_max, 1.2"),
        (
            {"gradient_noise_parts": 9},
            "9 parts cannot be compared; expected 2 to 8, the groups of a step, or 0",
        ),
        ({"gradient_noise_parts": 1}, "1 parts cannot be compared"),
        ({"lampo_temperature": 0}, "lampo_temperature: 0.0 is too small"),
        (
            {"regrounding": {"train_steps": 5}},
            "lacks jump_steps; expected train_steps and jump_steps",
        ),
        (
            {"regrounding": {"train_steps": 5, "jump_steps": 5, "methods": "relex"}},
            "key 'methods' is unknown",
        ),
        ({"regrounding": {"train_steps": 1, "jump_steps": 5}}, "train_steps 1 are too few"),
        ({"regrounding": {"train_steps": 5, "jump_steps": 0}}, "jump_steps 0 is no jump"),
        ({"regrounding": {"train_steps": 5, "jump_steps": 5, "method": "relax"}}, "relax"),
        (
            {"regrounding": {"train_steps": 5, "jump_steps": 5}, "record_every": 2},
            "expected record_every 1",
        ),
        ({"advantage": "pairs"}, "advantage: 'pairs' does not fit"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(options, message):
    with pytest.raises(RelexkitError, match=message):
        build_config({"model": "m", "task": "t", "output": "o", **options})
