"""Principal update directions as safetensors files: the right singular vectors that PCA from a Gram
matrix never needs.

``v_k = M^T u_k / sigma_k`` in one pass for all of them. A file holds ``c_k v_k`` with ``c_k`` the
coefficient of the last step: added to the base once, it moves the model to where that step stands
along the direction, which tools call a task vector.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.geometry.shape import center, decompose
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.gram_matrix.lowrank.randomized import wanted_components
from relexkit.materialize.folders import PROVENANCE, is_finished, temporary_folder
from relexkit.materialize.sums import stream_sums
from relexkit.store import ProgressCallback, TrajectoryStore
from relexkit.version import __version__
from relexkit.weights.layout import Segment
from relexkit.weights.safetensors_io import SafetensorsFolderWriter, TensorInfo


def write_directions(
    store: TrajectoryStore,
    gram: Gram,
    out: str | Path,
    *,
    count: int = 2,
    scope: str = "tensor",
    centered: bool = False,
    memory_budget_bytes: int = 2**28,
    progress: ProgressCallback | None = None,
) -> list[Path]:
    """Write ``out/direction-K.safetensors`` for the first ``count`` directions; returns their
    paths.

    A file has every moving tensor, float32, in the model's shapes: ``state[name] += alpha *
    file[name]``. The directions are those of each group of ``scope``; orthogonal to each other
    within a group. A group with fewer directions gets zeros. ``relexkit.json`` beside them gives
    singular values, ratios and coefficients of every group. Tied tensors appear once.

    Args:
        gram: of ``store``, per tensor, up to the last step to use.
        centered: directions about the mean checkpoint instead of the base.

    One pass over the deltas. Memory: the budget.

    Raises:
        RelexkitError: more directions than steps, or something else is at ``out``.
        StoreError: a damaged chunk, or the disk is full; nothing half-written is left.
    """
    count = wanted_components(count, len(gram.steps))
    folder, names = Path(out), [f"direction-{k + 1}" for k in range(count)]
    weights, groups = _weights(gram, count, scope, centered)
    provenance = {
        "relexkit": __version__,
        "kind": "principal update directions",
        "scope": scope,
        "centered": centered,
        "steps": gram.steps.tolist(),
        "base": store.attributes["base"],
        "source": store.attributes["source"],
        "groups": groups,
    }
    paths = [folder / f"{name}.safetensors" for name in names]
    if is_finished(folder, provenance):
        return paths
    tensors = {t.name: TensorInfo(t.shape, "float32") for t in store.layout.moving_tensors}
    with temporary_folder(folder) as temporary, ExitStack() as stack:
        writers = []
        for name in names:
            told = {
                "kind": provenance["kind"],
                "direction": name,
                "scope": scope,
                "relexkit": __version__,
            }
            writers.append(
                stack.enter_context(
                    closing(SafetensorsFolderWriter(temporary, tensors, 2**62, name, told))
                )
            )

        def consume(index: int, segment: Segment, values: np.ndarray) -> None:
            writers[index].write(segment.tensor.name, segment.start, values)

        stream_sums(store, weights, consume, memory_budget_bytes, progress, onto_base=False)
        (temporary / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return paths


def _weights(
    gram: Gram, count: int, scope: str, centered: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Weights ``[count, N, T]`` over the deltas, ``u_k`` times its last entry, and what to say
    about every group.
    """
    scoped, group_of = gram.scoped(scope), gram.groups(scope)
    weights = np.zeros((count, len(gram.names), len(gram.steps)))
    told = {}
    with single_threaded_blas():
        for name, matrix in zip(scoped.names, scoped.matrices, strict=True):
            parts = decompose(center(matrix) if centered else matrix)
            kept = min(count, len(parts.singular_values))
            rows = [row for row, group in enumerate(group_of) if group == name]
            # c_k v_k = u_k[-1] sigma_k (M^T u_k / sigma_k)
            weights[:kept, rows] = (parts.left[:, :kept] * parts.left[-1, :kept]).T[:, None]
            told[name] = {
                "singular_values": parts.singular_values[:kept].tolist(),
                "explained_variance_ratio": parts.explained_variance_ratio[:kept].tolist(),
                "coefficients": parts.coefficients[:, :kept].T.tolist(),
            }
    return weights, told
