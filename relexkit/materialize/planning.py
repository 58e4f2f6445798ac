"""What to write for each target: weights over the recorded deltas, and the words that say how they
came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from relexkit.errors import StoreError
from relexkit.geometry.shape import decompose
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.gram_matrix.pca import pca_gram
from relexkit.predict.extrapolators import (
    check_request,
    method_of,
    name_of,
    predict_weights,
)
from relexkit.predict.fits import Options
from relexkit.predict.prediction import Prediction
from relexkit.store import TrajectoryStore, describe_steps
from relexkit.store.encodings.bits import content_checksum
from relexkit.version import __version__


@dataclass(frozen=True)
class Plan:
    """What will be written for one target: ``weights [N, T]`` over the deltas, and the words that
    say how they came about.
    """

    target: float
    weights: np.ndarray
    provenance: dict[str, Any]
    variance: float | None


def plan(
    store: TrajectoryStore, to: Sequence[float], prediction: Prediction, compute: Compute
) -> list[Plan]:
    """Weights and provenance for every target, in order, in every process of the team. See
    ``extrapolate``.
    """
    targets = [float(target) for target in dict.fromkeys(to)]
    check_request(targets, prediction)
    method, until = method_of(prediction.method), prediction.until
    _used_steps(store, until)
    observed = (
        pca_gram(store, until=until, compute=compute)
        if method.needs_gram
        else _shape_only(store).until(until)
    )
    return compute.team.share(lambda: _of_targets(store, targets, prediction, observed))


def _of_targets(
    store: TrajectoryStore, targets: list[float], prediction: Prediction, observed: Gram
) -> list[Plan]:
    method = method_of(prediction.method)
    used = _used_steps(store, prediction.until)
    weights = predict_weights(observed, targets, prediction)
    settings = {
        "method": name_of(prediction.method),
        **{name: getattr(prediction.options, name) for name in _in_order(method.options)},
        "scope": prediction.scope or method.scope,
        "scale": prediction.scale,
    }
    content = f"{content_checksum(store.checksums()[: len(used)].ravel().tolist()):08x}"
    with single_threaded_blas():
        variance = _variance(observed) if method.needs_gram else None
    return [
        Plan(
            target,
            weight,
            {
                "relexkit": __version__,
                "kind": "extrapolated",
                "target": target,
                **settings,
                "steps": used.tolist(),
                "content": content,
                "base": store.attributes["base"],
                "source": store.attributes["source"],
            },
            variance,
        )
        for target, weight in zip(targets, weights, strict=True)
    ]


def _used_steps(store: TrajectoryStore, until: int | None) -> np.ndarray:
    """The recorded steps up to ``until``.

    Raises:
        StoreError: there are none.
    """
    used = store.steps if until is None else store.steps[store.steps <= until]
    if not len(used):
        held = f"the store holds {describe_steps(store.steps)}"
        raise StoreError(
            f"{store.path}: holds no steps"
            if until is None
            else f"--until {until} keeps no step; {held}"
        )
    return used


def _shape_only(store: TrajectoryStore) -> Gram:
    """A stand-in for the Gram matrices, for methods whose weights depend on the steps alone."""
    tensors, num_steps = store.layout.moving_tensors, len(store.steps)
    identity = np.broadcast_to(np.eye(num_steps), (len(tensors), num_steps, num_steps))
    counts = np.zeros((len(tensors), num_steps), np.int64)
    sizes = np.array([t.numel for t in tensors], np.int64)
    return Gram(
        store.steps, tuple(t.name for t in tensors), sizes, identity, counts, counts, counts
    )


def _in_order(names: tuple[str, ...]) -> list[str]:
    return [field.name for field in fields(Options) if field.name in names]


def _variance(observed: Gram) -> float:
    """Share of the energy on each tensor's own first direction, over the whole model; NaN if
    nothing moved.
    """
    total = np.trace(observed.matrices, axis1=1, axis2=2)
    first = sum(
        float(decompose(m).singular_values[0] ** 2)
        for m, t in zip(observed.matrices, total, strict=True)
        if t > 0
    )
    return first / float(total.sum()) if total.sum() > 0 else float("nan")
