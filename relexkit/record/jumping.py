"""Jumps of a live model: asked of its own record, made, and kept or taken back.

    jumper = Jumper(Jumps(), recorder, model)
    if jumper.due(step, most):
        decision = jumper.decide(step, most)
        if decision.length:
            jumper.jump(decision)                      # the model holds the prediction
            step = jumper.settle(step, decision, test)  # and keeps it, or is as it was, bit for bit

Where a run stands between its jumps follows from what the store holds alone, so a run that is
killed and resumed decides the same again. With several processes every one makes the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from relexkit.assess.jump_decision import Decision, JumpRule, RewardTest
from relexkit.gram_matrix.jumps import Attempt, attempts
from relexkit.gram_matrix.segment import from_segment, segment_gram
from relexkit.materialize.in_place import apply
from relexkit.predict.extrapolators import predict_weights
from relexkit.predict.prediction import Prediction
from relexkit.processes import Processes
from relexkit.record.recorder import Recorder

if TYPE_CHECKING:
    import torch


class Jumper:
    """Decides, makes and settles the jumps of one run, whose every step ``recorder`` records.

    The optimizer is left alone: its moments are averages of gradients over the last ten
    (``1 / (1 - beta1)``) and thousand steps, which a jump in their own direction does not make
    wrong, while new ones would make the next step as long as the first of a run
    (docs/jumps.md compares).

    Memory: until a jump that may be taken back is settled, one copy of the weights that this
    process holds.
    """

    def __init__(self, rule: JumpRule | None, recorder: Recorder | None, model: torch.nn.Module):
        self._rule, self._recorder, self._model = rule, recorder, model
        self._processes = Processes()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._weights = np.empty((0, 0))
        self._told: dict[str, float] = {}
        self._start = self._asked = self._wait = 0
        self.skipped = 0
        """Steps that were jumped over so far."""
        self.landing: dict[str, float] = {}
        """Metrics of the last jump that was kept."""
        if rule is not None and recorder is not None:
            self._wait = rule.every
            recorder.flush()
            for attempt in attempts(recorder.store):
                self._follow(attempt)

    @property
    def tested(self) -> bool:
        """Whether the rewards decide if a jump stays."""
        return self._rule is not None and self._rule.tested

    def due(self, step: int, most: int) -> bool:
        """Whether it is time to ask: enough steps were trained since the last jump or question, and
        the ``most`` that are left have room for a jump.
        """
        rule = self._rule
        return rule is not None and step - self._asked >= self._wait and most >= rule.shortest

    def decide(self, step: int, most: int) -> Decision:
        """How far to jump from ``step``, the last recorded one, by at most ``most`` steps. One pass
        over the steps since the last jump, by the first process.
        """
        rule, recorder = self._asking
        recorder.flush()

        def ask() -> tuple[Decision, np.ndarray]:
            segment = segment_gram(recorder.store, self._start)
            decision = rule.decide(segment, most)
            if decision.method is None:
                return decision, np.empty((0, 0))
            target = float(step + decision.length - self._start)
            weights = predict_weights(segment, [target], Prediction(method=decision.method))[0]
            return decision, from_segment(recorder.store, self._start, weights)

        answer = self._processes.gather(self._processes.lead(ask))[0]
        decision, self._weights = answer
        if not decision.length:
            self._told = self._conclude(step, decision, kept=False, further={})
        return decision

    def jump(self, decision: Decision) -> None:
        """Put the prediction of ``decide`` into the model."""
        assert decision.length
        rule, recorder = self._asking
        if rule.tested:
            self._copies = [
                (held, held.clone()) for held in map(_held_here, self._state().values())
            ]
        self._processes.agree(lambda: apply(recorder.store, self._model, self._weights))

    def settle(
        self, step: int, decision: Decision, test: RewardTest | None, rollouts: int = 0
    ) -> int:
        """Keep the jump and record it, or bring the weights back, bit for bit.

        Args:
            test: what the rewards said; None keeps the jump.
            rollouts: what the test cost.

        Returns the step that the model is at.
        """
        further = {} if test is None else {**test.numbers, "rollouts": float(rollouts)}
        kept = test is None or test.kept
        if not kept:
            self._take_back()
        self._copies = []
        told = self._conclude(step, decision, kept, further)
        if not kept:
            self._told = told
            return step
        target = step + decision.length
        self.landing = told
        self._asking[1].record(target, told)
        return target

    def take_told(self) -> dict[str, float]:
        """What the last question came to, as metrics of the next step; nothing the second time."""
        told, self._told = self._told, {}
        return told

    @property
    def waiting(self) -> int:
        """Trained steps between the last question and the next."""
        return self._wait

    @property
    def _asking(self) -> tuple[JumpRule, Recorder]:
        assert self._rule is not None
        assert self._recorder is not None
        return self._rule, self._recorder

    def _state(self) -> dict[str, torch.Tensor]:
        """The model's tensors where they are kept, not where the last pass has gathered them."""
        for module in self._model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return self._model.state_dict()

    def _take_back(self) -> None:
        import torch

        self._state()
        with torch.no_grad():
            for held, copy in self._copies:
                held.copy_(copy)

    def _conclude(
        self, step: int, decision: Decision, kept: bool, further: Mapping[str, float]
    ) -> dict[str, float]:
        attempt = Attempt(
            step=step,
            length=decision.length,
            method=decision.method,
            kept=kept,
            numbers={**decision.evidence, **further},
        )
        self._follow(attempt)
        return attempt.metrics

    def _follow(self, attempt: Attempt) -> None:
        """Where the run stands after an attempt."""
        self._asked = attempt.step
        if attempt.kept:
            self._start = self._asked = attempt.step + attempt.length
            self.skipped += attempt.length
            self._wait = self._asking[0].every
        elif attempt.length:
            self._wait *= 2


def _held_here(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()
