"""What writes checkpoints, changes a model in memory, or reads everything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relexkit.calls.questions import directions
from relexkit.calls.source import Source, of_run, store_of
from relexkit.gram_matrix.compute.settings import DEFAULT, Compute
from relexkit.gram_matrix.jumps import attempts
from relexkit.materialize import alignment, in_place, predicted, recorded, sharing
from relexkit.materialize.directions import Directions
from relexkit.results import Table
from relexkit.store import ProgressCallback
from relexkit.store.summary import summary

apply = of_run(in_place.apply)
apply_step = of_run(in_place.apply_step)
checkout = of_run(recorded.checkout)
extrapolate = of_run(predicted.extrapolate)
mergekit_config = of_run(sharing.mergekit_config)


def info(source: Source) -> Table:
    """What a store holds: ``document`` is what ``relexkit info --json`` prints.

    Raises:
        StoreError: there is no store, or one that this version cannot read.
    """
    store = store_of(source)
    decided = [attempt.document() for attempt in attempts(store)]
    document = summary(store) | {"jumps": decided}
    plain = {k: v for k, v in document.items() if isinstance(v, str | int | bool)}
    return Table(document, [{"what": name, "value": value} for name, value in plain.items()])


def verify(source: Source, *, progress: ProgressCallback | None = None) -> None:
    """Read every chunk of a store and compare it with its checksums. One pass, flat memory.

    Raises:
        StoreError: the first damaged place, by step and tensor.
    """
    store_of(source).verify(progress)


def project(
    source: Source | Directions,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    count: int = 2,
    scope: str = "tensor",
    until: int | None = None,
    compute: Compute = DEFAULT,
) -> alignment.Projection:
    """Any checkpoint of the same model along the principal directions of a run.

    Args:
        checkpoint: a folder in any format that can be imported, or arrays by name (a PyTorch
            ``state_dict`` too).

    Raises:
        RelexkitError: the checkpoint lacks a tensor or has it with another shape.
    """
    if not isinstance(source, Directions):
        source = directions(source, count=count, scope=scope, until=until, compute=compute)
    return alignment.project(source, checkpoint)
