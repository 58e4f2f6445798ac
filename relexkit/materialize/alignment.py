"""How other weights lie relative to the principal directions of a run: a checkpoint projected on
them, and the directions of two runs against each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints import open_checkpoint
from relexkit.errors import RelexkitError
from relexkit.materialize.directions import Directions
from relexkit.materialize.tensors import tensor_sums
from relexkit.results import Result
from relexkit.weights.dtypes import bits_dtype, to_float32
from relexkit.weights.layout import Segment, TensorSpec

Piece = Callable[[TensorSpec, int, int], np.ndarray]
"""``(tensor, start, numel) -> float32 [numel]`` of the weights that are projected."""


@dataclass(frozen=True, repr=False)
class Projection(Result):
    """A checkpoint seen from G groups of directions.

    Attributes:
        groups: G names.
        coefficients: ``float64 [G, K]``, of its delta from the run's base along each direction, in
            the units of the weights, comparable with those of the run's own steps.
        norms: ``float64 [G]``, length of its delta.
    """

    groups: tuple[str, ...]
    coefficients: np.ndarray
    norms: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """Share of the delta's squared length inside the directions, ``[G]``; NaN where it is
        zero.
        """
        with np.errstate(invalid="ignore"):
            return (self.coefficients**2).sum(axis=1) / self.norms**2

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group."""
        return [
            {
                "group": name,
                **{f"coefficient_{k + 1}": float(value) for k, value in enumerate(along)},
                "distance": float(norm),
                "inside": float(inside),
            }
            for name, along, norm, inside in zip(
                self.groups, self.coefficients, self.norms, self.inside, strict=True
            )
        ]

    def sentences(self) -> list[str]:
        """Over all groups."""
        whole = (self.coefficients**2).sum() / max(float((self.norms**2).sum()), 1e-300)
        return [
            f"{100 * whole:.1f} % of the checkpoint's squared distance from the base lies inside"
            " the directions."
        ]


@dataclass(frozen=True, repr=False)
class Alignment(Result):
    """The directions of two runs of one model against each other.

    Attributes:
        groups: G names.
        cosines: ``float64 [G, K, L]``, between direction k of the first run and l of the second;
            both have the sign of their own last step. NaN where one has fewer.
        chance: ``float64 [G]``, typical size of a cosine between unrelated directions,
            ``1 / sqrt(parameters)``.
    """

    groups: tuple[str, ...]
    cosines: np.ndarray
    chance: np.ndarray

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group: cosines of the directions with the same number."""
        count = min(self.cosines.shape[1:])
        return [
            {
                "group": name,
                **{f"cosine_{k + 1}": float(cosines[k, k]) for k in range(count)},
                "chance": float(chance),
            }
            for name, cosines, chance in zip(self.groups, self.cosines, self.chance, strict=True)
        ]

    def sentences(self) -> list[str]:
        """The first directions over all groups."""
        first = self.cosines[:, 0, 0]
        known = first[np.isfinite(first)]
        median = f"{np.median(known):.3f}" if len(known) else "unknown"
        return [
            f"First directions: median cosine {median} over {len(self.groups)} groups; unrelated"
            f" ones have about {np.median(self.chance):.1g}."
        ]


def project(directions: Directions, checkpoint: str | Path | Mapping[str, Any]) -> Projection:
    """Coefficients of any checkpoint of the same model along the directions of a run.

    Args:
        checkpoint: a folder in any format that can be imported, or arrays by name (a PyTorch
            ``state_dict`` too). A tied tensor may have either name.

    One pass over the deltas; memory: a few hundred MB.

    Raises:
        RelexkitError: the checkpoint lacks a tensor or has it with another shape.
    """
    if isinstance(checkpoint, Mapping):
        return _project(directions, _from_arrays(directions, checkpoint))
    with closing(open_checkpoint(Path(checkpoint))) as opened:
        lock = threading.Lock()

        def piece(tensor: TensorSpec, start: int, numel: int) -> np.ndarray:
            info = opened.tensors[_name_in(directions, tensor, opened.tensors)]
            bits = np.empty(numel, bits_dtype(info.dtype))
            with lock:  # readers are not made for several threads
                opened.read_into(_name_in(directions, tensor, opened.tensors), start, bits)
            return to_float32(bits, info.dtype)

        shapes = {n: tuple(i.shape) for n, i in opened.tensors.items()}
        _check_shapes(directions, shapes)
        return _project(directions, piece)


def align(first: Directions, second: Directions) -> Alignment:
    """Cosines between the directions of two runs of one model, group by group.

    One pass over the deltas of each; memory: the directions of the largest tensor, of both.

    Raises:
        RelexkitError: the runs have other tensors or shapes, or the scopes differ.
    """
    if first.scope != second.scope:
        raise RelexkitError(
            f"directions per {first.scope} and per {second.scope} cannot be compared; use one scope"
        )
    mine, other = first.store.layout.moving_tensors, second.store.layout.moving_tensors
    if {t.name: t.shape for t in mine} != {t.name: t.shape for t in other}:
        raise RelexkitError(
            f"{first.store.path} and {second.store.path} have different tensors; expected runs of"
            " one model"
        )
    a, b, groups = first.weights(), second.weights(), tuple(first.groups)
    cosines = np.zeros((len(groups), len(a), len(b)))
    sizes = np.zeros(len(groups))
    rows = {t.name: row for row, t in enumerate(other)}
    for row, tensor in enumerate(mine):
        group = groups.index(first.group_of[row])
        left = tensor_sums(first.store, tensor.name, a[:, row]).reshape(len(a), -1)
        right = tensor_sums(second.store, tensor.name, b[:, rows[tensor.name]])
        cosines[group] += left.astype(np.float64) @ right.reshape(len(b), -1).T
        sizes[group] += tensor.numel
    for group, name in enumerate(groups):
        cosines[group, len(first.groups[name].singular_values) :] = np.nan
        cosines[group, :, len(second.groups[name].singular_values) :] = np.nan
    return Alignment(groups, cosines, 1 / np.sqrt(np.maximum(sizes, 1)))


def _project(directions: Directions, piece: Piece) -> Projection:
    store, weights = directions.store, directions.weights()
    row_of = {t.name: row for row, t in enumerate(store.layout.moving_tensors)}
    along = np.zeros((len(row_of), len(weights)))
    squares = np.zeros(len(row_of))
    lock = threading.Lock()

    def consume(index: int, segment: Segment, values: np.ndarray) -> None:
        bits = store.read_base(segment.part, segment.offset, segment.offset + segment.numel)
        there = piece(segment.tensor, segment.start, segment.numel)
        delta = there.astype(np.float64) - to_float32(bits, segment.tensor.dtype)
        row, projection = row_of[segment.tensor.name], float(values @ delta)
        with lock:
            along[row, index] += projection
            squares[row] += float(delta @ delta) if index == 0 else 0.0

    directions.stream(weights, consume)
    groups = tuple(directions.groups)
    index = np.array([groups.index(group) for group in directions.group_of])
    coefficients, norms = np.zeros((len(groups), len(weights))), np.zeros(len(groups))
    np.add.at(coefficients, index, along)
    np.add.at(norms, index, squares)
    return Projection(groups, coefficients, np.sqrt(norms))


def _from_arrays(directions: Directions, arrays: Mapping[str, Any]) -> Piece:
    _check_shapes(directions, {name: tuple(value.shape) for name, value in arrays.items()})

    def piece(tensor: TensorSpec, start: int, numel: int) -> np.ndarray:
        value = arrays[_name_in(directions, tensor, arrays)].reshape(-1)[start : start + numel]
        if hasattr(value, "detach"):  # PyTorch; NumPy has no bfloat16
            value = value.detach().float().cpu().numpy()
        return np.asarray(value, np.float32)

    return piece


def _name_in(directions: Directions, tensor: TensorSpec, there: Mapping[str, Any]) -> str:
    aliases = directions.store.layout.aliases().get(tensor.name, ())
    for name in (tensor.name, *aliases):
        if name in there:
            return name
    raise RelexkitError(
        f"the checkpoint lacks tensor {tensor.name!r} of {directions.store.path}; expected a"
        " checkpoint of the same model"
    )


def _check_shapes(directions: Directions, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for tensor in directions.store.layout.moving_tensors:
        name = _name_in(directions, tensor, shapes)
        if shapes[name] != tensor.shape:
            raise RelexkitError(
                f"tensor {name!r} of the checkpoint has shape {list(shapes[name])}; expected"
                f" {list(tensor.shape)} as in {directions.store.path}"
            )
