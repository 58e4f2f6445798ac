"""What the advice knows of the task: the study's numbers, and what they make of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from simulated import Run, recorded, simulate
from study_runs import RESULTS, study_run

from relexkit.assess.advice import advise
from relexkit.assess.task_evidence import GAINING, STUDY, Worth, standing
from relexkit.geometry.trajectory_model import fit_trajectory


def gained(worth: Worth, seed: int) -> tuple[float, float]:
    """Of one run, read from the study's results without the code that made the table."""
    plain = json.loads((RESULTS / f"plain-{worth.rate}" / f"seed-{seed}.json").read_text())
    accuracy = {place["step"]: place["greedy"] for place in plain["curve"]}
    held, trained = accuracy[worth.until], accuracy[worth.target]
    place = RESULTS / f"drift-25+25-{worth.rate}" / f"seed-{seed}.json"
    if worth.until == 25 and place.exists():
        curve = json.loads(place.read_text())["curve"]
        predicted = next(row["greedy"] for row in curve if row["jumped"])
    else:
        place = RESULTS / f"plain-{worth.rate}" / f"seed-{seed}-from-{worth.until}.json"
        rows = json.loads(place.read_text())["predictions"]
        asked = ("drift", worth.target)
        predicted = next(r["greedy"] for r in rows if (r["method"], r["target"]) == asked)
    return predicted - held, trained - held


@pytest.mark.parametrize("worth", STUDY, ids=lambda w: f"{w.rate}-{w.until}")
def test_the_table_is_what_the_study_found(worth: Worth) -> None:
    found = np.mean([gained(worth, seed) for seed in worth.seeds], axis=0)
    np.testing.assert_allclose(found, [worth.gained, worth.trained], atol=6e-4)


def test_the_standings_are_those_of_the_runs() -> None:
    worth = next(w for w in STUDY if w.rate == "3e-5")
    run = study_run(f"plain-{worth.rate}", worth.seeds[0], worth.until)
    size, cut = float(run.num_parameters.sum()), worth.until
    fit = fit_trajectory(run.matrices[0], run.steps, num_parameters=size, spaced=16)
    expected = fit.drift_to_noise * fit.correlation_time / cut
    assert standing(fit) == pytest.approx(expected)
    low, high = worth.standing  # BLAS kernels differ
    assert 0.9 * low < standing(fit) < 1.1 * high + 0.01


def test_the_study_tells_what_gains_by_its_standing() -> None:
    for worth in STUDY:
        assert (worth.standing[1] > GAINING) == (worth.gained > worth.trained / 3)


@pytest.mark.parametrize(
    ("run", "verdict", "told"),
    [
        (Run(drift=0.6), "extrapolate", "gained two fifths of what training does"),
        (Run(drift=0.6, lifetime=12.0), "keep-training", "gained next to nothing, or lost, on"),
    ],
)
def test_headline_and_reasons_follow_the_task(run: Run, verdict: str, told: str) -> None:
    """A drift far above the noise that turns soon predicts the weights, and gained nothing."""
    advice = advise(recorded(simulate(run, 48, 1), np.arange(1, 49)))
    assert advice.verdict == verdict
    assert told in advice.reasons[1]
    assert (advice.target is not None) == (verdict == "extrapolate")
    assert (advice.next_command is not None) == (verdict == "extrapolate")
