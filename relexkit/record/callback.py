"""Record a run of transformers' Trainer or of TRL:
``trainer.add_callback(RecorderCallback("run.zarr"))``.

The base is taken at train begin, a step after its optimizer step (``on_step_end``); writing goes on
in the background. A run that is killed and resumed from its last checkpoint has no gap: of the
steps up to a checkpoint only the checkpoint's own can be missing in the store, and it is recorded
when training resumes.

Works with plain models, DDP, FSDP1, FSDP2 and DeepSpeed; every process takes part, the first one
commits. Of a PEFT model (LoRA) the factors are recorded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from relexkit.assess.jump_decision import JumpRule
from relexkit.errors import RelexkitError, StoreError
from relexkit.gram_matrix.jumps import step_after
from relexkit.processes import Processes
from relexkit.record.jumping import Jumper, refuse_jumps_of
from relexkit.record.recorder import Recorder
from relexkit.record.trl_rollouts import Rollouts, Sample, Sampled
from relexkit.store import TrajectoryStore, describe_steps

SKIPPED, ACCUMULATED = "optimizer_step_skipped", "gradient_accumulation_steps"
"""Metrics: 1 where a gradient scaler skipped the optimizer step; batches that were accumulated into
a step.
"""

_ENDLESS = 2**31  # steps that are left: a jump takes none of the trainer's own
_OPTIONS = ("include", "exclude", "encoding", "mantissa_bits", "sketch")


class RecorderCallback(TrainerCallback):
    """Records the weights after every optimizer step that is a multiple of ``every`` into the store
    ``path``.

    What the trainer logs for a step becomes its metrics. Memory: one step of weights, see
    ``Recorder``. An error, for example a full disk, stops the training of all processes.

    A run that starts anew needs a new ``path``; one that resumes from a checkpoint continues its
    store, whose steps after the checkpoint are removed.

    Args:
        every: record only the steps that are multiples of this.
        jumps: jump inside the training (docs/jumps.md): adaptive ones, which the rewards of
            ``trainer``, a TRL ``GRPOTrainer``, test, or ``FixedJumps``. What is recorded after a
            jump has the numbers that it would have without it: the trainer's own step and the steps
            that were jumped over. Not of an adapter, nor with ``every``, FSDP1 or DeepSpeed.
        trainer: the trainer that the callback is added to; for adaptive jumps.
        options: ``include``, ``exclude``, ``encoding``, ``mantissa_bits``, ``sketch``: see
            ``Recorder``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int = 1,
        jumps: JumpRule | None = None,
        trainer: Any = None,
        **options: Any,
    ):
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise TypeError(f"{sorted(unknown)[0]!r} is not an option; expected one of {_OPTIONS}")
        self._path, self._every, self._options = path, every, {"every": every, **options}
        self._recorder: Recorder | None = None
        self._logged: dict[str, float] = {}
        self._rule, self._trainer = jumps, trainer
        self._jumper: Jumper | None = None
        self._rollouts: Rollouts | None = None
        self._step = 0
        if jumps is not None and (every != 1 or (jumps.tested and trainer is None)):
            raise RelexkitError(
                "jumps: need every step, and the rollouts of a trainer to be tested by; expected"
                " every=1 and trainer=, the GRPOTrainer that the callback is added to"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the store: a new one with the weights as its base, or that of the run which is
        resumed.
        """
        model = kwargs["model"]
        if self._rule is not None:
            refuse_jumps_of(model)
        self._recorder = self._open(state.global_step, model, kwargs.get("processing_class"))
        self._jumper = Jumper(self._rule, self._recorder, model)
        self._step = state.global_step + self._jumper.skipped
        if self._step and self._step not in self._recorder.store.steps:
            self._recorder.record(self._step)  # the checkpoint has it: the store is to have no gap
        if self._rule is not None and self._rule.tested:
            self._rollouts = Rollouts(self._trainer, self._attempt)

    def _open(self, trained: int, model: Any, tokenizer: Any) -> Recorder:
        source = f"recorded during training by {type(self).__name__}"
        if not trained:
            return Recorder(model, self._path, tokenizer=tokenizer, source=source, **self._options)
        store = TrajectoryStore(self._path)
        step = step_after(store, trained)
        earlier = [int(s) for s in store.steps if s <= step]
        last = earlier[-1] if earlier else 0
        due = step // self._every * self._every
        if last < due - self._every or (last < due != step):
            raise StoreError(
                f"{self._path}: holds {describe_steps(store.steps)}; expected step {due} in it,"
                f" because training resumes from step {step}: resume from an earlier checkpoint, or"
                " record into a new store"
            )
        return Recorder(model, self._path, resume_from=step, compare=last == step, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was logged for the step before is complete by now."""
        if self._recorder is None or self._jumper is None:
            return
        self._recorder.describe(self._take_logged())
        if self._jumper.due(self._step, _ENDLESS):
            if self._rollouts is None:
                self._attempt(None)
            else:
                self._rollouts.between_steps = True

    def _attempt(self, sample: Sample | None) -> Sampled | None:
        """Ask whether to jump, and do what comes out; the rollouts of the next step, if they were
        sampled.
        """
        assert self._jumper is not None
        self._step, chosen = self._jumper.attempt(self._step, _ENDLESS, sample or _untested, _say)
        return chosen

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients of a part of the step are there: too late for a jump."""
        if self._rollouts is not None:
            self._rollouts.between_steps = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step; before a checkpoint between recorded steps is saved, wait until the last
        one is written.
        """
        if self._recorder is None or self._jumper is None:
            return
        self._step = state.global_step + self._jumper.skipped
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self._logged = {}
        metrics = {SKIPPED: float(skipped), ACCUMULATED: float(args.gradient_accumulation_steps)}
        metrics |= self._jumper.take_told()
        if (
            not self._recorder.record(self._step, metrics, metrics_follow=True)
            and control.should_save
        ):
            self._recorder.flush()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what was logged, for the step in flight."""
        if logs is None or "train_runtime" in logs:  # the summary at the end belongs to no step
            return
        for name, value in logs.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._logged[name] = float(value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit the last step and release the store."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.describe(self._take_logged())
            recorder.close()
        if self._rollouts is not None:
            self._rollouts.release()
            self._rollouts = None

    def _take_logged(self) -> dict[str, float]:
        logged, self._logged = self._logged, {}
        return logged


def _untested() -> tuple[Sampled, np.ndarray]:
    raise AssertionError("fixed jumps are not tested")


def _say(message: str) -> None:
    """What was decided, on standard error, once of all processes."""
    if Processes().rank == 0:
        print(message, file=sys.stderr)
