"""Predicted checkpoints: a folder for every target, all of them in one pass over the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from relexkit.gram_matrix.compute.distributed import ALONE
from relexkit.gram_matrix.compute.settings import DEFAULT, Compute
from relexkit.materialize.adapters import extrapolate_adapter
from relexkit.materialize.card import model_card
from relexkit.materialize.folders import FolderJob, PendingFolders, check_output, is_finished
from relexkit.materialize.output import AS_RECORDED, Output, Written
from relexkit.materialize.planning import Plan, plan
from relexkit.materialize.recorded import checkout
from relexkit.materialize.sharing import card_metadata
from relexkit.materialize.sums import stream_bits
from relexkit.materialize.versions import write_versions
from relexkit.predict.extrapolators import step_text
from relexkit.predict.prediction import PLAIN, Prediction
from relexkit.store import TrajectoryStore


def extrapolate(
    store: TrajectoryStore,
    to: Sequence[float],
    out: str | Path,
    prediction: Prediction = PLAIN,
    *,
    output: Output = AS_RECORDED,
    compute: Compute = DEFAULT,
) -> list[Written]:
    """Write a predicted checkpoint ``OUT/step-TARGET/`` for every target; each loads with
    ``from_pretrained``, or as a PEFT adapter onto the base if ``output.adapter`` is given.

    Args:
        to: target steps, in optimizer steps.
        prediction: method, options, scope, scale, and the last step to use.
        output: precision and kind of what is written; the result does not depend on how the work is
            cut.
        compute: how the Gram matrices are computed, see ``pca_gram``, and by which processes the
            folders are written: each writes shards of its own, the first one the rest.

    One pass over the deltas up to ``prediction.until`` for all targets together (and one for the
    Gram matrices if the store has none yet). Memory: the budget, whatever the number of steps and
    parameters; of an adapter the factors of one tensor over all steps, twice.

    Raises:
        ExtrapolationError: see ``predict_weights``.
        StoreError: damaged chunk, or the disk is full; nothing half-written is left. Or an adapter
            is asked for and the store holds none.
    """
    check_output(output.dtype, output.rounding)
    team = compute.team
    if output.sync is not None or output.adapter is not None:
        plan(store, to, prediction, compute)  # keeps the Gram matrices that all have computed
        alone = replace(compute, team=ALONE)
        return team.share(lambda: _by_one_process(store, to, out, prediction, output, alone))
    with team.together():
        plans = plan(store, to, prediction, compute)
        jobs, written = team.share(lambda: _jobs(store, plans, Path(out), output))
        todo = [p for p, w in zip(plans, written, strict=True) if not w.already]
        if todo:
            weights = np.stack([p.weights for p in todo])
            with PendingFolders(store, jobs, output.dtype, team) as folders:
                stream_bits(store, weights, output, folders.write, compute, folders.needed)
                folders.write_fixed()
    return written


def _jobs(
    store: TrajectoryStore, plans: Sequence[Plan], out: Path, output: Output
) -> tuple[list[FolderJob], list[Written]]:
    """The folders to be written, and those of all targets."""
    metadata = card_metadata(store, "finetune", ("relexkit", "extrapolated"))
    jobs, written = [], []
    for planned in plans:
        provenance = {
            **planned.provenance,
            "dtype": output.dtype or "as recorded",
            "rounding": output.rounding,
            "seed": output.seed,
        }
        folder = out / f"step-{step_text(planned.target)}"
        written.append(Written(planned.target, folder, is_finished(folder, provenance)))
        if not written[-1].already:
            card = model_card(provenance, planned.variance, metadata)
            jobs.append(FolderJob(folder, provenance, card))
    return jobs, written


def _by_one_process(
    store: TrajectoryStore,
    to: Sequence[float],
    out: str | Path,
    prediction: Prediction,
    output: Output,
    compute: Compute,
) -> list[Written]:
    """Adapters, which are small, and versions, each against the one before."""
    if output.sync is None:
        assert output.adapter is not None
        return extrapolate_adapter(store, to, out, prediction, output.adapter, compute)
    made: list[Written] = []

    def make(scratch: Path) -> list[Path]:
        plain = replace(output, sync=None)
        made.extend(extrapolate(store, to, scratch, prediction, output=plain, compute=compute))
        return [one.folder for one in made]

    versions = write_versions(output.sync, Path(out), partial(checkout, store), make)
    return [Written(p.target, v.folder, v.already) for p, v in zip(made, versions, strict=True)]
