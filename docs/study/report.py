"""The tables and the figure of docs/study.md and docs/study-tables.md from the results that are
there.

    python docs/study/report.py [--results DIR]

Replaces what stands between the two marks in both pages, and the figure in docs/study/. Every
number says from how many seeds it comes. Intervals are of 95 %: over seeds (Student's t) from three
on; with fewer over the 512 problems, in pairs, marked by a dagger: these leave out how runs differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from arms import (
    ARMS,
    CUTS,
    METHODS,
    RATES,
    SMOLLM2,
    SORTING,
    SPELLING_WORDS,
    Arm,
    Subject,
    plain_arms,
    rate_name,
)
from kept_gram import every, load_gram
from scipy.optimize import isotonic_regression
from scipy.stats import t as student

from relexkit import Gram, spectrum
from relexkit.analysis import style
from relexkit.assess.advice import Advice, advise
from relexkit.assess.task_evidence import Worth, standing
from relexkit.geometry.trajectory_model import SPACED, fit_whole

HERE = Path(__file__).parent
MARKS = ("<!-- what report.py made -->", "<!-- end -->")
KINDS = ("greedy", "sampled")
SHOWN_STEPS = (25, 50, 75, 100, 150, 300)
COMPARED_STEPS = (50, 100, 150, 300)
LONGEST = 8.0
"""How many times as long as the run its drift may last: more than that a record cannot tell."""
ENOUGH = 3
"""Seeds from which an interval over seeds is given."""
DISTANCES = (7.5e-5, 1.5e-4, 3e-4, 7.5e-4, 1.5e-3, 2.25e-3, 2.5e-3, 7.5e-3, 1.5e-2, 2.25e-2)
"""Learning rate times step, where several rates have been evaluated."""
REACHES = (1e-4, 2.5e-4, 5e-4, 1e-3, 3e-3, np.inf)
TARGETS = {1e-6: (150,), 3e-6: (150, 300), 5e-6: (60,), 1e-5: (150, 300), 3e-5: (75,), 1e-4: (75,)}
"""Steps of plain training, by its rate, whose accuracy others are asked to reach."""

Result = dict[str, Any]


class Results:
    """The JSON files by arm, seed and question."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._advice: dict[tuple[str, int, int, int], Advice | None] = {}

    def seeds(self, arm: str) -> dict[int, Result]:
        """What training left, by seed."""
        found = sorted((self.folder / arm).glob("seed-?.json"))
        return {int(place.stem[5:]): json.loads(place.read_text()) for place in found}

    def others(self, arm: str, ending: str) -> dict[int, Result]:
        """Answers to another question, by seed."""
        found = sorted((self.folder / arm).glob(f"seed-?-{ending}.json"))
        return {int(place.stem[5]): json.loads(place.read_text()) for place in found}

    def gram(self, arm: str, seed: int) -> tuple[Gram, dict[str, np.ndarray]] | None:
        """Gram matrix of the whole model and the metric that says which steps were informative."""
        place = self.folder / arm / f"seed-{seed}-gram.npz"
        if not place.exists():
            return None
        return load_gram(place)

    def advice(self, arm: str, seed: int, cut: int, interval: int = 1) -> Advice | None:
        """Advice on the steps to ``cut`` if only every so many had been saved; asked once."""
        key = (arm, seed, cut, interval)
        if key not in self._advice:
            kept = self.gram(arm, seed)
            self._advice[key] = None if kept is None else advised(*kept, cut, interval)
        return self._advice[key]


# -- numbers ---------------------------------------------------------------------------------------


def right(answer: Result, kind: str) -> np.ndarray:
    """Which of the problems were right, ``float64 [problems]``."""
    bits = np.frombuffer(bytes.fromhex(answer[f"{kind}_right"]), np.uint8)
    return np.unpackbits(bits).astype(np.float64)


def mean_text(right_SN: np.ndarray, sign: bool = False) -> str:
    """Mean over seeds and problems with its interval, of accuracies or of paired differences."""
    num_seeds, means = len(right_SN), right_SN.mean(axis=1)
    if num_seeds >= ENOUGH:
        error = means.std(ddof=1) / np.sqrt(num_seeds)
        half, mark = student.ppf(0.975, num_seeds - 1) * error, ""
    else:
        by_problem = right_SN.mean(axis=0)
        half, mark = 1.96 * by_problem.std(ddof=1) / np.sqrt(len(by_problem)), "†"
    form = f"{'+' if sign else ''}.3f"
    return f"{means.mean():{form}} ± {half:.3f}{mark}"


def at_step(result: Result, step: int) -> Result | None:
    """A place on the curve of a run."""
    return next((c for c in result["curve"] if c["step"] == step), None)


def until(result: Result, step: int) -> Result:
    """A run as it was at a step."""
    return result | {"curve": [c for c in result["curve"] if c["step"] <= step]}


def curve(result: Result, kind: str, chosen: np.ndarray | None = None) -> np.ndarray:
    """Rollouts in thousands and accuracy along a run, the latter never falling, ``[2, places]``.

    ``chosen`` are indices of the problems that count.
    """
    per_step = result["rollouts_per_step"] / 1000
    rows = [right(c, kind) for c in result["curve"]]
    accuracy = [r.mean() if chosen is None else r[chosen].mean() for r in rows]
    return np.array(
        [
            [(c["trained"] + c.get("tests", 0)) * per_step for c in result["curve"]],
            isotonic_regression(accuracy).x,
        ]
    )


def rollouts_to(places: np.ndarray, accuracy: float) -> float:
    """Rollouts after which a curve reaches an accuracy, between places in proportion; infinite if
    it does not.
    """
    rollouts, reached = places
    later = np.flatnonzero(reached >= accuracy)
    if not len(later):
        return float("inf")
    last = int(later[0])
    if last == 0:
        return float(rollouts[0])
    share = (accuracy - reached[last - 1]) / (reached[last] - reached[last - 1])
    return float(rollouts[last - 1] + share * (rollouts[last] - rollouts[last - 1]))


def savings(plain: dict[int, Result], other: dict[int, Result], kind: str, step: int) -> str:
    """How many times fewer rollouts ``other`` takes to the accuracy of ``plain`` at a step, or to
    its own best if that is less, and which accuracy that is on average.
    """
    seeds = [s for s in plain if s in other and at_step(plain[s], step)]
    if not seeds:
        return ""

    def ratio(seed: int, chosen: np.ndarray | None) -> tuple[float, float]:
        places, others = (curve(r, kind, chosen) for r in (until(plain[seed], step), other[seed]))
        target = min(places[1][-1], others[1].max())
        needed = rollouts_to(others, target)
        return (rollouts_to(places, target) / needed if needed else np.nan), target

    logs, targets = np.array([ratio(seed, None) for seed in seeds]).T
    if not np.isfinite(logs).all():
        return "never above the base"
    logs = np.log(logs)
    if len(seeds) >= ENOUGH:
        half = student.ppf(0.975, len(seeds) - 1) * logs.std(ddof=1) / np.sqrt(len(seeds))
        low, high, mark = logs.mean() - half, logs.mean() + half, ""
    else:
        rng = np.random.default_rng(0)
        problems = len(right(plain[seeds[0]]["curve"][0], kind))
        draws = rng.integers(0, problems, (200, problems))
        means = [np.log([ratio(seed, drawn)[0] for seed in seeds]).mean() for drawn in draws]
        (low, high), mark = np.nanquantile(means, (0.025, 0.975)), "†"
    middle, low, high = np.exp([logs.mean(), low, high])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]{mark} to {targets.mean():.3f}"


def scientific(value: float) -> str:
    """``2.5e-4`` for 0.00025."""
    return np.format_float_scientific(value, trim="-", exp_digits=1)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- tables ----------------------------------------------------------------------------------------


def rates_table(
    results: Results, subject: Subject = SORTING, steps: Sequence[int] = SHOWN_STEPS
) -> str:
    """Accuracy of plain training by rate and step."""
    rows = []
    for rate, arm in plain_arms(subject).items():
        found = results.seeds(arm.name)
        if not found:
            continue
        cells = []
        for step in steps:
            places = [p for p in (at_step(r, step) for r in found.values()) if p]
            both = " / ".join(
                f"{np.mean([p[kind] for p in places]):.3f}" for kind in KINDS if places
            )
            fewer = f" ({len(places)})" if 0 < len(places) < len(found) else ""
            cells.append(both + fewer)
        rows.append([rate_name(rate), str(len(found)), *cells])
    return table(("rate", "seeds", *(f"step {s}" for s in steps)), rows)


def distance_table(results: Results) -> str:
    """Accuracy of plain training by how far it has gone, whatever the rate: rate times step."""
    plain = {rate: results.seeds(arm.name) for rate, arm in plain_arms(SORTING).items()}
    rows = []
    for distance in DISTANCES:
        cells = []
        for rate, found in plain.items():
            step = distance / rate
            places = [p for r in found.values() if (p := at_step(r, round(step)))]
            whole = abs(step - round(step)) < 1e-6 and places
            mean = " / ".join(
                f"{np.mean([p[kind] for p in places]):.3f}" for kind in KINDS if whole
            )
            cells.append(f"{mean} ({len(places)})" if whole else "")
        rows.append([scientific(distance), *cells])
    return table(("rate x step", *map(rate_name, plain)), rows)


def savings_table(results: Results, subject: Subject = SORTING) -> str:
    """Jumps, other batches and warm-up against plain training at the same rate, and every rate
    against each other.
    """
    rows = []
    plain = plain_arms(subject)
    for rate, arm in plain.items():
        others = [a for a in ARMS.values() if a.subject is subject and a.rate == rate]
        others = [a for a in others if a.jumps or a.control]
        others += [larger for other, larger in plain.items() if other > rate]
        for step in TARGETS.get(rate, ()):
            reached = {s: r for s, r in results.seeds(arm.name).items() if at_step(r, step)}
            for other in others:
                found = {s: r for s, r in results.seeds(other.name).items() if s in reached}
                if found:
                    cells = [savings(reached, found, kind, step) for kind in KINDS]
                    rows.append([rate_name(rate), str(step), other.name, str(len(found)), *cells])
    return table(("plain at", "to step", "against", "seeds", "greedy", "sampled"), rows)


def jumps_table(results: Results) -> str:
    """Accuracy after so many trained steps, with the jumps."""
    rows = []
    for arm in ARMS.values():
        found = results.seeds(arm.name) if arm.jumps else {}
        if not found:
            continue
        for place in next(iter(found.values()))["curve"]:
            if not place["jumped"]:
                continue
            pairs = [
                (before, after)
                for result in found.values()
                for before, after in zip(result["curve"], result["curve"][1:], strict=False)
                if after["step"] == place["step"]
            ]
            cells = []
            for kind in KINDS:
                after = np.array([right(a, kind) for _, a in pairs])
                before = np.array([right(b, kind) for b, _ in pairs])
                cells += [f"{after.mean():.3f}", mean_text(after - before, sign=True)]
            rows.append([arm.name, str(len(pairs)), str(place["trained"]), *cells])
    head = (
        "arm",
        "seeds",
        "trained steps",
        "greedy",
        "of it the jump",
        "sampled",
        "of it the jump",
    )
    return table(head, rows)


def predictions_table(results: Results, subject: Subject = SORTING) -> str:
    """Predicted steps on the task, hold beside every row."""
    rows = []
    for arm in plain_arms(subject).values():
        curves = results.seeds(arm.name)
        for cut in sorted(arm.cuts):
            found = results.others(arm.name, f"from-{cut}")
            for ratio in subject.ratios if found else ():
                rows.append(_prediction_row(arm, cut, round(ratio * cut), found, curves))
    head = ("rate", "from", "to", "seeds", "hold", "trained", "average", *subject.methods)
    return table(head, rows)


def _prediction_row(
    arm: Arm, cut: int, target: int, found: dict[int, Result], curves: dict[int, Result]
) -> list[str]:
    def answers(method: str, at: int) -> np.ndarray:
        return np.array(
            [
                right(row, "greedy")
                for result in found.values()
                for row in result["predictions"]
                if (row["method"], row["target"]) == (method, at)
            ]
        )

    hold, average = answers("hold", cut), answers("average", cut)
    places = [
        result["trained"].get(str(target)) or (seed in curves and at_step(curves[seed], target))
        for seed, result in found.items()
    ]
    trained = (
        ""
        if not all(places)
        else mean_text(np.array([right(p, "greedy") for p in places]) - hold, True)
    )
    gains = [mean_text(answers(method, target) - hold, sign=True) for method in arm.subject.methods]
    return [
        rate_name(arm.rate),
        str(cut),
        str(target),
        str(len(found)),
        f"{hold.mean():.3f}",
        trained,
        mean_text(average - hold, sign=True),
        *gains,
    ]


def reach_table(results: Results) -> str:
    """Mean gain of predictions over hold by how far they reach, whatever the rate."""
    gains: dict[tuple[float, str], list[float]] = {}
    for arm in plain_arms(SORTING).values():
        for reach, method, gain in _reached(results, arm):
            upper = next(bound for bound in REACHES if reach <= bound * 1.001)
            gains.setdefault((upper, method), []).append(gain)
    rows = []
    for lower, upper in pairwise((0.0, *REACHES)):
        cells = []
        for method in METHODS:
            found = np.array(gains.get((upper, method), []))
            if len(found):
                cells.append(f"{found.mean():+.3f} ({np.sum(found > 0)} of {len(found)})")
        between = (
            f"{scientific(lower)} to {scientific(upper)}" if lower else f"to {scientific(upper)}"
        )
        rows.append([between if upper < np.inf else f"above {scientific(lower)}", *cells])
    return table(("rate x predicted step", *METHODS), rows)


def _reached(results: Results, arm: Arm) -> Iterable[tuple[float, str, float]]:
    """Rate times predicted step, method and gain over hold of all predictions of an arm's runs."""
    for cut in arm.cuts:
        for result in results.others(arm.name, f"from-{cut}").values():
            rows = result["predictions"]
            hold = next(row["greedy"] for row in rows if row["method"] == "hold")
            for row in rows:
                yield arm.rate * row["target"], row["method"], row["greedy"] - hold


def line_table(results: Results) -> str:
    """What a run looks like from its own record, and what the advice says of it."""
    rows = []
    for arm in ARMS.values():
        for seed in results.seeds(arm.name):
            kept = results.gram(arm.name, seed)
            if kept is None:
                continue
            for cut in (50, 150):
                if kept[0].steps[-1] >= cut:
                    cells = _line_cells(results, arm.name, seed, cut)
                    rows.append([arm.name, str(seed), str(cut), *cells])
    head = (
        "run",
        "seed",
        "until",
        "first direction (walk)",
        "first two (walk)",
        "drift to noise",
        "lasting",
        "advice, every step saved",
        "every 5th",
        "every 10th",
        "the rate could be",
    )
    return table(head, rows)


def _line_cells(results: Results, arm: str, seed: int, cut: int) -> list[str]:
    kept, found = results.gram(arm, seed), results.advice(arm, seed, cut)
    assert kept is not None
    assert found is not None
    whole, fit = spectrum(kept[0].until(cut), scope="global").whole, found.fit
    assert fit is not None
    others = [results.advice(arm, seed, cut, interval) for interval in (5, 10)]
    lasting = fit.correlation_time
    return [
        *(
            f"{style.percent(float(whole.observed[n]))} ({style.percent(float(whole.expected[n]))})"
            for n in ("first", "first_two")
        ),
        "{:.2g} ({:.2g} to {:.2g})".format(fit.drift_to_noise, *fit.drift_to_noise_interval),
        "on" if np.isinf(lasting) else f"{lasting:.3g}",
        *(said(advice) for advice in (found, *others) if advice),
        f"times {rate_factor(found):.2g}",
    ]


def advised(matrices: Gram, metrics: dict[str, np.ndarray], cut: int, interval: int) -> Advice:
    """Advice on the steps to ``cut`` if only every so many had been saved."""
    saved, rows = every(matrices.until(cut), interval)
    return advise(saved, {name: values[rows] for name, values in metrics.items()})


def said(advice: Advice) -> str:
    """An advice in a table."""
    if advice.target is None:
        return advice.verdict
    return f"to {advice.target} by {advice.method}"


def rate_factor(advice: Advice) -> float:
    """By what factor the record says that the rate could be raised; 1 without evidence of a drift.

    At a small rate a run's drift keeps its direction for a distance, so ``k`` times the rate makes
    its correlation time ``ell / k``. The drift stands above the noise after ``T / rho_T`` steps,
    whatever the rate. Where the two meet the run is no line any more: ``k = ell rho_T / T``.
    """
    fit = advice.fit
    if fit is None or fit.p_value > 0.05:
        return 1.0
    lasting = min(fit.correlation_time / float(fit.steps[-1]), LONGEST)
    return max(1.0, fit.drift_to_noise * lasting)


DRAWN_FROM = tuple(plain_arms(SORTING)[rate] for rate in RATES[1:])
"""The runs from which the advice's bound was drawn; others are new to it."""


def worth_rows(results: Results) -> list[Worth]:
    """What predictions by the drift gained on the task: the table of
    ``relexkit.assess.task_evidence``.
    """
    rows = []
    for arm in DRAWN_FROM:
        for cut in sorted(CUTS):
            cases = predicted_twice(results, arm, cut)
            gains = {
                seed: (standing(case.advice.fit), case.gained, case.trained)
                for seed, case in cases.items()
                if case.advice.fit is not None and np.isfinite(case.trained)
            }
            if gains:
                stand, gained, trained_by = np.array(list(gains.values())).T
                spread = (round(float(stand.min()), 2), round(float(stand.max()), 2))
                means = (round(float(v.mean()), 3) for v in (gained, trained_by))
                rows.append(Worth(rate_name(arm.rate), cut, 2 * cut, tuple(gains), spread, *means))
    return rows


def confusion_table(results: Results) -> str:
    """Advice after so many steps against what the drift's prediction of twice as many gained."""
    outcomes = ("gained half of what training did, or more", "gained less", "lost")
    kinds = {
        "from which its bound was drawn": lambda arm: arm in DRAWN_FROM,
        "others of the small model": lambda arm: arm not in DRAWN_FROM and arm.subject is SORTING,
        "SmolLM2": lambda arm: arm.subject is SMOLLM2,
    }
    rows = []
    for kind, belongs in kinds.items():
        counts: dict[str, np.ndarray] = {}
        for arm in filter(belongs, ARMS.values()):
            for cut in arm.cuts:
                for case in predicted_twice(results, arm, cut).values():
                    gained, trained = case.gained, case.trained
                    outcome = 0 if gained >= trained / 2 else 1 if gained >= 0 else 2
                    tally = counts.setdefault(case.advice.verdict, np.zeros(3, np.int64))
                    tally[outcome] += 1
        rows += [[kind, verdict, *map(str, tally)] for verdict, tally in counts.items()]
    return table(("runs", "advice", *outcomes), rows)


@dataclass(frozen=True)
class Case:
    """Advice at a step, and what the drift's prediction of twice as many steps and training to
    them gained in greedy accuracy; NaN where training did not go so far.
    """

    advice: Advice
    gained: float
    trained: float


def predicted_twice(results: Results, arm: Arm, cut: int) -> dict[int, Case]:
    """By seed, of finished runs that were asked and of those whose first jump it was."""
    plain, cases = results.seeds(arm.name), {}
    jumped = results.seeds(f"drift-25+25-{rate_name(arm.rate)}")
    known = results.others(arm.name, f"from-{cut}")
    if cut == 25 and arm in DRAWN_FROM:
        known |= jumped
    for seed, result in known.items():
        predicted = _first_jump(result) if "curve" in result else _by_drift(result, 2 * cut)
        held, trained = (at_step(plain[seed], s) if seed in plain else None for s in (cut, 2 * cut))
        advice = results.advice(arm.name, seed, cut)
        if advice and held and predicted:
            reached = trained["greedy"] if trained else np.nan
            before = held["greedy"]
            cases[seed] = Case(advice, predicted["greedy"] - before, reached - before)
    return cases


def _first_jump(result: Result) -> Result | None:
    return next((c for c in result["curve"] if c["jumped"]), None)


def _by_drift(result: Result, target: int) -> Result | None:
    rows = result["predictions"]
    return next((r for r in rows if (r["method"], r["target"]) == ("drift", target)), None)


def worth_table(results: Results) -> str:
    """The evidence that the advice knows of."""
    rows = [
        (
            w.rate,
            f"{w.until} to {w.target}",
            str(len(w.seeds)),
            "{:.2g} to {:.2g}".format(*w.standing),
            f"{w.gained:+.3f}",
            f"{w.trained:+.3f}",
        )
        for w in worth_rows(results)
    ]
    head = ("rate", "predicted", "seeds", "drift to noise x lasting", "gained", "trained")
    return table(head, rows)


def advice_table(results: Results) -> str:
    """What the advice said against what predictions did on the task."""
    rows = []
    asked = [(arm, cut) for arm in ARMS.values() for cut in sorted(arm.cuts)]
    for arm, cut in asked:
        for seed, result in results.others(arm.name, f"from-{cut}").items():
            advice = results.advice(arm.name, seed, cut)
            if advice is None:
                continue
            by_key = {(r["method"], r["target"]): r for r in result["predictions"]}
            hold = right(by_key["hold", cut], "greedy")
            gains = {
                key: (right(row, "greedy") - hold).mean()
                for key, row in by_key.items()
                if key[0] in METHODS and key[1] <= 2 * cut
            }
            best = max(gains, key=lambda key: gains[key])
            wanted = (advice.method, advice.target)
            did = f"{gains[wanted]:+.3f}" if wanted in gains else ""
            cells = [
                f"{best[0]} to {best[1]}: {gains[best]:+.3f}",
                f"{gains['relex', 2 * cut]:+.3f}",
            ]
            rows.append([arm.name, str(seed), str(cut), said(advice), did, *cells])
    head = (
        "run",
        "seed",
        "from",
        "advice",
        "what it gained",
        "best of all to twice the steps",
        "RELEX to twice the steps",
    )
    return table(head, rows)


def systems_table(
    results: Results, subject: Subject = SORTING, steps: Sequence[int] = COMPARED_STEPS
) -> str:
    """Arms without jumps against plain training at the same rate and the same steps."""
    rows = []
    plain = plain_arms(subject)
    for arm in ARMS.values():
        if arm.subject is subject and not arm.jumps and arm is not plain[arm.rate]:
            beside = results.seeds(plain[arm.rate].name)
            rows += _system_rows(arm, results.seeds(arm.name), beside, steps)
    head = ("arm", "seeds", "step", "greedy", "against plain", "sampled", "against plain")
    return table(head, rows)


def _system_rows(
    arm: Arm, found: dict[int, Result], plain: dict[int, Result], steps: Sequence[int]
) -> list[list[str]]:
    rows = []
    for step in steps:
        pairs = [
            (at_step(found[seed], step), at_step(plain[seed], step))
            for seed in found
            if seed in plain
        ]
        whole = [(a, b) for a, b in pairs if a and b]
        if not whole:
            continue
        cells = []
        for kind in KINDS:
            own = np.array([right(a, kind) for a, _ in whole])
            other = np.array([right(b, kind) for _, b in whole])
            cells += [f"{own.mean():.3f}", mean_text(own - other, sign=True)]
        rows.append([arm.name, str(len(whole)), str(step), *cells])
    return rows


def g2d_table(results: Results, subject: Subject = SORTING) -> str:
    """G2D by K and pairs."""
    rows = []
    for rate, arm in plain_arms(subject).items():
        found = results.others(arm.name, "g2d")
        for first in next(iter(found.values()))["rows"] if found else ():
            key = (first["pairs"], first["k"])
            same = [
                row for r in found.values() for row in r["rows"] if (row["pairs"], row["k"]) == key
            ]
            before, after = (np.mean([row[name] for row in same]) for name in ("before", "after"))
            pairs = np.mean([row["informativeness"]["pairs"] for row in same])
            cells = [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
            rows.append([rate_name(rate), *map(str, key), str(len(same)), f"{pairs:.0f}", *cells])
    return table(("rate", "pairs from", "K", "seeds", "pairs", "before DPO", "after", "gain"), rows)


def precision_table(results: Results) -> str:
    """Exports in bfloat16, and RELEX and two-point lines through them."""
    rows = []
    for rate in RATES:
        found = results.others(f"plain-{rate_name(rate)}", "precision")
        for cut in (50, 100) if found else ():
            exact = np.mean([r["float32"][str(cut)]["greedy"] for r in found.values()])
            for rounding in ("nearest", "stochastic"):
                recorded = np.mean(
                    [r[rounding]["recorded"][str(cut)]["greedy"] for r in found.values()]
                )
                predictions: dict[str, list[float]] = {}
                for result in found.values():
                    for row in result[rounding]["predictions"]:
                        if row["until"] == cut:
                            name = f"{row['method']} to {row['target']}"
                            predictions.setdefault(name, []).append(row["greedy"])
                told = "; ".join(f"{n} {np.mean(v):.3f}" for n, v in predictions.items())
                cells = [f"{exact:.3f}", rounding, f"{recorded:.3f}", told]
                rows.append([rate_name(rate), str(cut), str(len(found)), *cells])
    head = ("rate", "step", "seeds", "float32", "export", "as exported", "predicted from exports")
    return table(head, rows)


def done_table(results: Results) -> str:
    """Which arms have results: seeds, steps, other questions."""
    rows = []
    for arm in ARMS.values():
        found = results.seeds(arm.name)
        if found:
            steps = ", ".join(f"{seed}: {result['steps']}" for seed, result in found.items())
            more = sorted(
                place.stem[7:] + f" (seed {place.stem[5]})"
                for place in (results.folder / arm.name).glob("seed-?-*.json")
            )
            rows.append([arm.name, steps, ", ".join(more)])
    return table(("arm", "seed: steps", "further answers"), rows)


# -- figure and page -------------------------------------------------------------------------------


def mean_curve(found: dict[int, Result], kind: str, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Thousand rollouts and mean accuracy over seeds, as far as all of them go: at the places that
    they share, or else every ``step`` thousand, between places in proportion.
    """
    curves = [
        (
            np.array([c["trained"] + c.get("tests", 0) for c in r["curve"]])
            * (r["rollouts_per_step"] / 1000),
            np.array([c[kind] for c in r["curve"]]),
        )
        for r in found.values()
    ]
    shared = min(len(x) for x, _ in curves)
    first = curves[0][0][:shared]
    if all(np.array_equal(x[:shared], first) for x, _ in curves):
        return first, np.mean([y[:shared] for _, y in curves], axis=0)
    grid = np.arange(0, min(x[-1] for x, _ in curves) + step / 2, step)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


SHADES = dict(
    zip(RATES, ("#B0B0B0", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#404040"), strict=True)
)
LOOKS = {None: "-", "adaptive": "--", "relex": ":", "drift": "-."}
"""How lines are drawn, by the kind of jumps."""


def draw_curves(results: Results, folder: Path) -> None:
    """Accuracy against rollouts: rates as colours, kinds of jumps as lines."""
    with style.styled():
        figure = style.new_figure(3.2)
        axes = figure.subplots(1, 2)
        for arm in ARMS.values():
            found = results.seeds(arm.name)
            plain = arm.name == f"plain-{rate_name(arm.rate)}"
            adaptive = arm.name.startswith("adaptive")
            usual = arm.jump is not None and arm.jump[1:] == (25, 25) and arm.rate == 3e-6
            if not found or not (plain or usual or adaptive):
                continue
            jumps = None if plain else "adaptive" if adaptive else arm.jump[0]
            if jumps not in LOOKS:
                continue
            for axis, kind in zip(axes, KINDS, strict=True):
                x, y = mean_curve(found, kind, 3.2)
                names = {None: "", "adaptive": ", adaptive jumps"}
                label = rate_name(arm.rate) + names.get(jumps, f", {jumps} 25+25")
                axis.plot(
                    x,
                    y,
                    LOOKS[jumps],
                    color=SHADES[arm.rate],
                    marker="o",
                    markersize=2.5,
                    label=label,
                )
                axis.set(xlabel="thousand rollouts", ylabel=f"{kind} accuracy", xlim=(0, 40))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        style.save(figure, folder, "curves")
    for other in ("svg", "pdf"):
        (folder / f"curves.{other}").unlink(missing_ok=True)


def draw_reach(results: Results, folder: Path) -> None:
    """What predictions gained on the task by how far they reach: learning rate times the step that
    they are for, the farthest that a weight can have moved by then.
    """
    with style.styled():
        figure = style.new_figure(3.3)
        panels = figure.subplots(1, 2, sharey=True)
        for arm in (*plain_arms(SORTING).values(), *plain_arms(SMOLLM2).values()):
            small = arm.subject is SORTING
            color = SHADES[arm.rate] if small else RANDOM
            label = rate_name(arm.rate) if small else f"SmolLM2, {rate_name(arm.rate)}"
            for axis, method in zip(panels, ("relex", "drift"), strict=True):
                found = [(x, gain) for x, name, gain in _reached(results, arm) if name == method]
                places = np.array(found).reshape(-1, 2)
                if len(places):
                    marker = "o" if small else "D"
                    axis.plot(*places.T, marker, color=color, markersize=2.5, label=label)
        for axis, name in zip(panels, ("RELEX", "drift model"), strict=True):
            axis.axhline(0, color="k", linewidth=0.6)
            axis.set(title=name, xscale="log", xlabel="learning rate x predicted step")
            axis.set_xticks([1e-4, 1e-3, 1e-2, 1e-1], ["1e-4", "1e-3", "1e-2", "1e-1"])
            axis.minorticks_off()
        panels[0].set_ylabel("greedy accuracy, over hold")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        style.save(figure, folder, "reach")
    for other in ("svg", "pdf"):
        (folder / f"reach.{other}").unlink(missing_ok=True)


RANDOM = "#CC79A7"
PREFIXES = (15, 20, 25, 35, 50, 75, 100)


def draw_control(results: Results, folder: Path) -> None:
    """Rewards of the task against random ones: the share of the first direction and the drift to
    noise by the number of recorded steps, with the walk of each run's own updates.
    """
    random = "random-rewards"
    with style.styled():
        figure = style.new_figure(3.2)
        share, drift = figure.subplots(1, 2)
        for rate, kind in ((3e-6, "plain"), (1e-5, "plain"), (1e-4, "plain"), (3e-6, random)):
            name = f"{kind}-{rate_name(rate)}"
            color = RANDOM if kind == random else SHADES[rate]
            label = f"{rate_name(rate)}, {'random rewards' if kind == random else 'the task'}"
            for seed in results.seeds(name):
                kept = results.gram(name, seed)
                if kept is None:
                    continue
                until = [cut for cut in PREFIXES if cut <= kept[0].steps[-1]]
                wholes = [spectrum(kept[0].until(cut), scope="global").whole for cut in until]
                fits = [fit_whole(kept[0].until(cut), SPACED) for cut in until]
                first = [100 * float(whole.observed["first"]) for whole in wholes]
                line = {"color": color, "marker": "o", "markersize": 2, "linewidth": 0.8}
                share.plot(until, first, label=label, **line)
                drift.plot(until, [fit.drift_to_noise if fit else np.nan for fit in fits], **line)
                if name == "plain-3e-6":
                    walk = [100 * float(whole.expected["first"]) for whole in wholes]
                    share.plot(until, walk, "k--", linewidth=0.6, label="a walk of its updates")
                label = "_"
        share.set(xlabel="recorded steps", ylabel="first direction, % of variance")
        drift.axhline(1, color="k", linestyle="--", linewidth=0.6)
        drift.set(xlabel="recorded steps", ylabel="drift to noise", yscale="log")
        drift.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
        handles = dict(zip(*share.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
        style.save(figure, folder, "control")
    for other in ("svg", "pdf"):
        (folder / f"control.{other}").unlink(missing_ok=True)


PAGES: dict[str, dict[str, Callable[[Results], str]]] = {
    "study.md": {
        "Plain training, greedy / sampled accuracy": rates_table,
        "Plain training by distance, greedy / sampled (seeds)": distance_table,
        "Times fewer rollouts to plain training's accuracy": savings_table,
        "Predictions by how far they reach: mean gain over hold (how many gained)": reach_table,
        "Words backward, plain training": partial(rates_table, subject=SPELLING_WORDS),
        "Words backward, times fewer rollouts": partial(savings_table, subject=SPELLING_WORDS),
        "What a drift was worth on the task": worth_table,
        "Advice against the task": confusion_table,
        "Other systems, other batches, KL, random rewards, warm-up": systems_table,
        "G2D": g2d_table,
        "Precision": precision_table,
        "SmolLM2, plain training": partial(rates_table, subject=SMOLLM2, steps=(0, 15, 30, 45, 60)),
        "SmolLM2, times fewer rollouts": partial(savings_table, subject=SMOLLM2),
        "SmolLM2, predicted steps": partial(predictions_table, subject=SMOLLM2),
        "SmolLM2, LamPO": partial(systems_table, subject=SMOLLM2, steps=(15, 30)),
        "SmolLM2, G2D": partial(g2d_table, subject=SMOLLM2),
    },
    "study-tables.md": {
        "Jumps inside the training": jumps_table,
        "Predicted steps on the task: greedy accuracy against hold": predictions_table,
        "What the record of a run says": line_table,
        "Advice against the task, run by run": advice_table,
        "What has been run": done_table,
    },
}
"""What stands between the marks of each page."""


def write_report(results: Results, folder: Path) -> None:
    """Put the tables into the pages of the study and the figures beside the scripts; what has no
    results yet is named.
    """
    draw_curves(results, folder)
    draw_control(results, folder)
    draw_reach(results, folder)
    for name, sections in PAGES.items():
        made = {heading: make(results) for heading, make in sections.items()}
        level = "###" if name == "study.md" else "##"  # there below a heading of its own
        pieces = [f"{level} {h}\n\n{t}" for h, t in made.items() if t.count("\n") >= 2]
        lacking = [h for h, t in made.items() if t.count("\n") < 2]
        if lacking:
            pieces.append("Without results so far: " + "; ".join(lacking) + ".")
        page = folder.parent / name
        before, _, rest = page.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        middle = "\n\n".join(pieces)
        page.write_text(f"{before}{MARKS[0]}\n\n{middle}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    write_report(Results(parser.parse_args().results), HERE)
