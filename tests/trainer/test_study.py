"""The study's table of arms against the trainer's options, its results against the table, and the
numbers of its report against hand-computed ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.tasks import load_task

STUDY = Path(__file__).parents[2] / "docs" / "study"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    """``arms`` and ``report``, which stand beside the study."""
    monkeypatch.syspath_prepend(str(STUDY))
    import arms
    import report

    yield arms, report
    for name in ("arms", "report"):
        sys.modules.pop(name, None)


def test_every_arm_is_a_training_that_can_run(modules) -> None:
    arms, _ = modules
    for arm in arms.ARMS.values():
        for _, steps in arm.lengths:
            config = GRPOConfig(model="m", output="o", max_steps=steps, **arm.settings)
            if arm.jump is not None:  # the last jump fits
                assert steps % (arm.jump[1] + arm.jump[2]) == 0
                assert config.jump_rule is not None
        assert all(cut <= max(steps for _, steps in arm.lengths) for cut in arm.cuts)
    places = [job.result for job in arms.jobs() if job.question != "train"]
    assert len(places) == len(set(places))


def test_results_are_answers_to_jobs(modules) -> None:
    arms, report = modules
    expected = {str(job.result) for job in arms.jobs()}
    found = {
        str(place.relative_to(STUDY / "results")) for place in (STUDY / "results").glob("*/*.json")
    }
    assert found <= expected
    results = report.Results(STUDY / "results")
    for arm in {name.split("/")[0] for name in found}:
        for result in results.seeds(arm).values():
            for place in result["curve"]:
                assert report.right(place, "greedy").mean() == place["greedy"]


def test_random_rewards_are_a_coin(modules) -> None:
    arms, _ = modules
    task = load_task(arms.RANDOM_REWARDS)
    problem = task.problems("train")[0]
    tossed = [task.reward(problem, problem.answer) for _ in range(400)]
    assert set(tossed) == {0.0, 1.0}
    assert abs(np.mean(tossed) - 0.5) < 0.1  # four standard errors


def answer(right: list[int]) -> str:
    return np.packbits(np.array(right, np.uint8)).tobytes().hex()


def run(report, accuracies: list[int], trained: list[int], steps: list[int]) -> dict:
    """A run with so many of 512 problems right."""
    curve = []
    for many, at, step in zip(accuracies, trained, steps, strict=True):
        bits = answer([1] * many + [0] * (512 - many))
        curve.append({"step": step, "trained": at, "greedy_right": bits, "sampled_right": bits})
    return {"rollouts_per_step": 256, "curve": curve}


def test_rollouts_to_an_accuracy_by_hand(modules) -> None:
    """Plain training has 256 right at step 150, the other run 128 after 50 trained steps and 256
    after a jump there: three times fewer rollouts.
    """
    _, report = modules
    plain = {0: run(report, [0, 128, 256], [0, 75, 150], [0, 75, 150])}
    jumped = {0: run(report, [0, 128, 256], [0, 50, 50], [0, 50, 100])}
    places = report.curve(plain[0], "greedy")
    np.testing.assert_allclose(report.rollouts_to(places, 0.375), 0.256 * 112.5)
    assert report.savings(plain, jumped, "greedy", 150).startswith("3.00 ")
    assert report.savings(plain, jumped, "greedy", 150).endswith("to 0.500")
    fewer = {0: run(report, [0, 128], [0, 50], [0, 50])}
    assert report.savings(plain, fewer, "greedy", 150).startswith("1.50 ")
    assert report.savings(plain, fewer, "greedy", 150).endswith("to 0.250")


def test_intervals_are_over_seeds_from_three_on(modules) -> None:
    _, report = modules
    differences = np.zeros((3, 4)) + np.array([[0.0], [0.1], [0.2]])
    # Student's t at 97.5 % with two degrees of freedom, 4.303, times 0.1 / sqrt(3)
    assert report.mean_text(differences, sign=True) == "+0.100 ± 0.248"
    assert report.mean_text(differences[:2], sign=True) == "+0.050 ± 0.000†"


@pytest.mark.parametrize(
    ("arm", "never"), [("plain-3e-6", "not-a-line"), ("plain-1e-4", "extrapolate")]
)
def test_the_saving_interval_turns_no_advice_on_a_real_run_around(modules, arm, never) -> None:
    """A run that is a line and one that is a walk, each as if only some of its steps were saved."""
    _, report = modules
    kept = report.Results(STUDY / "results").gram(arm, 0)
    said = [report.advised(*kept, cut, n).verdict for cut in (50, 75) for n in (1, 3, 5, 7)]
    assert never not in said
    assert ("extrapolate" if never == "not-a-line" else "not-a-line") in said
