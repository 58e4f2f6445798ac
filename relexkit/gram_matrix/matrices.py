"""Gram matrices of a run as a value: of tensors or groups of them, cut to a prefix of the steps,
summed over scopes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.results import Result
from relexkit.store import describe_steps
from relexkit.weights.layout import scope_of

ROUNDING_ERROR = 1e-6
"""Error of an exact Gram matrix as a share of its trace: products of at most 8192 columns are
summed in float32.
"""


@dataclass(frozen=True, repr=False)
class Gram(Result):
    """Gram matrices of a set of tensors, or of groups of tensors.

    Attributes:
        steps: ``int64 [T]``, real optimizer steps.
        names: N names of tensors or groups.
        num_parameters: ``int64 [N]``.
        matrices: ``float64 [N, T, T]``.
        changed: ``int64 [N, T]``, weights that differ from the previous recorded step.
        moved: ``int64 [N, T]``, weights that differ from the base.
        unit_moves: ``int64 [N, T]``, weights that moved by exactly one unit in the last place since
            the previous step, or -1 where the encoding does not keep bit patterns.
        uncertainty: ``float64 [N, T]``: for the leading ``n x n`` block, how far it may be off
            along its first two directions, in the spectral norm: rounding, and for a randomized
            result the estimated error of the approximation. Taken as rounding alone if not given.
        rates: learning rate of every optimizer step, in any unit, ``float64 [S]``, possibly past
            the last recorded one (``relexkit.gram_matrix.rates``); None if constant or unknown.
        momentum: of a stretch inside a run, that of the optimizer as earlier steps tell it
            (``fit_trajectory``); None if unknown.
    """

    steps: np.ndarray
    names: tuple[str, ...]
    num_parameters: np.ndarray
    matrices: np.ndarray
    changed: np.ndarray
    moved: np.ndarray
    unit_moves: np.ndarray
    uncertainty: np.ndarray = field(default_factory=lambda: np.empty(0))
    rates: np.ndarray | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        if not self.uncertainty.size:
            object.__setattr__(self, "uncertainty", rounding_error(self.matrices))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each tensor or group: its energy, and how far it stands from the base at the
        last step.
        """
        energy, last = np.trace(self.matrices, axis1=1, axis2=2), self.matrices[:, -1, -1]
        sizes = self.num_parameters.tolist()
        return [
            {"name": n, "parameters": size, "energy": float(e), "distance": float(np.sqrt(d))}
            for n, size, e, d in zip(self.names, sizes, energy, last, strict=True)
        ]

    def sentences(self) -> list[str]:
        """Which steps."""
        return [f"{len(self.names)} Gram matrices over {describe_steps(self.steps)}."]

    @cached_property
    def whole(self) -> np.ndarray:
        """The sum of all matrices, ``float64 [T, T]``: the Gram matrix of the run, computed once
        for all of its prefixes.
        """
        total: np.ndarray = self.matrices.sum(axis=0)
        return total

    def until(self, step: int | None) -> Gram:
        """The prefix of the run up to and including ``step``: leading blocks, no copy.

        Raises:
            RelexkitError: no recorded step is that early.
        """
        if step is None:
            return self
        count = int(np.searchsorted(self.steps, step, side="right"))
        if count == 0:
            raise RelexkitError(
                f"--until {step} keeps no step; the store holds {describe_steps(self.steps)}"
            )
        cut = replace(
            self,
            steps=self.steps[:count],
            matrices=self.matrices[:, :count, :count],
            changed=self.changed[:, :count],
            moved=self.moved[:, :count],
            unit_moves=self.unit_moves[:, :count],
            uncertainty=self.uncertainty[:, :count],
        )
        if "whole" in vars(self):
            vars(cut)["whole"] = self.whole[:count, :count]
        return cut

    def only(self, rows: np.ndarray) -> Gram:
        """Some of the N tensors or groups, by their rows."""
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            num_parameters=self.num_parameters[rows],
            matrices=self.matrices[rows],
            changed=self.changed[rows],
            moved=self.moved[rows],
            unit_moves=self.unit_moves[rows],
            uncertainty=self.uncertainty[rows],
        )

    def scoped(self, scope: str) -> Gram:
        """Sums over the groups of ``scope`` (``tensor``, ``layer``, ``module`` or ``global``), in
        order of appearance.
        """
        if scope == "tensor":
            return self
        group_of = self.groups(scope)
        names = tuple(dict.fromkeys(group_of))
        index = np.array([names.index(g) for g in group_of], dtype=np.int64)

        def add(values: np.ndarray) -> np.ndarray:
            total = np.zeros((len(names), *values.shape[1:]), values.dtype)
            for group, value in zip(index, values, strict=True):
                total[group] += value
            return total

        unit = add(self.unit_moves)
        unit[np.isin(np.arange(len(names)), index[(self.unit_moves < 0).any(axis=1)])] = -1
        return replace(
            self,
            names=names,
            num_parameters=add(self.num_parameters),
            matrices=self.whole[None] if len(names) == 1 else add(self.matrices),
            changed=add(self.changed),
            moved=add(self.moved),
            unit_moves=unit,
            uncertainty=add(self.uncertainty),
        )

    def groups(self, scope: str) -> list[str]:
        """For each of the N names, the group of ``scope`` that it falls into."""
        return [scope_of(name, scope) for name in self.names]


def mirror(matrices: np.ndarray) -> None:
    """Make ``matrices [..., T, T]`` exactly symmetric, in place: above the diagonal what is below.

    A product and its transpose may be computed by different kernels of the linear algebra library,
    which round differently; sums along rows round differently from sums along columns.
    """
    for row in range(matrices.shape[-1]):
        matrices[..., row, row + 1 :] = matrices[..., row + 1 :, row]


def rounding_error(matrices: np.ndarray) -> np.ndarray:
    """``Gram.uncertainty`` of exact ``matrices [N, T, T]``."""
    return ROUNDING_ERROR * np.einsum("nii->ni", matrices).cumsum(axis=1)
