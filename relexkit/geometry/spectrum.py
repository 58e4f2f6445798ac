"""Principal directions of a run's updates, read off its Gram matrices.

With ``G = U diag(lambda) U^T``: singular values ``sqrt(lambda)``, explained variance ratios
``lambda / trace(G)``, coefficients ``C = U S`` (the position of each recorded step along each
direction). *Uncentered* is energy about the base model, as RELEX (arXiv 2605.21468) computes it;
*centered* is the PCA of ``J G J`` with ``J = I - 11^T / T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from relexkit.geometry.null import WalkNull, calibrate
from relexkit.geometry.shape import (
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
        energy_share: share of the run's total energy (sum of squared deltas over all recorded
            steps); NaN if nothing moved.
        r2: of each coefficient's straight line against the steps.
        agreement: ``[3]``, of the first quarter, half and three quarters of the steps; see the
            function of that name.
        update_cosines: ``[T - 1]``, see the function of that name.
        changed, moved: ``[T]``, shares of its weights that differ from the previous step, and from
            the base.
        unit_moves: share of all changes that are exactly one unit in the last place; NaN if
            unknown.
        null: the same statistics of a walk without direction with its own step sizes; None for the
            null itself.
        ratio_error: estimated error of the first two ratios: rounding, or that of the randomized
            PCA.
        angle_error: estimated angle in radians between the first direction and the true one: large
            where the first two singular values are nearly equal, because there it is hardly
            determined. NaN if nothing moved.
    """

    name: str
    num_parameters: int
    energy_share: float
    singular_values: np.ndarray
    explained_variance_ratio: np.ndarray
    coefficients: np.ndarray
    r2: np.ndarray
    agreement: np.ndarray
    update_cosines: np.ndarray
    changed: np.ndarray
    moved: np.ndarray
    unit_moves: float
    null: WalkNull | None = None
    ratio_error: float = float("nan")
    angle_error: float = float("nan")

    def num_directions(self, share: float) -> int | None:
        """Fewest directions that together hold ``share`` of the variance; None if nothing moved."""
        if not len(self.explained_variance_ratio):
            return None
        return int(np.searchsorted(np.cumsum(self.explained_variance_ratio), share - 1e-12) + 1)


@dataclass(frozen=True, repr=False)
class Spectrum(Result):
    """Spectra of all groups of a scope.

    Attributes:
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
    scopes: list[ScopeSpectrum]
    null: ScopeSpectrum
    whole: WalkNull
    momentum: float
    fit: TrajectoryFit | None

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
    energy = np.trace(chosen.matrices, axis1=1, axis2=2)
    total = energy.sum()
    about = center(chosen.matrices) if centered else chosen.matrices
    parts = decompose_all(about)
    agreements = np.concatenate(
        in_blocks(
            lambda rows: _agreements(
                chosen.matrices[rows], quarters(len(chosen.steps)), centered, parts[rows]
            ),
            len(parts),
        )
    )
    scopes = []
    for row, name in enumerate(chosen.names):
        size = int(chosen.num_parameters[row])
        unit, changes = chosen.unit_moves[row], chosen.changed[row].sum()
        scopes.append(
            replace(
                _shape(name, chosen.matrices[row], chosen.steps, parts[row], agreements[row]),
                num_parameters=size,
                energy_share=float(energy[row] / total) if total else float("nan"),
                changed=chosen.changed[row] / max(1, size),
                moved=chosen.moved[row] / max(1, size),
                unit_moves=(
                    float(unit.sum() / changes) if changes and (unit >= 0).all() else float("nan")
                ),
                null=nulls.groups[row],
                ratio_error=_ratio_error(parts[row], float(chosen.uncertainty[row, -1])),
                angle_error=_angle_error(
                    parts[row].singular_values, float(chosen.uncertainty[row, -1])
                ),
            )
        )
    walk = nulls.whole.gram if np.trace(nulls.whole.gram) > 0 else walk_gram(chosen.steps)
    walk_parts = decompose(center(walk) if centered else walk)
    walk_agreement = _agreements(walk[None], quarters(len(chosen.steps)), centered, [walk_parts])[0]
    null = _shape("walk without direction", walk, chosen.steps, walk_parts, walk_agreement)
    many = len(chosen.steps) >= 2 * SPACED
    drift = fit_whole(chosen, SPACED) if many else nulls.fitted
    return Spectrum(chosen.steps, scope, centered, scopes, null, nulls.whole, nulls.momentum, drift)


def _shape(
    name: str, matrix: np.ndarray, steps: np.ndarray, parts: Decomposition, agreement: np.ndarray
) -> ScopeSpectrum:
    """What the matrix of a group says, whatever else is known of it."""
    unknown = np.full(len(steps), np.nan)
    return ScopeSpectrum(
        name=name,
        num_parameters=0,
        energy_share=float("nan"),
        singular_values=parts.singular_values,
        explained_variance_ratio=parts.explained_variance_ratio,
        coefficients=parts.coefficients,
        r2=r_squared(parts.coefficients, steps),
        agreement=agreement,
        update_cosines=update_cosines(matrix),
        changed=unknown,
        moved=unknown,
        unit_moves=float("nan"),
        ratio_error=_ratio_error(parts, 0.0),
        angle_error=_angle_error(parts.singular_values, 0.0),
    )


def _ratio_error(parts: Decomposition, uncertainty: float) -> float:
    return uncertainty / parts.total if len(parts.singular_values) else float("nan")


def _angle_error(singular_values: np.ndarray, uncertainty: float) -> float:
    """Davis and Kahan 1970: an error of that norm turns the first eigenvector by at most this
    angle, in radians.
    """
    if not len(singular_values):
        return float("nan")
    first, second = np.pad(singular_values[:2] ** 2, (0, 1))[:2]
    return float(np.arcsin(min(1.0, uncertainty / max(first - second, 1e-300))))
