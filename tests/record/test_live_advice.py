"""Advice while a run trains: what ``advise`` says of the same steps, in the background, and never
an error.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulated import COVERAGE_FAMILIES, simulate

from relexkit import Recorder, TrajectoryStore, gram
from relexkit.assess.advice import advise
from relexkit.geometry.sketch import Sketch
from relexkit.record.live_advice import LiveAdvice, headline

D = 4000


def recorded(path, deltas: np.ndarray, every: int = 1, rates=lambda step: 1e-5) -> list[str]:
    """Trains a model along the deltas, recording; returns the news in order, waiting for each."""
    torch.manual_seed(0)
    model = torch.nn.Linear(deltas.shape[1], 1, bias=False)
    base, news = model.weight.detach().clone(), []
    with Recorder(model, path, every=every) as recorder:
        live = LiveAdvice(recorder, share=np.inf)
        for step, delta in enumerate(deltas, 1):
            with torch.no_grad():
                model.weight.copy_(base + 1e-3 * torch.from_numpy(delta).float())
            recorder.record(step, {"learning_rate": rates(step)})
            found = live.update()
            for _ in range(600):
                if live._answer is None or live._answer.done():
                    break
                time.sleep(0.05)
            news += [] if found is None else [found]
        live.close()
    return news


@pytest.mark.parametrize("kind", ["walk with momentum", "line, independent noise"])
def test_it_says_what_advise_says_of_the_store(tmp_path, kind) -> None:
    news = recorded(tmp_path / "run.zarr", simulate(COVERAGE_FAMILIES[kind], 24, 3, D))
    store = TrajectoryStore(tmp_path / "run.zarr")
    assert len(news) == 2
    for sentence, until in zip(news, (10, 20), strict=True):
        found = advise(
            gram(store).scoped("global").until(until),
            {k: v[:until] for k, v in store.metrics().items()},
        )
        assert sentence == f"Up to step {until}: {found.headline}"


def test_only_every_tenth_recorded_step_asks(tmp_path) -> None:
    assert (
        len(
            recorded(
                tmp_path / "run.zarr", simulate(COVERAGE_FAMILIES["walk"], 30, 0, 100), every=4
            )
        )
        == 0
    )


def test_the_caller_never_waits_and_one_question_is_asked_at_a_time(monkeypatch) -> None:
    begun, go = [], threading.Event()
    monkeypatch.setattr(
        "relexkit.record.live_advice.headline",
        lambda steps, *_: (begun.append(steps[-1]), go.wait(20), "news")[-1],
    )
    recorder = SimpleNamespace(live_sketch=None, store=SimpleNamespace(path="none"))
    live = LiveAdvice(recorder, every=2, share=np.inf)
    for last in range(1, 9):
        recorder.live_sketch = (np.arange(1, last + 1), np.zeros((last, 4), np.float32))
        assert live.update() is None
        assert live.update() is None, "the same recorded step again"
    go.set()
    live._answer.result(20)
    assert live.update() == "news"
    assert begun == [2]
    live.close()


def test_it_takes_a_share_of_the_time_only(monkeypatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("relexkit.record.live_advice.time", clock)
    monkeypatch.setattr(
        "relexkit.record.live_advice._timed_headline", lambda steps, *_: (str(steps[-1]), 3.0)
    )
    recorder = SimpleNamespace(live_sketch=None, store=SimpleNamespace(path="none"))
    live, news = LiveAdvice(recorder, every=2, share=0.1), {}
    for last in range(
        1,
        41,
        # two seconds a step: after an advice of three seconds the next one is due thirty seconds
        # later
    ):
        clock.now = 2.0 * last
        recorder.live_sketch = (np.arange(1, last + 1), np.zeros((last, 4), np.float32))
        if (found := live.update()) is not None:
            news[last] = found
        if live._answer is not None:
            live._answer.result(20)
    assert news == {3: "2", 19: "18", 35: "34"}
    live.close()


def test_what_goes_wrong_is_said_in_one_line(tmp_path) -> None:
    rows = np.ones((3, 8), np.float32)
    said = headline(np.array([1, 2, 3]), rows, str(tmp_path / "nothing.zarr"))
    assert said.startswith("Up to step 3: no advice: ")
    assert "nothing.zarr" in said
    assert "\n" not in said


def test_of_a_long_run_forty_steps_are_used(tmp_path, monkeypatch) -> None:
    seen = []

    def advise(found, metrics, *, record):
        seen.append((found, metrics))
        return SimpleNamespace(headline=".")

    monkeypatch.setattr("relexkit.record.live_advice.advise", advise)
    deltas = simulate(COVERAGE_FAMILIES["walk"], 60, 0, 50)
    recorded(tmp_path / "run.zarr", deltas, rates=lambda step: 1 / step)
    found, metrics = seen[-1]
    assert len(found.steps) == 40
    np.testing.assert_array_equal(found.steps[-20:], np.arange(31, 51))
    np.testing.assert_allclose(metrics["learning_rate"], 1 / found.steps)
    sketch = Sketch()
    for step, row in enumerate(deltas[:50], 1):
        sketch.update(step, [("weight", 0, (1e-3 * row).astype(np.float32))])
    np.testing.assert_allclose(
        found.matrices[0],
        sketch.gram()[np.ix_(found.steps - 1, found.steps - 1)],
        rtol=1e-2,
        atol=1e-6,
    )
