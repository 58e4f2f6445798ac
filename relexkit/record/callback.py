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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from relexkit.errors import StoreError
from relexkit.record.recorder import Recorder
from relexkit.store import TrajectoryStore, describe_steps

SKIPPED, ACCUMULATED = "optimizer_step_skipped", "gradient_accumulation_steps"
"""Metrics: 1 where a gradient scaler skipped the optimizer step; batches that were accumulated into
a step.
"""

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
        options: ``include``, ``exclude``, ``encoding``, ``mantissa_bits``, ``sketch``: see
            ``Recorder``.
    """

    def __init__(self, path: str | Path, *, every: int = 1, **options: Any):
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise TypeError(f"{sorted(unknown)[0]!r} is not an option; expected one of {_OPTIONS}")
        self._path, self._every, self._options = path, every, {"every": every, **options}
        self._recorder: Recorder | None = None
        self._logged: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the store: a new one with the weights as its base, or that of the run which is
        resumed.
        """
        self._recorder = self._open(
            state.global_step, kwargs["model"], kwargs.get("processing_class")
        )
        if state.global_step and state.global_step not in self._recorder.store.steps:
            self._recorder.record(
                state.global_step
            )  # the checkpoint has it, and the store is to have no gap

    def _open(self, step: int, model: Any, tokenizer: Any) -> Recorder:
        source = f"recorded during training by {type(self).__name__}"
        if not step:
            return Recorder(model, self._path, tokenizer=tokenizer, source=source, **self._options)
        store = TrajectoryStore(self._path)
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
        if self._recorder is not None:
            self._recorder.describe(self._take_logged())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step; before a checkpoint between recorded steps is saved, wait until the last
        one is written.
        """
        if self._recorder is None:
            return
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self._logged = {}
        metrics = {SKIPPED: float(skipped), ACCUMULATED: float(args.gradient_accumulation_steps)}
        if (
            not self._recorder.record(state.global_step, metrics, metrics_follow=True)
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

    def _take_logged(self) -> dict[str, float]:
        logged, self._logged = self._logged, {}
        return logged
