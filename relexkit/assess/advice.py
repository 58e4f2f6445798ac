"""What to do next with a run, from its Gram matrices and metrics alone, and what that rests on.

The advice is never more confident than the run's own record: extrapolation is advised only to
distances at which the method beat standing still from the latest prefixes that could be checked,
and only with evidence of a drift beyond what a walk shows, as strong and lasting as in runs whose
task gained (``relexkit.assess.task_evidence``). What lasts is told by ``SPACED`` evenly spaced
steps, so that it matters little how often the run was saved. Of the trajectory model only the drift
is used: its motion on the optimizer's momentum comes nearer to the weights of a walk as well, and
costs accuracy there. ``advise`` is one pure function, so a trainer can call it on the small Gram
matrix that it keeps while it trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from relexkit.assess.backtest import CHEAP, Backtest, backtest
from relexkit.assess.metrics import Informative, informative_steps
from relexkit.assess.task_evidence import GAINING, standing, worth
from relexkit.geometry.trajectory_model import SPACED, TrajectoryFit, fit_whole
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.predict.extrapolators import METHODS
from relexkit.results import Result

Verdict = Literal["extrapolate", "keep-training", "not-a-line", "hidden-by-precision"]

HEADLINES: dict[Verdict, str] = {
    "extrapolate": (
        "The weights extrapolate to about step {target} with --method {method}, as in runs that"
        " gained on the task; a sweep tells whether this one does."
    ),
    "keep-training": "Keep training.",
    "not-a-line": "This run is not on a line: do not extrapolate it.",
    "hidden-by-precision": (
        "The stored precision hides the motion: record float32 weights, export with stochastic"
        " rounding."
    ),
}

_NEXT: dict[Verdict, str | None] = {
    "extrapolate": "relexkit sweep {store} --task TASK --to {target} --method {method}",
    "keep-training": None,
    "not-a-line": "relexkit sweep {store} --task TASK --to {last} --method average",
    "hidden-by-precision": None,
}

RATIOS = (1.1, 1.25, 1.5, 2.0)
"""Distances at which the record is read, as target over last step of the prefix."""

_ASKED = (
    *CHEAP,
    *(n for n, m in METHODS.items() if m.goes_on and not m.cheap and m.judged_by is None),
)
_CHANCE = 0.05  # p-value of the drift above which there is no evidence of one
_FEWEST_STEPS = 8  # below, nothing is told
_FEWEST_INFORMATIVE, _INFORMATIVE_SHARE = 8, 0.3
_RECENT_CHECKS = 4  # of the latest prefixes that can be checked at a distance
_LEAST_SKILL, _LEAST_WINS = 0.1, 0.75
_LITTLE_DRIFT = 0.5  # of the noise; walks stay below 0.2, from a dozen steps on
_SHORT_LIFE = 0.1  # of the run: a drift that turns faster is a walk for whoever extrapolates
_HIDDEN_CHANGED, _HIDDEN_UNITS = 0.5, 0.3


@dataclass(frozen=True)
class Check:
    """What a method did at one distance in the run's own past.

    Attributes:
        ratio: target over last step of the prefix.
        skill: mean over the latest prefixes; 1 is exact, 0 as good as hold.
        won: how often it beat hold.
        made: how often it could be checked.
    """

    ratio: float
    skill: float
    won: int
    made: int

    @property
    def passed(self) -> bool:
        """Whether this distance may be trusted."""
        return self.made >= 2 and self.skill >= _LEAST_SKILL and self.won >= _LEAST_WINS * self.made


@dataclass(frozen=True)
class Findings:
    """What advice rests on.

    Attributes:
        record: checks of every method by distance, those that could be made.
        fit: the trajectory model of the run; None where it could not be fitted.
        last_step: of the run.
    """

    record: dict[str, tuple[Check, ...]]
    fit: TrajectoryFit | None
    last_step: int


@dataclass(frozen=True, repr=False)
class Advice(Result):
    """What to do, and why.

    Attributes:
        verdict: one of ``HEADLINES``.
        headline: the same as a sentence.
        method, target: what to extrapolate with and to; None unless that is the verdict.
        reasons: the numbers behind it, as sentences, the decisive one first.
        next_command: what to type next, with ``{store}`` for the run; None for training on.
        would_change: what would change the answer, as sentences.
        record: checks of every method by distance, those that could be made.
        fit: the trajectory model of the run; None where it could not be fitted.
    """

    verdict: Verdict
    headline: str
    method: str | None
    target: int | None
    reasons: tuple[str, ...]
    next_command: str | None
    would_change: tuple[str, ...]
    record: dict[str, tuple[Check, ...]]
    fit: TrajectoryFit | None

    def rows(self) -> list[dict[str, Any]]:
        """The record: every method at every distance that could be checked."""
        return [
            {"method": m, **vars(check), "passed": check.passed}
            for m, checks in self.record.items()
            for check in checks
        ]

    def sentences(self) -> list[str]:
        """The advice, and why."""
        return [self.headline, *self.reasons]

    def document(self) -> dict[str, Any]:
        """Plain numbers and sentences, for JSON."""
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "method": self.method,
            "target": self.target,
            "reasons": list(self.reasons),
            "next_command": self.next_command,
            "would_change": list(self.would_change),
            "record": {
                m: [vars(check) | {"passed": check.passed} for check in checks]
                for m, checks in self.record.items()
            },
            "model": self.fit.summary() if self.fit else None,
        }


def advise(
    gram: Gram, metrics: Mapping[str, np.ndarray] | None = None, *, record: bool = True
) -> Advice:
    """Advice from the Gram matrices of a run so far, N tensors or a single group, and its metrics
    by recorded step.

    Counts of changed weights in ``gram`` tell whether the stored precision hides the motion; zeros
    say nothing. Metrics tell, if they are there, which steps were informative. Reads no weights;
    two seconds or so for 400 tensors and 75 steps, one for a single matrix.

    Args:
        record: also make the checks of every method where the verdict is known without them.
    """
    steps, moved = gram.steps, np.trace(gram.whole) > 0
    last_step = int(steps[-1]) if len(steps) else 0
    if len(steps) < _FEWEST_STEPS or not moved:
        return _too_early(gram)
    hidden = _hidden(gram)
    if hidden and not record:
        return _advice("hidden-by-precision", [hidden], Findings({}, None, last_step))
    with single_threaded_blas():
        fit = fit_whole(gram, SPACED)
        doubted = _doubted(gram, metrics or {}, fit)
        checks = _records(gram) if record or not (hidden or doubted) else {}
    findings, drift = Findings(checks, fit, last_step), _drift_reasons(fit)
    if hidden:
        return _advice("hidden-by-precision", [hidden, *drift], findings)
    if doubted:
        verdict, why = doubted
        in_vain = _in_vain(checks) if verdict == "not-a-line" else []
        return _advice(verdict, [*why, *drift, *in_vain], findings)
    assert fit is not None
    return _by_record(findings, fit)


def _doubted(
    gram: Gram, metrics: Mapping[str, np.ndarray], fit: TrajectoryFit | None
) -> tuple[Verdict, list[str]] | None:
    """What speaks against extrapolating whatever the methods did in the run's own past, if anything
    does, and why.
    """
    few = [_few(len(gram.steps))] if len(gram.steps) < SPACED else []
    informative = informative_steps(metrics)
    if informative and _is_sparse(informative):
        sparse = (
            f"Only {informative.count} of {informative.known} steps were informative"
            f" ({informative.metric}); the motion between them is the optimizer coasting on its"
            " momentum."
        )
        return "keep-training", [sparse]
    doubt = _doubt(fit)
    if doubt is not None:
        return "keep-training", [*few, doubt]
    if fit is None or fit.p_value > _CHANCE or fit.correlation_time < _SHORT_LIFE * gram.steps[-1]:
        return ("keep-training", few) if few else ("not-a-line", [])
    return None


def _records(gram: Gram) -> dict[str, tuple[Check, ...]]:
    """Checks of every method that moves, by distance."""
    result = backtest(gram, _ASKED, ratios=RATIOS)
    return {m: _record(result, m) for m in result.methods if METHODS[m].moves}


def _by_record(findings: Findings, fit: TrajectoryFit) -> Advice:
    """Advice on a run with a lasting drift: as far as the record reaches and the task gained."""
    record, last_step, drift = findings.record, findings.last_step, _drift_reasons(fit)
    trusted = {m: _leading_passes(checks) for m, checks in record.items()}
    if trusted.get("drift"):  # the method whose worth on the task is known
        trusted = {"drift": trusted["drift"]}
    farthest = max((checks[-1].ratio for checks in trusted.values() if checks), default=1.0)
    if farthest == 1.0:
        return _advice("keep-training", [*_too_little(record), *drift], findings)
    rivals = {
        m: checks[-1] for m, checks in trusted.items() if checks and checks[-1].ratio == farthest
    }
    method = max(rivals, key=lambda m: rivals[m].skill)
    best, target = rivals[method], int(farthest * last_step)
    known = worth(fit)
    if standing(fit) < GAINING:
        weights = (
            f"{method} would come nearer to the weights of step {target} than standing still does"
            f" (skill {best.skill:+.2f}, {best.won} of {best.made} checks won), but in runs like"
            " this one that was worth nothing on the task."
        )
        return _advice("keep-training", [weights, known, *drift], findings)
    reached = (
        f"At {best.ratio:g} times the last step {method} beat standing still in {best.won} of"
        f" {best.made} checks of this run's own past, with {100 * best.skill:.0f} % less squared"
        " error on average; that is what to expect, not more."
    )
    return _advice("extrapolate", [reached, known, *drift], findings, method, target)


def objection(
    advice: Advice, method: str, last_step: float, targets: Sequence[float], store: str
) -> str | None:
    """What ``advice`` has against predicting ``targets`` from ``last_step`` by ``method``, in one
    line; None if nothing.

    Standing still, averages and what lies before the last step need no advice.
    """
    farthest = max(targets)
    row = METHODS.get(method)
    if (row is not None and not row.goes_on) or farthest <= last_step:
        return None
    asked = f"{farthest / last_step:.3g} times the last step"
    why = f"`relexkit advise {store}` says why"
    if advice.verdict != "extrapolate" or advice.target is None:
        return f"{advice.headline} {method} was asked for {asked}; {why}"
    record = advice.record.get((row and row.judged_by) or method, ())
    lost = next(
        (c for c in record if c.made >= 2 and not c.passed and c.ratio * last_step <= farthest),
        None,
    )
    if lost is not None:
        return (
            f"in this run's own past {method} did not beat standing still by a tenth at"
            f" {lost.ratio:g} times the last step ({lost.won} of {lost.made} checks won, skill"
            f" {lost.skill:+.2f}), and {asked} was asked for: --method {advice.method} did;"
            f" {why}"
        )
    if farthest > advice.target:
        return (
            f"this run's own past speaks for predictions up to step {advice.target}, not for"
            f" {asked}; {why}"
        )
    return None


def _advice(
    verdict: Verdict,
    reasons: list[str],
    findings: Findings,
    method: str | None = None,
    target: int | None = None,
) -> Advice:
    changes = {
        "extrapolate": (
            (
                "Evaluate before use (relexkit sweep): on a real run weights 50 % closer to the"
                " later step scored 13 points worse."
            ),
            (
                f"Past step {target} nothing is known: train on and ask again; a falling skill of"
                " later checks withdraws it."
            ),
        ),
        "keep-training": (
            (
                "A drift that stands above the noise and lasts as in runs that gained on the task,"
                " and two or more checks in which some method beats standing still by a tenth of"
                " the squared error: more steps, or the same ones saved more often."
            ),
            "Larger batches or a smaller learning rate raise the drift over the noise.",
        ),
        "not-a-line": (
            (
                f"Evidence of a drift (chance on a walk below {_CHANCE}) that lasts longer than a"
                " tenth of the run."
            ),
            "Larger batches or a smaller learning rate raise the drift over the noise.",
        ),
        "hidden-by-precision": (
            "The same run recorded from float32 weights; what this store shows is mostly rounding.",
            (
                "Motion larger than the spacing of the stored numbers: more steps or a larger"
                " learning rate."
            ),
        ),
    }
    named = {"target": target, "method": method, "last": findings.last_step, "store": "{store}"}
    headline, command = HEADLINES[verdict].format_map(named), _NEXT[verdict]
    return Advice(
        verdict,
        headline,
        method,
        target,
        tuple(reasons),
        command and command.format_map(named),
        changes[verdict],
        findings.record,
        findings.fit,
    )


def _too_early(gram: Gram) -> Advice:
    moved = np.trace(gram.whole) > 0
    seen = f"{len(gram.steps)} recorded step{'s' * (len(gram.steps) != 1)}"
    why = _few(len(gram.steps)) if moved else f"Nothing has moved over {seen}."
    needed = (
        f"At least {_FEWEST_STEPS} recorded steps with motion, better {SPACED} or more."
        if moved
        else "Any change of the weights."
    )
    return Advice(
        "keep-training", HEADLINES["keep-training"], None, None, (why,), None, (needed,), {}, None
    )


def _few(num_steps: int) -> str:
    return (
        f"{num_steps} recorded step{'s' * (num_steps != 1)}: too few to tell a drift from a walk;"
        f" it takes {SPACED}, evenly spread."
    )


def _hidden(gram: Gram) -> str | None:
    """A sentence if few weights change at a step and many of the changes are of one unit in the
    last place.
    """
    changes = float(gram.changed.sum())
    if not changes or (gram.unit_moves < 0).any():
        return None
    share = changes / (float(gram.num_parameters.sum()) * len(gram.steps))
    units = float(gram.unit_moves.sum()) / changes
    if share >= _HIDDEN_CHANGED or units <= _HIDDEN_UNITS:
        return None
    return (
        f"{100 * share:.2g} % of the weights change at a step, {100 * units:.0f} % of the changes"
        " by exactly one unit in the last place: the true motion is smaller than the stored"
        " numbers can show."
    )


def _record(result: Backtest, method: str) -> tuple[Check, ...]:
    """Checks by distance, each over the latest prefixes that reach it."""
    skill_PT = result.skill(method)
    checks = []
    for ratio in RATIOS:
        skills = []
        for count, row in zip(result.prefixes[::-1], skill_PT[::-1], strict=True):
            wanted = ratio * result.steps[count - 1]
            later = int(np.searchsorted(result.steps, wanted))
            if (
                later < len(result.steps)
                and later >= count
                and result.steps[later] < 1.15 * wanted
                and math.isfinite(row[later])
            ):
                skills.append(float(row[later]))
        skills = skills[:_RECENT_CHECKS]
        if skills:
            checks.append(
                Check(ratio, float(np.mean(skills)), sum(s > 0 for s in skills), len(skills))
            )
    return tuple(checks)


def _leading_passes(checks: tuple[Check, ...]) -> list[Check]:
    """The unbroken stretch of passed distances from the nearest on that has two checks or more."""
    passed: list[Check] = []
    for check in checks:
        if check.made >= 2 and not check.passed:
            break
        if check.passed:
            passed.append(check)
    return passed


def _drift_reasons(fit: TrajectoryFit | None) -> list[str]:
    if fit is None:
        return []
    low, high = fit.drift_to_noise_interval
    lasting = (
        "the whole run and on"
        if math.isinf(fit.correlation_time)
        else f"{fit.correlation_time:.3g} steps"
    )
    return [
        f"Drift to noise {fit.drift_to_noise:.2g} (90 %: {low:.2g} to {high:.2g}), lasting"
        f" {lasting}; chance of this evidence on a walk {fit.p_value:.2g}."
    ]


def _doubt(fit: TrajectoryFit | None) -> str | None:
    """A sentence if the steps cannot tell a line from a walk: the drift may be as large as the
    noise, or smaller.
    """
    if fit is None:
        return None
    low, high = fit.drift_to_noise_interval
    if fit.p_value > _CHANCE:
        if high <= _LITTLE_DRIFT:
            return None
        return (
            "These steps cannot tell a line from a walk: there may be no drift, or one as large as"
            f" {high:.2g} times the noise."
        )
    if low >= 1:
        return None
    return (
        f"The drift is not certainly above the noise (it may be {low:.2g} of it), and only above it"
        " does a line beat standing still."
    )


def _is_sparse(informative: Informative) -> bool:
    """Whether so few steps had a gradient that the rest is coasting; where all had one, it is not
    sparse, however few steps were saved.
    """
    least = max(min(_FEWEST_INFORMATIVE, informative.known), _INFORMATIVE_SHARE * informative.known)
    return informative.count < least


def _best(record: dict[str, tuple[Check, ...]]) -> tuple[str, Check] | None:
    """The method and distance of most skill among those checked twice."""
    candidates = [(m, c) for m, checks in record.items() for c in checks if c.made >= 2]
    return max(candidates, key=lambda pair: pair[1].skill, default=None)


def _in_vain(record: dict[str, tuple[Check, ...]]) -> list[str]:
    """What a record is worth without a drift."""
    best = _best(record)
    walk = (
        "A walk's last step is noisy: the average of the latest ones may do better, though it"
        " predicts no later step."
    )
    if best is None or best[1].skill < _LEAST_SKILL:
        return ["No method clearly beat standing still in this run's own past.", walk]
    method, check = best
    return [
        f"That {method} came nearer to the weights at {check.ratio:g} times the last step (skill"
        f" {check.skill:+.2f}, {check.won} of {check.made} won) is no reason to extrapolate:"
        " without a lasting drift it comes from the optimizer's momentum and from chance.",
        walk,
    ]


def _too_little(record: dict[str, tuple[Check, ...]]) -> list[str]:
    """Why a drift with such a record is not extrapolated."""
    best = _best(record)
    if best is None:
        return ["No prediction of this run's own past could be checked twice."]
    method, check = best
    return [
        "No method beat standing still by a tenth of the squared error in three of four checks at"
        f" the nearest distances; the best, {method} at {check.ratio:g} times the last step: skill"
        f" {check.skill:+.2f}, {check.won} of {check.made} won."
    ]
