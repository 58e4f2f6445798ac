"""Principal directions of a run's updates, read off its Gram matrices.

With ``G = U diag(lambda) U^T``: singular values ``sqrt(lambda)``, explained variance ratios
``lambda / trace(G)``, coefficients ``C = U S`` (the position of each recorded step along each
direction). *Uncentered* is energy about the base model, as RELEX (arXiv 2605.21468) computes it;
*centered* is the PCA of ``J G J`` with ``J = I - 11^T / T``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from relexkit.geometry.null import Null, WalkNull, calibrate
from relexkit.geometry.shape import (
    MANY_STEPS,
    Decomposition,
    center,
    decompose,
    decompose_all,
    in_blocks,
    leading_eigenpairs,
    r_squared,
    update_cosines,
    walk_gram,
)
from relexkit.geometry.trajectory_model import SPACED, TrajectoryFit, fit_whole
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.results import Result


def agreement(matrix: np.ndarray, prefixes: np.ndarray, *, centered: bool = False) -> np.ndarray:
    """``|cos|`` between the first direction of the first ``n`` steps and that of all steps, for
    each n of ``prefixes``.

    ``u_1(n)^T G[:n, :] u_1(T) / (sigma_1(n) sigma_1(T))``; centered, with each prefix about its own
    mean, the same with ``J_n G[:n, :] J_T``. NaN where a prefix has not moved.
    """
    final = decompose(center(matrix) if centered else matrix)
    return _agreements(matrix[None], prefixes, centered, [final])[0]


def _agreements(
    matrices: np.ndarray, prefixes: np.ndarray, centered: bool, final: Sequence[Decomposition]
) -> np.ndarray:
    """``agreement`` of N matrices whose decompositions are ``final``, ``[N, P]``."""
    firsts = np.full(matrices.shape[:2], np.nan)
    for row, parts in enumerate(final):
        if len(parts.singular_values):
            firsts[row] = parts.left[:, 0] / parts.singular_values[0]
    # the eigenvectors of a centered matrix sum to zero, so they need no centering themselves
    projected = (matrices @ firsts[..., None])[..., 0]
    cosines = np.empty((len(matrices), len(prefixes)))
    for index, count in enumerate(prefixes):
        block = matrices[:, :count, :count]
        values, vectors = leading_eigenpairs(center(block) if centered else block, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines[:, index] = np.abs(
                (vectors[..., 0] * projected[:, :count]).sum(axis=1)
            ) / np.sqrt(values[:, 0])
    return np.minimum(cosines, 1.0)


def quarters(num_steps: int) -> np.ndarray:
    """Lengths of the first quarter, half and three quarters of the steps, each at least 1."""
    return np.maximum(1, num_steps * np.arange(1, 4) // 4)


@dataclass(frozen=True)
class ScopeSpectrum:
    """Spectrum of one tensor or group; arrays over its R non-zero directions unless said.

    Attributes:
        parts: its decomposition.
        steps: ``[T]``.
        agreement: ``[3]``, of the first quarter, half and three quarters of the steps; see the
            function of that name.
        update_cosines: ``[T - 1]``, see the function of that name.
        energy_share: share of the run's total energy (sum of squared deltas over all recorded
            steps); NaN if nothing moved.
        changed, moved: ``[T]``, shares of its weights that differ from the previous step, and from
            the base.
        unit_moves: share of all changes that are exactly one unit in the last place; NaN if
            unknown.
        null: the same statistics of a walk without direction with its own step sizes; None for the
            null itself.
        uncertainty: norm of the error of its Gram matrix.
    """

    name: str
    parts: Decomposition
    steps: np.ndarray
    agreement: np.ndarray
    update_cosines: np.ndarray
    num_parameters: int
    energy_share: float
    changed: np.ndarray
    moved: np.ndarray
    unit_moves: float
    null: WalkNull | None = None
    uncertainty: float = 0.0

    @property
    def singular_values(self) -> np.ndarray:
        """``S [R]``, descending."""
        return self.parts.singular_values

    @property
    def explained_variance_ratio(self) -> np.ndarray:
        """``lambda / trace(G)``."""
        return self.parts.explained_variance_ratio

    @cached_property
    def coefficients(self) -> np.ndarray:
        """``C = U S``, ``[T, R]``."""
        return self.parts.coefficients

    @cached_property
    def r2(self) -> np.ndarray:
        """Of each coefficient's straight line against the steps."""
        return r_squared(self.coefficients, self.steps)

    @property
    def ratio_error(self) -> float:
        """Estimated error of the first two ratios: rounding, or that of the randomized PCA."""
        return self.uncertainty / self.parts.total if len(self.singular_values) else float("nan")

    @property
    def angle_error(self) -> float:
        """Estimated angle in radians between the first direction and the true one: large where the
        first two singular values are nearly equal, because there it is hardly determined. NaN if
        nothing moved.

        Davis and Kahan 1970: an error of that norm turns the first eigenvector by at most this
        angle.
        """
        if not len(self.singular_values):
            return float("nan")
        first, second = [*(self.singular_values[:2] ** 2), 0.0][:2]
        return math.asin(min(1.0, self.uncertainty / max(first - second, 1e-300)))

    def num_directions(self, share: float) -> int | None:
        """Fewest directions that together hold ``share`` of the variance; None if nothing moved, or
        if it takes more than are known.
        """
        held = np.cumsum(self.explained_variance_ratio)
        fewest = int(np.searchsorted(held, share - 1e-12))
        all_known = len(self.steps) <= MANY_STEPS
        if not len(held) or (fewest == len(held) and not all_known):
            return None
        return fewest + 1


class Groups:
    """The groups of a scope: what needs no decomposition, as arrays over all N of them, and the
    spectra of those that are asked for.

    Attributes:
        names: of the groups.
        num_parameters: ``[N]``.
        energy_share, ratio_error, unit_moves: ``[N]``, see ``ScopeSpectrum``.
        num_changed: ``[N]``, changes of all weights at all steps.
        still: ``[N]``, whether it never moved.
    """

    def __init__(self, gram: Gram, centered: bool, nulls: Null):
        self._gram, self._centered, self._nulls = gram, centered, nulls
        energy = np.trace(gram.matrices, axis1=1, axis2=2)
        about = energy
        if centered:
            about = np.concatenate(in_blocks(self._energy_about_mean, len(energy)))
        self.names, self.num_parameters = gram.names, gram.num_parameters
        self.still = about <= 0
        self.num_changed = gram.changed.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.energy_share = energy / energy.sum()
            self.ratio_error = np.where(self.still, np.nan, gram.uncertainty[:, -1] / about)
            known = (gram.unit_moves >= 0).all(axis=1) & (self.num_changed > 0)
            units = gram.unit_moves.sum(axis=1) / self.num_changed
            self.unit_moves = np.where(known, units, np.nan)

    def of(self, rows: np.ndarray) -> list[ScopeSpectrum]:
        """Spectra of some groups."""
        gram = self._gram
        every = len(rows) == len(gram.names) and (np.diff(rows) == 1).all()
        matrices = gram.matrices if every else gram.matrices[rows]
        parts = decompose_all(center(matrices) if self._centered else matrices)
        prefixes = quarters(len(gram.steps))

        def agreements_of(block: slice) -> np.ndarray:
            return _agreements(matrices[block], prefixes, self._centered, parts[block])

        agreements = np.concatenate(in_blocks(agreements_of, len(rows)))
        shares = np.maximum(1, gram.num_parameters[rows])[:, None]
        changed, moved = gram.changed[rows] / shares, gram.moved[rows] / shares
        cosines, nulls = update_cosines(matrices), self._nulls.of(rows)
        return [
            ScopeSpectrum(
                name=gram.names[row],
                parts=parts[index],
                steps=gram.steps,
                agreement=agreements[index],
                update_cosines=cosines[index],
                num_parameters=int(gram.num_parameters[row]),
                energy_share=float(self.energy_share[row]),
                changed=changed[index],
                moved=moved[index],
                unit_moves=float(self.unit_moves[row]),
                null=nulls[index],
                uncertainty=float(gram.uncertainty[row, -1]),
            )
            for index, row in enumerate(rows.tolist())
        ]

    def _energy_about_mean(self, rows: slice) -> np.ndarray:
        return np.trace(center(self._gram.matrices[rows]), axis1=1, axis2=2)


@dataclass(frozen=True, repr=False)
class Spectrum(Result):
    """Spectra of all groups of a scope.

    Attributes:
        groups: of the scope; ``scopes`` are their spectra, ``leading`` those of some.
        null: the spectrum of a walk without direction with the run's own step sizes, momentum and
            learning rates; only its ratios, R^2 and coefficients mean anything.
        whole: statistics of all groups together beside those of their walk.
        momentum: of that walk.
        fit: the trajectory model of all groups together, told by ``SPACED`` steps as in ``advise``;
            None with fewer than three steps, or if nothing moved.
    """

    steps: np.ndarray
    scope: str
    centered: bool
    groups: Groups
    null: ScopeSpectrum
    whole: WalkNull
    momentum: float
    fit: TrajectoryFit | None

    @cached_property
    def scopes(self) -> list[ScopeSpectrum]:
        """The spectra of all groups, computed at the first use."""
        with single_threaded_blas():
            return self.groups.of(np.arange(len(self.groups.names)))

    def leading(self, count: int) -> list[ScopeSpectrum]:
        """The spectra of the groups with most energy; computes no others."""
        order = np.argsort(-self.groups.energy_share, kind="stable")  # NaN last
        if count >= len(order):
            return [self.scopes[row] for row in order]
        with single_threaded_blas():
            return self.groups.of(order[:count])

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group: every statistic beside that of its walk, ``NAME`` and
        ``NAME_walk``.
        """
        return [
            {
                self.scope: s.name,
                "parameters": s.num_parameters,
                "energy_share": s.energy_share,
                **_beside_walk(s.null),
                "changed": float(s.changed.mean()),
            }
            for s in self.scopes
        ]

    def sentences(self) -> list[str]:
        """The whole run beside its walk."""
        seen, walk, p_value = self.whole.observed, self.whole.expected, self.whole.p_value
        return [
            f"{len(self.steps)} steps to {self.steps[-1]}, first direction"
            f" {100 * seen['first']:.1f} % against {100 * walk['first']:.1f} % of a walk without"
            f" direction (p = {p_value['first']:.2g}), R² {seen['r2']:.3f} against"
            f" {walk['r2']:.3f} (p = {p_value['r2']:.2g}); only what exceeds the walk is evidence."
        ]


def _beside_walk(null: WalkNull | None) -> dict[str, float]:
    if null is None:
        return {}
    pairs = {name: (null.observed[name], null.expected[name]) for name in null.observed}
    return {
        f"{n}{end}": v
        for n, both in pairs.items()
        for end, v in zip(("", "_walk"), both, strict=True)
    }


def spectrum(
    gram: Gram,
    *,
    scope: str = "tensor",
    until: int | None = None,
    centered: bool = False,
    momentum: float | None = None,
) -> Spectrum:
    """Spectrum of every group of ``scope`` (``tensor``, ``layer``, ``module``, ``global``), over
    the steps to ``until``.

    Every statistic comes with what a walk without direction gives (``relexkit.geometry.null``).
    ``momentum`` is the optimizer's (Adam's first beta), fitted if None; its learning rates are
    those of ``gram``.

    Reads no weights; tenths of a second for hundreds of tensors.

    Raises:
        RelexkitError: no recorded step is as early as ``until``.
    """
    chosen = gram.until(until).scoped(scope)
    with single_threaded_blas():
        return _spectrum(chosen, scope, centered, momentum)


def _spectrum(chosen: Gram, scope: str, centered: bool, momentum: float | None) -> Spectrum:
    nulls = calibrate(chosen, centered=centered, momentum=momentum)
    steps = chosen.steps
    walk = nulls.whole.gram
    walk = walk if np.trace(walk) > 0 else walk_gram(steps)
    parts, unknown = decompose(center(walk) if centered else walk), np.full(len(steps), np.nan)
    null = ScopeSpectrum(
        name="walk without direction",
        parts=parts,
        steps=steps,
        agreement=_agreements(walk[None], quarters(len(steps)), centered, [parts])[0],
        update_cosines=update_cosines(walk),
        num_parameters=0,
        energy_share=float("nan"),
        changed=unknown,
        moved=unknown,
        unit_moves=float("nan"),
    )
    many = len(steps) >= 2 * SPACED
    drift = fit_whole(chosen, SPACED) if many else nulls.fitted
    groups = Groups(chosen, centered, nulls)
    return Spectrum(steps, scope, centered, groups, null, nulls.whole, nulls.momentum, drift)
