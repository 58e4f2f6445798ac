"""Principal update directions as arrays and as safetensors files: the right singular vectors that
PCA from a Gram matrix never needs.

``v_k = M^T u_k / sigma_k``, one pass for all of them. A direction has one of two norms:

- ``unit``: ``v_k``, length 1 over the tensors of its group;
- ``task``: ``c_k v_k`` with ``c_k`` the coefficient of the last step. Added to the base once, it
  moves the model to where that step stands along the direction, which tools call a task vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.geometry.shape import Decomposition, center, decompose
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.gram_matrix.lowrank.randomized import wanted_components
from relexkit.materialize.folders import PROVENANCE, is_finished, temporary_folder
from relexkit.materialize.sums import stream_sums
from relexkit.materialize.tensors import moving_tensor, tensor_sums
from relexkit.results import Result
from relexkit.store import ProgressCallback, TrajectoryStore
from relexkit.version import __version__
from relexkit.weights.layout import Segment
from relexkit.weights.safetensors_io import SafetensorsFolderWriter, TensorInfo

Norm = Literal["unit", "task"]

_NORMS = {
    "unit": "1 over the tensors of a group",
    "task": "the coefficient of the last step: added to the base once, a task vector",
}


@dataclass(frozen=True, repr=False)
class Directions(Result):
    """The first K principal directions of every group of a scope, orthogonal within a group.

    Each sign is such that the last step's coefficient is positive. A group with fewer than K has
    zeros in place of the others.

    Attributes:
        store: whose deltas they are made of.
        steps: ``int64 [T]``.
        scope, centered: as asked for; about the mean checkpoint instead of the base.
        groups: name of every group -> its decomposition.
        group_of: the group of each of the N moving tensors.
        count: K.
    """

    store: TrajectoryStore
    steps: np.ndarray
    scope: str
    centered: bool
    groups: dict[str, Decomposition]
    group_of: tuple[str, ...]
    count: int

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group and direction: its share of the variance, and the last step's
        coefficient, which is the norm of its task vector.
        """
        return [
            {
                "group": name,
                "direction": k + 1,
                "singular_value": float(parts.singular_values[k]),
                "explained_variance_ratio": float(parts.explained_variance_ratio[k]),
                "coefficient": float(parts.coefficients[-1, k]),
            }
            for name, parts in self.groups.items()
            for k in range(min(self.count, len(parts.singular_values)))
        ]

    def sentences(self) -> list[str]:
        """What they are."""
        about = "the mean checkpoint" if self.centered else "the base"
        return [f"{self.count} directions per {self.scope} about {about}, {len(self.steps)} steps."]

    def weights(self, norm: Norm = "unit") -> np.ndarray:
        """The directions as weights over the recorded deltas, ``float64 [K, N, T]``.

        Raises:
            RelexkitError: another norm.
        """
        if norm not in _NORMS:
            raise RelexkitError(f"norm {norm!r} is unknown; choose one of {', '.join(_NORMS)}")
        weights = np.zeros((self.count, len(self.group_of), len(self.steps)))
        for row, group in enumerate(self.group_of):
            parts = self.groups[group]
            kept = min(self.count, len(parts.singular_values))
            left = parts.left[:, :kept]
            # v_k = M^T u_k / sigma_k; c_k v_k with c_k = u_k[-1] sigma_k
            scale = 1 / parts.singular_values[:kept] if norm == "unit" else left[-1]
            weights[:kept, row] = (left * scale).T
        return weights

    def vector(self, tensor: str, number: int = 1, *, norm: Norm = "unit") -> np.ndarray:
        """A tensor's piece of direction ``number``, float32 in the tensor's shape. With scope
        ``tensor`` and norm ``unit`` it has length 1. Reads the tensor's part of the store.

        Raises:
            RelexkitError: no such float tensor or direction.
        """
        if not 1 <= number <= self.count:
            raise RelexkitError(f"direction {number}: there are {self.count}; expected 1 to these")
        names = [t.name for t in self.store.layout.moving_tensors]
        row = names.index(moving_tensor(self.store, tensor).name)
        return tensor_sums(self.store, tensor, self.weights(norm)[number - 1, row][None])[0]

    def vectors(self, number: int = 1, *, norm: Norm = "unit") -> dict[str, np.ndarray]:
        """Direction ``number`` of every moving tensor, float32 in their shapes. One pass; memory:
        the model in float32.
        """
        if not 1 <= number <= self.count:
            raise RelexkitError(f"direction {number}: there are {self.count}; expected 1 to these")
        flat = {t.name: np.zeros(t.numel, np.float32) for t in self.store.layout.moving_tensors}

        def consume(_: int, segment: Segment, values: np.ndarray) -> None:
            flat[segment.tensor.name][segment.start : segment.start + segment.numel] = values

        self.stream(self.weights(norm)[number - 1 : number], consume)
        return {t.name: flat[t.name].reshape(t.shape) for t in self.store.layout.moving_tensors}

    def stream(
        self,
        weights: np.ndarray,
        consume: Callable[[int, Segment, np.ndarray], None],
        *,
        memory_budget_bytes: int = 2**28,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Pass ``M^T a`` of every row of ``weights [P, N, T]`` to ``consume``; see
        ``stream_sums``.
        """
        stream_sums(self.store, weights, consume, memory_budget_bytes, progress, onto_base=False)

    def write(
        self,
        out: str | Path,
        *,
        norm: Norm = "task",
        memory_budget_bytes: int = 2**28,
        progress: ProgressCallback | None = None,
    ) -> list[Path]:
        """Write ``out/direction-K.safetensors`` for every direction; returns their paths.

        A file has every moving tensor, float32, in the model's shapes: ``state[name] += alpha *
        file[name]``; tied tensors appear once. Its metadata and ``relexkit.json`` beside it say the
        norm; that file also has singular values, ratios and coefficients of every group.

        One pass over the deltas. Memory: the budget.

        Raises:
            RelexkitError: something else is at ``out``.
            StoreError: a damaged chunk, or the disk is full; nothing half-written is left.
        """
        weights = self.weights(norm)
        folder, names = Path(out), [f"direction-{k + 1}" for k in range(self.count)]
        provenance = self._provenance(norm)
        paths = [folder / f"{name}.safetensors" for name in names]
        if is_finished(folder, provenance):
            return paths
        tensors = {t.name: TensorInfo(t.shape, "float32") for t in self.store.layout.moving_tensors}
        told = {key: str(provenance[key]) for key in ("kind", "scope", "norm", "relexkit")}
        with temporary_folder(folder) as temporary, ExitStack() as stack:
            writers = [
                stack.enter_context(
                    closing(
                        SafetensorsFolderWriter(
                            temporary, tensors, 2**62, name, told | {"direction": name}
                        )
                    )
                )
                for name in names
            ]

            def consume(index: int, segment: Segment, values: np.ndarray) -> None:
                writers[index].write(segment.tensor.name, segment.start, values)

            self.stream(
                weights, consume, memory_budget_bytes=memory_budget_bytes, progress=progress
            )
            (temporary / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
        return paths

    def _provenance(self, norm: Norm) -> dict[str, Any]:
        return {
            "relexkit": __version__,
            "kind": "principal update directions",
            "norm": f"{norm}: {_NORMS[norm]}",
            "scope": self.scope,
            "centered": self.centered,
            "steps": self.steps.tolist(),
            "base": self.store.attributes["base"],
            "source": self.store.attributes["source"],
            "groups": {
                name: {
                    "singular_values": parts.singular_values[: self.count].tolist(),
                    "explained_variance_ratio": (
                        parts.explained_variance_ratio[: self.count].tolist()
                    ),
                    "coefficients": parts.coefficients[:, : self.count].T.tolist(),
                }
                for name, parts in self.groups.items()
            },
        }


def find_directions(
    store: TrajectoryStore,
    gram: Gram,
    *,
    count: int = 2,
    scope: str = "tensor",
    centered: bool = False,
) -> Directions:
    """The first ``count`` directions of every group of ``scope``. Reads no weights.

    Args:
        gram: of ``store``, per tensor, up to the last step to use.
        centered: directions about the mean checkpoint instead of the base.

    Raises:
        RelexkitError: more directions than steps.
    """
    count = wanted_components(count, len(gram.steps))
    scoped = gram.scoped(scope)
    about = center(scoped.matrices) if centered else scoped.matrices
    with single_threaded_blas():
        groups = {n: decompose(m, count) for n, m in zip(scoped.names, about, strict=True)}
    return Directions(store, gram.steps, scope, centered, groups, tuple(gram.groups(scope)), count)
