"""What popular accounts claim of RL runs, beside what this run shows: claimed, measured, interval,
how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from relexkit import ExtrapolationError
from relexkit.extension import Advice, Backtest, Gram, Options, Spectrum, backtest, percent

ABLATION = {
    "rank 1, line": Options(),
    "rank 2, line": Options(rank=2),
    "rank 4, line": Options(rank=4),
    "rank 1, parabola": Options(fit="polynomial"),
    "rank 2, parabola": Options(rank=2, fit="polynomial"),
    "rank 1, line through the last 10": Options(window=10),
    "rank 4, line through the last 10": Options(rank=4, window=10),
}
"""RELEX with more directions, curved fits and short windows: the grid behind one of the claims."""

_SHARED_TOKENS = "token_share/shared"
"""Metric by which ``relexkit train`` logs the share of the update that falls on tokens which both
sides of a batch have.
"""


_RELEX = "RELEX, arXiv:2605.21468"
_SOURCES = {
    "The first direction holds 92 % of the variance": _RELEX,
    "The first two directions hold 96 % of the variance": _RELEX,
    "The whole trajectory is a line, all else is noise": f"accounts of {_RELEX}",
    "50 steps and a line reach 20 times further at equal quality": _RELEX,
    "More directions or curved fits do not help": _RELEX,
    "Formatting and other shared tokens carry over 80 % of the update": (
        "accounts of DelTA, arXiv:2605.21467"
    ),
    "100 to 200 online steps, then DPO, beat 1000 online steps": "G2D, arXiv:2605.21266",
}


@dataclass(frozen=True)
class Claim:
    """One row of the table; ``verdict`` is ``holds``, ``fails``, ``no evidence`` or ``not
    measured``.
    """

    claimed: str
    measured: str
    interval: str
    how: str
    verdict: str

    @property
    def source(self) -> str:
        """Where it is claimed; empty if the source is not known."""
        return _SOURCES.get(self.claimed, "")


def measure_claims(
    gram: Gram, whole: Spectrum, result: Backtest, advice: Advice, metrics: Mapping[str, np.ndarray]
) -> list[Claim]:
    """The claims that a run's Gram matrices and metrics can test; the others say what would measure
    them.
    """
    claims = [
        _variance_claim(whole, "first", "The first direction holds 92 % of the variance", 0.92),
        _variance_claim(
            whole, "first_two", "The first two directions hold 96 % of the variance", 0.96
        ),
        _line_claim(advice),
        _reach_claim(result),
        _ablation_claim(gram),
        _token_claim(metrics),
    ]
    claims.append(
        Claim(
            "100 to 200 online steps, then DPO, beat 1000 online steps",
            "not measured",
            "",
            "relexkit g2d, several K of one run",
            "not measured",
        )
    )
    return claims


def _variance_claim(whole: Spectrum, statistic: str, claimed: str, share: float) -> Claim:
    null = whole.whole
    seen = null.observed[statistic]
    if not math.isfinite(seen):
        return Claim(claimed, "nothing to measure", "", "relexkit spectrum", "not measured")
    walk = f"a walk of its own gives {percent(null.expected[statistic])}"
    if not math.isfinite(null.p_value[statistic]):
        return Claim(
            claimed, percent(seen), walk, "relexkit spectrum --scope global", "no evidence"
        )
    low, high = percent(null.low[statistic]), percent(null.high[statistic])
    interval = f"{walk} (sign-flips {low} to {high}; p = {null.p_value[statistic]:.2g})"
    verdict = (
        "no evidence"
        if null.p_value[statistic] > 0.05
        else "holds"
        if seen >= share - 0.005
        else "fails"
    )
    return Claim(claimed, percent(seen), interval, "relexkit spectrum --scope global", verdict)


def _line_claim(advice: Advice) -> Claim:
    claimed, fit = "The whole trajectory is a line, all else is noise", advice.fit
    if fit is None:
        return Claim(claimed, "too few steps", "", "relexkit advise", "not measured")
    low, high = fit.drift_to_noise_interval
    lasting = (
        "does not turn"
        if math.isinf(fit.correlation_time)
        else f"lasts {fit.correlation_time:.3g} steps"
    )
    measured = f"drift to noise {fit.drift_to_noise:.2g}; direction {lasting}"
    verdict = (
        "no evidence"
        if fit.p_value > 0.05
        else "holds"
        if fit.correlation_time > fit.steps[-1] and low > 1
        else "fails"
    )
    return Claim(
        claimed,
        measured,
        f"{low:.2g} to {high:.2g}; p = {fit.p_value:.2g}",
        "relexkit advise",
        verdict,
    )


def _reach_claim(result: Backtest) -> Claim:
    claimed = "50 steps and a line reach 20 times further at equal quality"
    horizon = {h.method: h for h in result.horizon}.get("relex")
    if horizon is None or not horizon.num_prefixes:
        return Claim(
            claimed, "could not be checked", "", "relexkit backtest --method relex", "not measured"
        )
    measured = (
        "RELEX never beat standing still"
        if horizon.ratio <= 1
        else f"RELEX beat standing still to {horizon.ratio:.2f} times"
    )
    interval = (
        f"{horizon.low:.2f} to {horizon.high:.2f} over {horizon.num_prefixes} prefixes"
        " (weights only: not quality)"
    )
    verdict = "holds" if horizon.ratio >= 20 else "not measured" if horizon.beyond else "fails"
    return Claim(claimed, measured, interval, "relexkit backtest --method relex", verdict)


def _ablation_claim(gram: Gram) -> Claim:
    claimed = "More directions or curved fits do not help"
    errors: dict[str, np.ndarray] = {}
    for name, options in ABLATION.items():
        try:
            grid = backtest(gram, ["relex"], options=options).grid
        except ExtrapolationError:
            continue
        cells = {
            (row.until, row.target): row.relative_error for row in grid if row.method == "relex"
        }
        errors[name] = np.array([cells[key] for key in sorted(cells)]) if cells else np.empty(0)
    plain = errors.get("rank 1, line", np.empty(0))
    full = {
        name: e
        for name, e in errors.items()
        if len(e) == len(plain) and len(e) and np.isfinite(e).all()
    }
    if len(full) < 2:
        return Claim(claimed, "too few steps", "", "relexkit backtest", "not measured")
    best = min(full, key=lambda name: float(np.median(full[name])))
    medians = ", ".join(f"{name} {np.median(e):.2f}" for name, e in full.items())
    gain = 1 - float(np.median(full[best])) / float(np.median(plain))
    measured = (
        "none is better" if best == "rank 1, line" else f"{best}: {100 * gain:.0f} % less error"
    )
    verdict = "holds" if gain < 0.05 else "fails"
    return Claim(
        claimed,
        measured,
        f"median relative errors: {medians}",
        "relexkit backtest, ablation of RELEX",
        verdict,
    )


def _token_claim(metrics: Mapping[str, np.ndarray]) -> Claim:
    claimed = "Formatting and other shared tokens carry over 80 % of the update"
    values = metrics.get(_SHARED_TOKENS, np.empty(0))
    values = values[np.isfinite(values)]
    if not len(values):
        return Claim(
            claimed, "not measured", "", "relexkit train with token_shares: true", "not measured"
        )
    low, high = np.quantile(values, [0.05, 0.95])
    verdict = "holds" if np.median(values) > 0.8 else "fails"
    spread = f"{percent(float(low))} to {percent(float(high))} over steps"
    return Claim(
        claimed, percent(float(np.median(values))), spread, f"metric {_SHARED_TOKENS}", verdict
    )
