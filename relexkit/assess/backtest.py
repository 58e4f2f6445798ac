"""How every method would have done in the run's own past, from the Gram matrices alone.

For a prefix of ``n`` recorded steps and an observed later step ``j``, with weights ``a`` computed
from ``G[:n, :n]`` only:

    squared error   e(n, j) = a^T G a - 2 a^T G[:n, j] + G[j, j]
    relative error  sqrt(e / G[j, j])
    cosine          a^T G[:n, j] / sqrt(a^T G a * G[j, j])
    skill           1 - e / e_hold

Squared errors, inner products and norms are summed over tensors before anything is divided: that is
the error of the whole model, or of a layer or a type of module. No weights are read.

Shape suffixes: N tensors, T recorded steps, n steps of a prefix, J later steps, R directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from relexkit.errors import ExtrapolationError
from relexkit.geometry.shape import MANY_STEPS
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.predict.extrapolators import (
    BASELINE,
    METHODS,
    Predict,
    fit_method,
    method_of,
    name_of,
)
from relexkit.predict.fits import Options
from relexkit.predict.prediction import Extrapolator
from relexkit.results import Result
from relexkit.weights.layout import scope_of

MODEL = "model"
"""The trajectory model: one fit per prefix to the sum of all tensors, a few tenths of a second
each.
"""

CHEAP = (
    BASELINE,
    *(name for name, m in METHODS.items() if m.cheap and m.goes_on),
)
"""Methods of the default grid: hold, and those that go to later steps and are quickly fitted."""

_NUM_PREFIXES = 8
_CHECKED = 128  # of more than ``MANY_STEPS`` steps, evenly spaced, unless a prefix is named


@dataclass(frozen=True)
class Row:
    """One method, prefix and later step.

    Attributes:
        until: last step of the prefix.
        target: the later step.
        relative_error: of the delta at ``target``; 1 is predicting the base. NaN if nothing had
            moved by then.
        cosine: between predicted and true delta; NaN where one of them is zero.
        skill: against hold; 0 is as good, negative is worse; NaN where hold is exact.
    """

    method: str
    until: int
    target: int
    relative_error: float
    cosine: float
    skill: float


@dataclass(frozen=True)
class Horizon:
    """How far past its last step a method has beaten hold in the run's own past, as ``target /
    until``.

    A prefix's own horizon is the end of the first unbroken stretch of later steps at which the
    method beat hold. Prefixes overlap and late ones can be checked less far, so ``low`` and
    ``high`` are the spread of the record and no confidence interval, and prefixes that were still
    ahead at the last recorded step count as checked only up to there.

    Attributes:
        start: where those stretches begin, median; a method may lose to hold next to the prefix and
            win farther out.
        ratio: as far as at least as many prefixes are known to be ahead of hold as to have fallen
            behind, and at least three are known; 1 if it never beat hold.
        low: the first at which any prefix fell behind hold.
        high: the farthest at which any prefix was still ahead.
        beyond: most had not fallen behind by ``ratio``, the farthest that could be checked; nothing
            is known past it.
        num_prefixes: how many prefixes were checked.
    """

    method: str
    start: float
    ratio: float
    low: float
    high: float
    beyond: bool
    num_prefixes: int

    def __str__(self) -> str:
        if not self.num_prefixes:
            return f"{self.method}: could not be checked in this run"
        prefixes = f"{self.num_prefixes} prefix{'es' * (self.num_prefixes != 1)}"
        if self.ratio <= 1:
            some = (
                " in this run"
                if self.high <= 1
                else f" from most prefixes, at best up to {self.high:.2f} times their last step"
            )
            return f"{self.method}: has not beaten hold{some} ({prefixes})"
        tail = (
            ", the farthest that could be checked; nothing is known beyond" if self.beyond else ""
        )
        spread = f"between {self.low:.2f} and {self.high:.2f} over {prefixes}"
        if f"{self.low:.2f}" == f"{self.high:.2f}":
            spread = f"none of {prefixes} tells more or less"
        return (
            f"{self.method}: has beaten hold up to {self.ratio:.2f} times the last step{tail}"
            f" ({spread})"
        )


@dataclass(frozen=True, repr=False)
class Backtest(Result):
    """Errors of K methods, P prefixes and T steps on N tensors.

    Attributes:
        methods: K names.
        steps: ``int64 [T]``.
        prefixes: ``int64 [P]``, their numbers of recorded steps.
        names: N tensors (or groups) of the Gram matrices.
        overlaps: ``float64 [K, P, T, N]``, inner product of prediction and true delta; NaN where
            the step is not later than the prefix or was not checked, or the method could not be
            fitted.
        norms: ``float64 [K, P, T, N]``, squared norm of the prediction.
        truth: ``float64 [T, N]``, squared norm of the true delta.
        failures: what a method said where it could not be fitted, by method and last step of the
            prefix.
    """

    methods: tuple[str, ...]
    steps: np.ndarray
    prefixes: np.ndarray
    names: tuple[str, ...]
    overlaps: np.ndarray
    norms: np.ndarray
    truth: np.ndarray
    failures: dict[tuple[str, int], str]

    def rows(self) -> list[dict[str, Any]]:
        """``grid`` as a table."""
        return [asdict(row) for row in self.grid]

    def sentences(self) -> list[str]:
        """How far each method has beaten hold."""
        return [str(horizon) for horizon in self.horizon]

    @property
    def grid(self) -> list[Row]:
        """Rows of the whole model, by method, prefix and later step; what could not be fitted is
        left out.
        """
        return self._rows(self._whole)

    def by_group(self, scope: str) -> dict[str, list[Row]]:
        """The grid of every group of ``scope`` (``tensor``, ``layer`` or ``module``), in order of
        appearance.
        """
        members: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            members.setdefault(scope_of(name, scope), []).append(row)
        return {group: self._rows(self._scores(np.array(rows))) for group, rows in members.items()}

    @property
    def horizon(self) -> list[Horizon]:
        """Trust horizon of every method except hold, on the whole model."""
        skill = self._whole[2]
        return [
            self._horizon(name, skill[k]) for k, name in enumerate(self.methods) if name != BASELINE
        ]

    def skill(self, method: str) -> np.ndarray:
        """Skill of a method against hold on the whole model, ``[P, T]``; NaN where there is
        none.
        """
        return self._whole[2][self.methods.index(method)]

    @property
    def checked(self) -> np.ndarray:
        """Which later steps were checked from which prefix, ``bool [P, T]``."""
        known: np.ndarray = ~np.isnan(self.norms[self.methods.index(BASELINE), :, :, 0])
        return known

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._scores(slice(None))

    def _scores(self, members: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Relative error, cosine and skill of a sum of tensors, each ``[K, P, T]``."""
        overlap, norm = (
            self.overlaps[..., members].sum(axis=-1),
            self.norms[..., members].sum(axis=-1),
        )
        truth = self.truth[:, members].sum(axis=-1)
        error = np.maximum(
            norm - 2 * overlap + truth, 0.0
        )  # cancellation, where a prediction is exact
        with np.errstate(invalid="ignore", divide="ignore"):
            skill = 1 - error / error[self.methods.index(BASELINE)]
            skill[~np.isfinite(skill)] = np.nan
            return np.sqrt(error / truth), overlap / np.sqrt(norm * truth), skill

    def _rows(self, of: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[Row]:
        scores = np.stack(of, axis=-1).tolist()
        known = ~np.isnan(self.norms[..., 0])
        steps = self.steps.tolist()
        return [
            Row(self.methods[k], steps[self.prefixes[p] - 1], steps[j], *scores[k][p][j])
            for k, p, j in np.argwhere(known)
        ]

    def _horizon(self, method: str, skill: np.ndarray) -> Horizon:
        starts, ends, lost = [], [], []
        for count, row, checked in zip(self.prefixes, skill, self.checked, strict=True):
            ratios, ahead = self.steps[checked] / self.steps[count - 1], row[checked]
            if np.isnan(ahead).all():
                continue
            wins = np.flatnonzero(ahead > 0)
            behind = np.flatnonzero(~(ahead > 0))
            behind = behind[behind > wins[0]] if len(wins) else behind
            if len(wins):
                starts.append(ratios[wins[0]])
            lost.append(len(behind) > 0)
            ends.append(
                1.0 if not len(wins) else ratios[behind[0] - 1] if len(behind) else ratios[-1]
            )
        if not ends:
            return Horizon(method, np.nan, 1.0, 1.0, 1.0, False, 0)
        end, fell = np.array(ends), np.array(lost)
        ratio = 1.0
        for value in np.unique(end):
            ahead_there, behind_there = (end >= value).sum(), (fell & (end < value)).sum()
            if ahead_there < behind_there or ahead_there + behind_there < min(3, len(end)):
                break
            ratio = value
        still = ((end > ratio) | (~fell & (end == ratio))).sum()
        low = min(end[fell].min(), ratio) if fell.any() else ratio
        start = float(np.median(starts)) if starts else float("nan")
        return Horizon(
            method,
            start,
            float(ratio),
            float(low),
            float(end.max()),
            bool(0 < still >= (fell & (end <= ratio)).sum()),
            len(end),
        )


def backtest(
    gram: Gram,
    methods: Sequence[str | Extrapolator] | None = None,
    prefixes: Sequence[int] | None = None,
    options: Options | None = None,
    ratios: Sequence[float] | None = None,
) -> Backtest:
    """Every method fitted to every prefix and compared with later recorded steps.

    Args:
        gram: Gram matrices of tensors, each of which is fitted on its own (the trajectory model
            fits their sum).
        methods: names from ``METHODS`` that predict later steps, or functions of one's own; None
            for ``CHEAP``. Hold is always added.
        prefixes: last recorded steps of the prefixes; None for up to eight, from a tenth of the run
            on, spaced by ratio.
        options: each method takes those that it uses.
        ratios: compare with the first steps at so many times a prefix's last step; None for all
            later steps, of more than 256 recorded ones and no prefixes named 128 evenly spaced,
            between which a horizon misses what does not last.

    Reads no weights. The default grid takes less than a second for 400 tensors and 75 steps.

    Raises:
        ExtrapolationError: an unknown method, an option that none of the methods uses, a prefix
            that is not a recorded step with a later one, or fewer than two recorded steps.
    """
    options = options or Options()
    chosen = tuple(dict.fromkeys((BASELINE, *(CHEAP if methods is None else methods))))
    taken = {method: _options_of(method, options) for method in chosen}
    names = tuple(name_of(method) for method in chosen)
    _check_options(dict(zip(names, taken.values(), strict=True)), options)
    counts = _prefixes(gram.steps, prefixes)
    shape = (len(chosen), len(counts), len(gram.steps), len(gram.names))
    overlaps, norms = np.full(shape, np.nan), np.full(shape, np.nan)
    failures: dict[tuple[str, int], str] = {}
    for p, count in enumerate(counts):
        later = _later(gram.steps, int(count), ratios, thin=prefixes is None)
        for k, method in enumerate(chosen if len(later) else ()):
            try:
                norms[k, p, later], overlaps[k, p, later] = _moments(
                    gram,
                    fit_method(gram.until(gram.steps[count - 1]), method, taken[method]),
                    later,
                )
            except ExtrapolationError as error:
                failures[names[k], int(gram.steps[count - 1])] = str(error)
    truth = np.diagonal(gram.matrices, axis1=1, axis2=2).T
    return Backtest(names, gram.steps, counts, gram.names, overlaps, norms, truth, failures)


def _options_of(method: str | Extrapolator, options: Options) -> Options:
    if isinstance(method, str) and (method not in METHODS or not METHODS[method].reaches_later):
        known = ", ".join(name for name, m in METHODS.items() if m.reaches_later)
        raise ExtrapolationError(f"method {method} cannot be backtested; choose among {known}")
    return Options(**{name: getattr(options, name) for name in method_of(method).options})


def _check_options(taken: dict[str, Options], options: Options) -> None:
    for field in fields(Options):
        wanted = getattr(options, field.name)
        if wanted != getattr(Options(), field.name) and all(
            getattr(o, field.name) != wanted for o in taken.values()
        ):
            raise ExtrapolationError(
                f"option {field.name} has no effect on {', '.join(taken)}; leave it out or add a"
                " method"
            )


def _prefixes(steps: np.ndarray, wanted: Sequence[int] | None) -> np.ndarray:
    """Numbers of recorded steps of the prefixes, ascending."""
    if len(steps) < 2:
        raise ExtrapolationError(
            "a backtest needs a prefix and a later step; record at least 2 steps"
        )
    if wanted is None:
        first = min(max(3, len(steps) // 10), len(steps) - 1)
        spread = np.geomspace(first, max(first, 0.85 * len(steps)), _NUM_PREFIXES)
        return np.unique(np.minimum(np.round(spread).astype(np.int64), len(steps) - 1))
    for step in wanted:
        if step not in steps[:-1]:
            raise ExtrapolationError(
                f"prefix {step} is not a recorded step with a later one; choose from {steps[0]} to"
                f" {steps[-2]}"
            )
    return np.unique(np.searchsorted(steps, np.asarray(wanted, np.int64), side="right"))


def _later(
    steps: np.ndarray, count: int, ratios: Sequence[float] | None, *, thin: bool
) -> np.ndarray:
    """Rows of the later steps that a prefix of ``count`` steps is compared with, ascending."""
    if ratios is not None:
        rows = np.searchsorted(steps, np.asarray(ratios) * steps[count - 1])
        return np.unique(rows[(rows >= count) & (rows < len(steps))])
    rows = np.arange(len(steps))
    if thin and len(steps) > MANY_STEPS:
        rows = np.unique(np.linspace(0, len(steps) - 1, _CHECKED).round().astype(np.int64))
    return rows[rows >= count]


# -- squared norms and overlaps of the predictions, [J, N] -----------------------------------------


def _moments(gram: Gram, predict: Predict, later: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a^T G a`` and ``a^T G[:n, j]`` for J later steps and every tensor."""
    weights_JNn = predict(gram.steps[later].astype(np.float64))
    with single_threaded_blas():
        used = np.flatnonzero(weights_JNn.any(axis=(0, 1)))
        weights_NnJ = weights_JNn[:, :, used].transpose(1, 2, 0)
        count = weights_JNn.shape[2]
        among = gram.matrices[:, :count, :count]
        if len(used) < count:
            among = gram.matrices[:, used[:, None], used]
        if len(weights_NnJ) == 1 and len(used) > MANY_STEPS:
            # the same for all tensors, and hardly more than a line in time: a few products do
            left_nr, sizes_r, right_rJ = np.linalg.svd(weights_NnJ[0], full_matrices=False)
            kept = max(1, int((sizes_r > 1e-14 * sizes_r[0]).sum()))
            basis_nr, parts_rJ = left_nr[:, :kept] * sizes_r[:kept], right_rJ[:kept]
            norms = ((basis_nr.T @ (among @ basis_nr) @ parts_rJ) * parts_rJ).sum(axis=1)
        else:
            norms = (weights_NnJ * (among @ weights_NnJ)).sum(axis=1)
        crossed = gram.matrices[:, later[:, None], used]
        overlaps = np.einsum(
            "ntj,njt->tn",
            crossed,
            np.broadcast_to(weights_NnJ, (len(crossed), *weights_NnJ.shape[1:])),
        )
    return norms.T, overlaps
