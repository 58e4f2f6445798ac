"""Preference pairs by hand, filters, and the format that TRL reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from relexkit import RelexkitError
from relexkit.trainer.experiments.preferences import informativeness, make_pairs, write_pairs
from relexkit.trainer.loop.rollout_log import Rollout, as_table

ONE = Rollout(
    step=1,
    problem="a",
    prompt="2+2=",
    text="4",
    prompt_ids=[4, 12, 4, 14],
    completion_ids=[6, 1],
    logprobs=[-0.25, -0.5],
    truncated=False,
    reward=1.0,
    right=True,
    advantage=0.75,
)


def rollout(problem, right, token, length=2, logprob=-0.5, step=1):
    return replace(
        ONE,
        problem=problem,
        prompt=f"{problem}?",
        step=step,
        right=right,
        text=f"t{token}",
        completion_ids=[token] * length,
        logprobs=[logprob] * length,
    )


TABLE = as_table(
    [
        rollout("a", True, 1, logprob=-0.1),
        rollout("a", False, 2, logprob=-0.4),
        rollout("a", False, 3),
        rollout("a", False, 2),
        rollout("b", True, 4),
        rollout("b", True, 5),
        rollout("c", False, 6),
        rollout("d", True, 7, length=9),
        rollout("d", True, 8),
        rollout("d", False, 9),
    ]
)


def test_pairs_are_of_one_prompt_and_use_no_completion_twice():
    pairs = make_pairs(TABLE)
    assert [pair.problem for pair in pairs] == ["a", "d"]
    assert pairs[0].chosen_ids == [1, 1]
    assert pairs[0].rejected_ids in ([2, 2], [3, 3])
    assert pairs[0].prompt == "a?"
    many = as_table(
        [
            rollout("a", right, token)
            for right, first in ((True, 0), (False, 20))
            for token in range(first, first + 8)
        ]
    )
    taken = make_pairs(many, max_pairs_per_prompt=5)
    assert len(taken) == 5
    assert len({tuple(ids) for pair in taken for ids in (pair.chosen_ids, pair.rejected_ids)}) == 10
    assert all(pair.chosen_ids[0] < 20 <= pair.rejected_ids[0] for pair in taken)
    assert taken == make_pairs(many, max_pairs_per_prompt=5)
    assert taken != make_pairs(many, max_pairs_per_prompt=5, seed=1)


def test_filters():
    assert [pair.chosen_ids for pair in make_pairs(TABLE, max_length=2)][1] == [8, 8]
    assert [pair.problem for pair in make_pairs(TABLE, difficulty=(0.5, 0.9))] == ["d"]
    for options, message in (
        (
            {"difficulty": (0.9, 1.0)},
            "none of the 2 prompts with right and wrong rollouts is within the difficulty 0.9 to 1",
        ),
        ({"max_length": 1}, "completion of at most 1 tokens; raise max_length"),
    ):
        with pytest.raises(RelexkitError, match=message):
            make_pairs(TABLE, **options)
    with pytest.raises(
        RelexkitError,
        match="3 rollouts of 2 prompts give no preference pair: every prompt is either always or",
    ):
        make_pairs(TABLE.slice(4, 3))


def test_informativeness_by_hand():
    found = informativeness(TABLE, make_pairs(TABLE, max_length=2))
    assert (found.rollouts, found.prompts, found.mixed, found.pairs) == (10, 4, 2, 2)
    assert found.accuracy == pytest.approx(0.5)
    assert found.accuracy_spread == pytest.approx(np.std([0.25, 1, 0, 2 / 3]))
    assert found.entropy == pytest.approx((2 * 0.1 + 2 * 0.4 + (2 * 7 + 9) * 0.5) / 27)
    assert found.margin == pytest.approx(
        np.mean([pair.margin for pair in make_pairs(TABLE, max_length=2)])
    )
    assert math.isnan(informativeness(TABLE, []).margin)


def test_trl_reads_the_pairs(tmp_path):
    from datasets import load_dataset

    pairs = make_pairs(TABLE)
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    loaded = load_dataset(
        "json",
        data_files=str(tmp_path / "pairs.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.column_names == ["prompt", "chosen", "rejected"]
    assert loaded[0] == {"prompt": "a?", "chosen": pairs[0].chosen, "rejected": pairs[0].rejected}
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[1])["prompt"] == "d?"
