"""Jumps of a live model: asked of its own record, made, and kept or taken back.

    jumper = Jumper(Jumps(), recorder, model)
    if jumper.due(step, most):
        step, rollouts = jumper.attempt(step, most, sample, print)

The rollouts that the next step needs anyway are sampled twice, by the weights before and after the
jump, from the same prompts with the same noise: those of the side that loses are what a test costs.
Where a run stands between its jumps follows from what the store holds alone, so a run that is
killed and resumed decides the same again. With several processes every one makes the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from relexkit.assess.jump_decision import Decision, JumpRule, momentum_of, reward_test
from relexkit.errors import RelexkitError
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.jumps import Attempt, attempts, last_trained
from relexkit.gram_matrix.segment import from_segment, segment_gram
from relexkit.materialize.in_place import apply
from relexkit.predict.extrapolators import predict_weights
from relexkit.predict.prediction import Prediction
from relexkit.processes import Processes
from relexkit.record.live_adapter import peft_model
from relexkit.record.live_weights import are_in_place
from relexkit.record.recorder import Recorder

if TYPE_CHECKING:
    import torch

_Rollouts = TypeVar("_Rollouts")


def refuse_jumps_of(model: torch.nn.Module) -> None:
    """Raises RelexkitError for a model that no prediction can be written into."""
    if peft_model(model) is not None:
        raise RelexkitError(
            "jumps: of an adapter are not offered, because a prediction of its product is no pair"
            " of factors; expected a model whose own weights are trained: leave the jumps out, or"
            " the adapter"
        )
    if not are_in_place(model):
        raise RelexkitError(
            "jumps: cannot be written into weights that FSDP1 or DeepSpeed keep elsewhere; expected"
            " a plain model, DDP, or FSDP2 (fsdp_version: 2 in Accelerate)"
        )


class Jumper:
    """Decides, makes and settles the jumps of one run, whose every step ``recorder`` records.

    The optimizer is left alone: its moments are averages of gradients over the last ten
    (``1 / (1 - beta1)``) and thousand steps, which a jump in their own direction does not make
    wrong, while new ones would make the next step as long as the first of a run
    (docs/jumps.md compares).

    Memory: while a jump is tested, one copy of the weights that this process holds.

    Args:
        rule: None never jumps.
        recorder: None only without a rule.
    """

    def __init__(self, rule: JumpRule | None, recorder: Recorder | None, model: torch.nn.Module):
        self._rule, self._recorder, self._model = rule, recorder, model
        self._processes = Processes()
        self._weights = np.empty((0, 0))
        self._told: dict[str, float] = {}
        self._momentum: float | None = None
        self._start = self._asked = self._wait = self._patience = self._again = 0
        self.skipped = 0
        """Steps that were jumped over so far."""
        self.landing: dict[str, float] = {}
        """Metrics of the last jump that was kept."""
        if recorder is None:
            return
        recorder.flush()
        made = attempts(recorder.store)
        if rule is None:  # a run that had jumps goes on without: its steps keep their numbers
            self.skipped = sum(attempt.length for attempt in made if attempt.kept)
            return
        self._wait = self._patience = rule.every
        self._again = rule.shortest
        for attempt in made:
            self._follow(attempt)

    def due(self, step: int, most: int) -> bool:
        """Whether it is time to ask: enough steps were trained since the last jump or question, and
        the ``most`` that are left have room for a jump.
        """
        rule = self._rule
        return rule is not None and step - self._asked >= self._wait and most >= rule.shortest

    def attempt(
        self,
        step: int,
        most: int,
        sample: Callable[[], tuple[_Rollouts, np.ndarray]],
        say: Callable[[str], None],
    ) -> tuple[int, _Rollouts | None]:
        """Ask whether to jump from ``step``, the last recorded one, by at most ``most`` steps, and
        do what comes out: a jump that stays is recorded, after one that does not the weights are
        what they were, bit for bit.

        One pass over the steps since the last jump, and once over those before the first, by the
        first process. Collective.

        Args:
            sample: the rollouts of the next step by the weights as they are, and their rewards
                ``[P, G]`` over all processes; called twice, with the same random numbers, or, where
                nothing is to be tested, not at all.
            say: told what was decided.

        Returns the step that the model is at, and its rollouts where they were sampled.
        """
        decision = self._decide(step, most)
        if not decision.length:
            self._told = self._conclude(step, decision, kept=False, further={})
            say(f"step {step}: no jump: {decision.reason}")
            return step, None
        target = step + decision.length
        if not self._rule_and_recorder[0].tested:
            say(f"step {step}: jumps to what {decision.method} predicts for step {target}")
            self._jump()
            return self._land(step, decision, {}), None
        say(
            f"step {step}: tries what {decision.method} predicts for step {target}:"
            f" {decision.reason}"
        )
        before, before_PG = sample()
        copies = [(held, held.clone()) for held in self._held()]
        self._jump()
        after, after_PG = sample()
        test = reward_test(before_PG, after_PG)
        further = {**test.numbers, "rollouts": float(before_PG.size)}
        if test.kept:
            say(f"step {target}: keeps the jump: {test}")
            return self._land(step, decision, further), after
        self._take_back(copies)
        self._told = self._conclude(step, decision, kept=False, further=further)
        say(f"step {step}: takes the jump back: {test}; asks again after {self._wait} steps")
        return step, before

    def take_told(self) -> dict[str, float]:
        """What the last question came to, as metrics of the next step; nothing the second time."""
        told, self._told = self._told, {}
        return told

    @property
    def _rule_and_recorder(self) -> tuple[JumpRule, Recorder]:
        assert self._rule is not None
        assert self._recorder is not None
        return self._rule, self._recorder

    def _decide(self, step: int, most: int) -> Decision:
        """How far to jump; the same on every process, which then all know the weights over the
        recorded deltas.
        """
        rule, recorder = self._rule_and_recorder
        recorder.flush()

        def ask() -> tuple[Decision, np.ndarray]:
            segment = self._segment()
            decision = rule.decide(segment, most)
            if decision.method is None:
                return decision, np.empty((0, 0))
            target = float(step + decision.length - self._start)
            weights = predict_weights(segment, [target], Prediction(method=decision.method))[0]
            return decision, from_segment(recorder.store, self._start, weights)

        decision, self._weights = self._processes.gather(self._processes.lead(ask))[0]
        return decision

    def _segment(self) -> Gram:
        """The steps since the last jump."""
        rule, recorder = self._rule_and_recorder
        segment = segment_gram(recorder.store, self._start)
        if not (self._start and rule.remembers):
            return segment
        if self._momentum is None:
            first = segment_gram(recorder.store, 0, last_trained(recorder.store, None))
            self._momentum = momentum_of(first)
        return replace(segment, momentum=self._momentum)

    def _reshard(self) -> None:
        """Have FSDP2 use the model's own tensors, not what the last pass has gathered of them."""
        modules: Iterable[Any] = self._model.modules()
        for module in modules:
            if hasattr(module, "reshard"):
                module.reshard()

    def _held(self) -> list[torch.Tensor]:
        """What this process holds of the model's tensors."""
        self._reshard()
        return [
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
            for tensor in self._model.state_dict().values()
        ]

    def _jump(self) -> None:
        """Put the prediction into the model."""
        store = self._rule_and_recorder[1].store
        self._reshard()
        self._processes.agree(lambda: apply(store, self._model, self._weights))

    def _take_back(self, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        import torch

        self._reshard()
        with torch.no_grad():
            for held, copy in copies:
                held.copy_(copy)

    def _land(self, step: int, decision: Decision, further: Mapping[str, float]) -> int:
        """Record a jump that stays; the step it led to."""
        self.landing = self._conclude(step, decision, kept=True, further=further)
        self._rule_and_recorder[1].record(step + decision.length, self.landing)
        return step + decision.length

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
        rule = self._rule_and_recorder[0]
        self._asked = attempt.step
        if attempt.kept:
            self._start = self._asked = attempt.step + attempt.length
            self.skipped += attempt.length
            self._wait = self._patience = rule.every
        elif attempt.length:
            self._patience *= 2
            self._wait = self._patience
        else:
            self._wait = self._again
            self._again *= 2
            return
        self._again = rule.shortest
