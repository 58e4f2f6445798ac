"""Is this the run that a store holds? Every step that both have is compared, in samples of where
the run moves, so that a branch that was written anew after a resume is never mixed with the old.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from relexkit.checkpoints.protocol import Run
from relexkit.checkpoints.same_tensors import check_tensors
from relexkit.errors import CheckpointError
from relexkit.ingest.columns import Columns, Replay
from relexkit.store import TrajectoryStore, blocks
from relexkit.store.encodings.bits import BLOCK
from relexkit.store.encodings.protocol import Place

_MOST_CHANGED, _SPREAD = 4, 3
"""Blocks of ``BLOCK`` elements of a part that are compared: those that the run changes most, and
some spread evenly.
"""


@dataclass(frozen=True)
class Comparison:
    """Steps that the store and the run both have, by whether they hold the same, ascending."""

    equal: list[int]
    different: list[int]

    def last_agreeing(self) -> int:
        """The last equal step before the first different one; 0 if there is none."""
        end = min(self.different, default=max(self.equal, default=0) + 1)
        return max((step for step in self.equal if step < end), default=0)


def compare_steps(store: TrajectoryStore, run: Run, after: int = 0) -> Comparison:
    """Compare every step after ``after`` that both have.

    Reads headers and a few blocks of every part of each such checkpoint, and the same of the store.
    """
    common = [int(s) for s in store.steps if int(s) in run.steps and s > after]
    spans = {part: _sample(store, part) for part in range(len(store.layout.parts)) if common}
    replay = Replay(store, spans)
    expected = {t.name: (t.shape, t.dtype) for t in store.layout.tensors}
    compared = Comparison([], [])
    for step in common:
        replay.advance(store.row_of(step))
        where = f"step {step}"
        with closing(run.checkpoint(step)) as checkpoint:
            check_tensors(expected, checkpoint, f"the store {store.path}", where)
            columns = Columns(checkpoint, store.layout, where)
            same = all(
                replay.equals(part, span, columns)
                for part, pieces in spans.items()
                for span in pieces
            )
        (compared.equal if same else compared.different).append(step)
    return compared


def check_branch(
    store: TrajectoryStore,
    run: Run,
    comparison: Comparison,
    new: Sequence[int],
    *,
    rewind: bool,
    continues: bool,
) -> list[str]:
    """Refuse to add ``new`` steps to a store of another run, or of another branch of this one;
    returns what a person should know.

    Raises:
        CheckpointError: steps differ, or no step is shared; with what to do.
    """
    if comparison.different and not (rewind and comparison.last_agreeing()):
        several = len(comparison.different) > 1
        differ = "differ from those" if several else "differs from the one"
        what = f"{_steps(comparison.different)} of the run {differ} recorded in {store.path}"
        if not comparison.last_agreeing():
            raise CheckpointError(f"{what}: this is another run; choose another -o")
        raise CheckpointError(
            f"{what}, though step {comparison.last_agreeing()} is the same: the run was resumed and"
            " written anew from there; give --rewind to replace what was recorded after it, or"
            " choose another -o"
        )
    recorded = [int(s) for s in store.steps]
    if new and recorded and not comparison.equal and not continues:
        raise CheckpointError(
            f"{run.description} shares no step with {store.path}, which ends at step"
            f" {recorded[-1]}: another run with the same base would look like this; give --continue"
            " if it goes on from there, or choose another -o"
        )
    gone = [
        s for s in recorded if s > max(comparison.equal, default=recorded[-1] if recorded else 0)
    ]
    if new and gone and not rewind:
        are = "are" if len(gone) > 1 else "is"
        return [
            f"{_steps(gone)}, recorded before, {are} not in the run any more: if it was"
            f" resumed from step {max(comparison.equal)}, import it into a new store"
        ]
    return []


def is_base_throughout(store: TrajectoryStore) -> bool:
    """True if every recorded step equals the base bit for bit. Stops at the first difference."""
    touched = [
        part for part in range(len(store.layout.parts)) if store.encoding(part).touched(store, part)
    ]
    for part in touched:  # a log has no empty entries, and an adapter without effect is refused
        if store.encoding(part).is_log or store.layout.parts[part].factors is not None:
            return False
    for row in reversed(range(len(store.steps))):
        for part in touched:
            for begin, end in blocks(store.layout.parts[part].numel, BLOCK):
                base = store.read_base(part, begin, end)
                place = Place(part, row, begin, end)
                if not store.encoding(part).equals(store, place, base):
                    return False
    return True


def _sample(store: TrajectoryStore, part: int) -> list[tuple[int, int]]:
    spec = store.layout.parts[part]
    if not spec.moves or not spec.numel:
        return []
    if spec.factors is not None:
        return [(0, spec.numel)]
    count = -(-spec.numel // BLOCK)
    chosen = set(np.linspace(0, count - 1, min(count, _SPREAD)).round().astype(int).tolist())
    if store.encoding(part).is_log and len(store.steps):
        entries = store.entries(part, len(store.steps))
        chosen |= set(np.argsort(-entries, kind="stable")[:_MOST_CHANGED].tolist())
    return [(b * BLOCK, min((b + 1) * BLOCK, spec.numel)) for b in sorted(chosen)]


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:5])
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    return f"step{'s' * (len(steps) > 1)} {shown}{more}"
