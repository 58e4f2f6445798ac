"""Jumps: recorded steps that were not trained but predicted, and what a run has decided about them.

A jump is a recorded step whose metric ``jump_steps`` says how many steps it skips. Analysis takes
the steps before the first one, which the optimizer made from the base; a further prediction takes
those since the last one (``relexkit.gram_matrix.segment``). Every decision, also one against a
jump and one that was taken back, is told by metrics named ``jump/...`` of the next recorded step,
which is the jump itself where it was kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relexkit.errors import StoreError
from relexkit.store import TrajectoryStore

JUMP_METRIC = "jump_steps"
_LENGTH, _METHOD = "jump/length", "jump/by_"


@dataclass(frozen=True)
class Attempt:
    """One decision about a jump.

    Attributes:
        step: the recorded step at whose weights it was made, 0 for the base.
        length: steps to jump over; 0 where the record spoke against any jump.
        method: what predicted the weights there; None without a jump.
        kept: whether the run went on from there.
        numbers: what the decision rests on and what it came to, by name: ``drift_to_noise``,
            ``p_value`` and ``skill`` of the record, ``before``, ``after`` and ``p_hurt`` of the
            test by rewards, ``rollouts`` that the test cost; those that there are.
    """

    step: int
    length: int
    method: str | None
    kept: bool
    numbers: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The attempt as metrics of the next recorded step."""
        told = {f"jump/{name}": value for name, value in self.numbers.items()}
        told[_LENGTH] = float(self.length)
        if self.method is not None:
            told[_METHOD + self.method] = 1.0
        if self.kept:
            told[JUMP_METRIC] = float(self.length)
        return told

    def document(self) -> dict[str, Any]:
        """Plain numbers and words, for JSON."""
        return {
            "step": self.step,
            "length": self.length,
            "method": self.method,
            "outcome": self.outcome,
            **self.numbers,
        }

    @property
    def outcome(self) -> str:
        """In words."""
        return "kept" if self.kept else "taken back" if self.length else "no jump"


def jumps(store: TrajectoryStore) -> np.ndarray:
    """Steps that a jump led to, ``int64 [J]``, ascending."""
    if JUMP_METRIC not in store.metric_names():
        return np.empty(0, np.int64)
    return store.steps[np.isfinite(store.metrics()[JUMP_METRIC])]


def attempts(store: TrajectoryStore) -> list[Attempt]:
    """All decisions about jumps, in order; of jumps that were recorded without one, the jump."""
    if not {JUMP_METRIC, _LENGTH} & set(store.metric_names()):
        return []
    metrics = store.metrics()
    nothing = np.full(len(store.steps), np.nan)
    kept, asked = (metrics.get(name, nothing) for name in (JUMP_METRIC, _LENGTH))
    found = []
    for row in np.flatnonzero(np.isfinite(kept) | np.isfinite(asked)).tolist():
        said = {
            name: float(values[row])
            for name, values in metrics.items()
            if name.startswith("jump/") and math.isfinite(values[row])
        }
        method = next((n.removeprefix(_METHOD) for n in said if n.startswith(_METHOD)), None)
        numbers = {
            name.removeprefix("jump/"): value
            for name, value in said.items()
            if name != _LENGTH and not name.startswith(_METHOD)
        }
        found.append(
            Attempt(
                step=int(store.steps[row - 1]) if row else 0,
                length=int(kept[row] if np.isfinite(kept[row]) else asked[row]),
                method=method,
                kept=bool(np.isfinite(kept[row])),
                numbers=numbers,
            )
        )
    return found


def described(made: Sequence[Attempt]) -> str:
    """What came of attempts, in words: ``2 kept (12 to 18, 54 to 60), 1 taken back (30 to 36)``."""
    words = []
    for outcome in ("kept", "taken back", "no jump"):
        found = [attempt for attempt in made if attempt.outcome == outcome]
        places = [f"{a.step} to {a.step + a.length}" if a.length else str(a.step) for a in found]
        if found and outcome == "no jump":
            words.append(f"none at {', '.join(places)}")
        elif found:
            words.append(f"{len(found)} {outcome} ({', '.join(places)})")
    return "; ".join(words)


def step_after(store: TrajectoryStore, trained: int) -> int:
    """The step that a run is at after so many trained ones, with the jumps before it."""
    landed = set(jumps(store).tolist())
    if not landed:
        return trained
    own = [int(step) for step in store.steps if step not in landed]
    return own[trained - 1] if trained <= len(own) else trained


def last_trained(store: TrajectoryStore, until: int | None) -> int | None:
    """``until``, or the last step before the first jump if that is earlier.

    Raises:
        StoreError: the first recorded step is a jump.
    """
    jump_steps = jumps(store)
    if not len(jump_steps) or (until is not None and until < jump_steps[0]):
        return until
    trained = store.steps[store.steps < jump_steps[0]]
    if not len(trained):
        raise StoreError(
            f"{store.path}: begins with a jump at step {jump_steps[0]}; expected steps of training"
            " before it"
        )
    return int(trained[-1])
