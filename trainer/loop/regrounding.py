"""Periodic re-grounding (arXiv 2601.04537): train some steps, jump to where they lead, train again
from there.

The prediction is made from the steps since the last jump alone, relative to the weights that it led
to, from the deltas in the store. The optimizer goes on with the moments and the step count that it
has: the moments describe the gradient at the place that the jump left, a state that starts anew
would take a first step as long as if the run had just begun.
"""

from __future__ import annotations

from typing import Any

from relexkit import Prediction, Recorder, apply, predict_weights
from relexkit.extension import JUMP_METRIC, from_segment, jumps, segment_gram
from relexkit.trainer.config import Regrounding


def last_jump(recorder: Recorder) -> int:
    """The step that the last jump led to, or 0."""
    recorder.flush()
    steps = jumps(recorder.store)
    return int(steps[-1]) if len(steps) else 0


def is_due(rule: Regrounding, step: int, start: int, max_steps: int) -> bool:
    """Whether the next steps are jumped over: enough were trained since ``start``, and the run is
    long enough.
    """
    return step - start >= rule.train_steps and step + rule.jump_steps <= max_steps


def jump(
    rule: Regrounding, recorder: Recorder, model: Any, step: int, start: int
) -> tuple[int, dict[str, float]]:
    """Put the prediction for ``rule.jump_steps`` later into the model and record it; the step it
    leads to, and what is logged.

    Raises:
        ExtrapolationError: nothing can be predicted from these steps.
    """
    recorder.flush()
    target = step + rule.jump_steps
    observed = segment_gram(recorder.store, start)
    weights = predict_weights(observed, [float(target - start)], Prediction(method=rule.method))[0]
    apply(recorder.store, model, from_segment(recorder.store, start, weights))
    metrics = {JUMP_METRIC: float(rule.jump_steps)}
    recorder.record(target, metrics)
    return target, metrics
