"""Predicted checkpoints: a folder for every target, all of them in one pass over the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relexkit.gram_matrix.compute.distributed import ALONE, Team
from relexkit.materialize.card import model_card
from relexkit.materialize.folders import FolderJob, PendingFolders, check_output, is_finished
from relexkit.materialize.planning import plan
from relexkit.materialize.sums import stream_sums
from relexkit.predict.extrapolators import step_text
from relexkit.predict.fits import Options
from relexkit.store import ProgressCallback, TrajectoryStore
from relexkit.weights.dtypes import Rounding, round_bits
from relexkit.weights.layout import Segment


@dataclass(frozen=True)
class Prediction:
    """What ``extrapolate`` wrote for one target: the folder, and whether it was there already."""

    target: float
    folder: Path
    already: bool


def extrapolate(
    store: TrajectoryStore,
    to: Sequence[float],
    out: str | Path,
    *,
    until: int | None = None,
    method: str = "relex",
    options: Options | None = None,
    scope: str | None = None,
    scale: float = 1.0,
    dtype: str | None = None,
    rounding: Rounding = "stochastic",
    seed: int = 0,
    pca: str = "exact",
    components: int | None = None,
    device: str = "cpu",
    team: Team = ALONE,
    memory_budget_bytes: int = 2**28,
    progress: ProgressCallback | None = None,
) -> list[Prediction]:
    """Write a predicted checkpoint ``OUT/step-TARGET/`` for every target; each loads with
    ``from_pretrained``.

    Args:
        to: target steps, in optimizer steps.
        until: use only steps up to this one.
        method, options, scope, scale: see ``predict_weights``.
        dtype: of the output; the recorded one if not given. 16-bit outputs are rounded
            stochastically unless ``rounding`` is ``nearest``: nearest rounding erases motion below
            half a unit in the last place.
        seed: of the stochastic rounding; the result does not depend on how the work is cut.
        pca, components, device, team: how the Gram matrices are found, see ``pca_gram``. The first
            process writes.

    One pass over the deltas up to ``until`` for all targets together (and one for the Gram matrices
    if the store has none yet). Memory: the budget, whatever the number of steps and parameters.

    Raises:
        ExtrapolationError: see ``predict_weights``.
        StoreError: damaged chunk, or the disk is full; nothing half-written is left.
    """
    check_output(dtype, rounding)
    plans = plan(
        store,
        to,
        until=until,
        method=method,
        options=options,
        scope=scope,
        scale=scale,
        pca=pca,
        components=components,
        device=device,
        team=team,
        memory_budget_bytes=memory_budget_bytes,
        progress=progress,
    )
    weights, jobs, predictions = [], [], []
    for planned in plans:
        provenance = {
            **planned.provenance,
            "dtype": dtype or "as recorded",
            "rounding": rounding,
            "seed": seed,
        }
        folder = Path(out) / f"step-{step_text(planned.target)}"
        already = is_finished(folder, provenance)
        predictions.append(Prediction(planned.target, folder, already))
        if not already:
            weights.append(planned.weights)
            jobs.append(FolderJob(folder, provenance, model_card(provenance, planned.variance)))
    if jobs:
        with PendingFolders(store, jobs, dtype) as writers:

            def consume(index: int, segment: Segment, values: np.ndarray) -> None:
                name, start = segment.tensor.name, segment.start
                bits = round_bits(
                    values,
                    dtype or segment.tensor.dtype,
                    rounding,
                    seed=seed,
                    tensor=name,
                    start=start,
                )
                writers.write(index, segment, bits)

            stream_sums(store, np.stack(weights), consume, memory_budget_bytes, progress)
            writers.write_fixed()
    return predictions
