"""What ``info`` and ``report`` say of a run with jumps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from stores import store_of

from relexkit import TrajectoryStore
from relexkit.cli import main
from relexkit.gram_matrix.jumps import Attempt

MADE = [
    Attempt(3, 4, "drift", True, {"skill": 0.5, "before": 0.25, "after": 0.5, "p_hurt": 0.75}),
    Attempt(10, 4, "relex", False, {"skill": 0.25, "before": 0.5, "after": 0.25, "p_hurt": 0.01}),
    Attempt(14, 0, None, False, {"p_value": 0.5}),
]
SAID = "1 kept (3 to 7); 1 taken back (10 to 14); none at 14"


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    steps = np.array([1, 2, 3, *range(7, 20)])
    told = {7: MADE[0], 11: MADE[1], 15: MADE[2]}
    rows = [told[step].metrics if step in told else {} for step in steps.tolist()]
    metrics = {n: np.array([r.get(n, np.nan) for r in rows]) for n in {n for r in rows for n in r}}
    deltas = np.random.default_rng(0).normal(size=(len(steps), 30)).cumsum(axis=0)
    return store_of(tmp_path / "run.zarr", {"w": deltas}, steps, metrics=metrics)


def test_info_lists_every_decision(
    store: TrajectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", store.path]) == 0
    assert SAID in " ".join(capsys.readouterr().out.split())
    assert main(["info", store.path, "--json"]) == 0
    jumps = json.loads(capsys.readouterr().out)["jumps"]
    assert jumps == [attempt.document() for attempt in MADE]
    assert jumps[1] == {
        "step": 10,
        "length": 4,
        "method": "relex",
        "outcome": "taken back",
        "skill": 0.25,
        "before": 0.5,
        "after": 0.25,
        "p_hurt": 0.01,
    }


def test_the_report_says_what_came_of_the_jumps(store: TrajectoryStore, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", store.path, "-o", str(page)]) == 0
    assert SAID in page.read_text()
