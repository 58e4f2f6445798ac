"""``advise`` while a run trains: from the recorder's sketches, in the background, every few
recorded steps.

    live = LiveAdvice(recorder)
    recorder.record(step, metrics)
    sentence = live.update()       # None until there is news

The sketches estimate the Gram matrix of the whole model, so no weight is read. An error is reported
in place of the advice and never stops a training.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from relexkit.assess.advice import advise
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.gram_matrix.rates import learning_rates
from relexkit.store import TrajectoryStore

if TYPE_CHECKING:
    from relexkit.record.recorder import Recorder

_LATEST, _EARLIER = (
    20,
    20,
)  # recorded steps that an advice rests on: the last ones, and some spread over those before


class LiveAdvice:
    """Headlines of ``advise`` about the recorded steps before the current one.

    Args:
        recorder: whose sketches are read, in the process that commits; without sketches there is
            never any news.
        every: recorded steps from one advice to the next, at least.
        share: processor seconds of advice for each second of the run, at most: of quick steps there
            are more than ``every`` between two advices.

    About a second of one core for each advice (0.9 to 1.2 s at 10 to 45 steps), not of the caller's
    thread.
    """

    def __init__(self, recorder: Recorder, *, every: int = 10, share: float = 0.02):
        self._recorder, self._every, self._share = recorder, every, share
        self._last, self._count, self._not_before = 0, 0, -np.inf
        self._answer: Future[tuple[str, float]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="advice")

    def update(self) -> str | None:
        """To be called after every ``record``; returns the news, an advice about steps up to an
        earlier one, once there.
        """
        news = None
        if self._answer is not None and self._answer.done():
            (news, seconds), self._answer = self._answer.result(), None
            self._not_before = time.monotonic() + seconds / self._share
        steps, rows = self._recorder.live_sketch
        if len(steps) and steps[-1] != self._last:
            self._last, self._count = int(steps[-1]), self._count + 1
            if (
                self._count >= self._every
                and self._answer is None
                and time.monotonic() >= self._not_before
            ):
                self._count = 0
                self._answer = self._pool.submit(
                    _timed_headline, steps, rows, self._recorder.store.path
                )
        return news

    def close(self) -> None:
        """Drop what is not yet answered."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _timed_headline(steps: np.ndarray, rows: np.ndarray, path: str) -> tuple[str, float]:
    """``headline``, and the processor seconds that it took."""
    began = time.thread_time()
    return headline(steps, rows, path), time.thread_time() - began


def headline(steps: np.ndarray, rows: np.ndarray, path: str) -> str:
    """One line of advice from sketches ``rows [K, width]`` of the steps ``[K]`` of the store
    ``path``; never raises.
    """
    try:
        kept = _thin(len(steps))
        store = TrajectoryStore(path)
        metrics = {
            name: values[np.searchsorted(store.steps, steps[kept])]
            for name, values in store.metrics().items()
        }
        with single_threaded_blas():
            wide = rows[kept].astype(np.float64)
            rates = learning_rates(steps[kept], metrics)
            whole = _whole(steps[kept], wide @ wide.T, store.layout.num_parameters, rates)
            advice = advise(whole, metrics, record=False)
        return f"Up to step {steps[-1]}: {advice.headline}"
    except Exception as error:
        return f"Up to step {steps[-1]}: no advice: {' '.join(str(error).split())}"


def _thin(count: int) -> np.ndarray:
    if count <= _LATEST + _EARLIER:
        return np.arange(count)
    earlier = np.linspace(0, count - _LATEST - 1, _EARLIER).round().astype(np.int64)
    return np.r_[earlier, np.arange(count - _LATEST, count)]


def _whole(
    steps: np.ndarray, matrix: np.ndarray, num_parameters: int, rates: np.ndarray | None
) -> Gram:
    nothing = np.zeros((1, len(steps)), np.int64)
    return Gram(
        steps=steps,
        names=("model",),
        num_parameters=np.array([num_parameters]),
        matrices=matrix[None],
        changed=nothing,
        moved=nothing,
        unit_moves=nothing - 1,
        rates=rates,
    )
