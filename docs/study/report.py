"""The tables and figures of docs/study.md from the results of study.py.

    python docs/study/report.py OUT/results.json

Replaces what stands between the two marks in docs/study.md, and the figures in docs/study/.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import t as student

from analysis import style
from trainer.credit.gradient_noise import noise_scale

Seed = dict[str, Any]
MARKS = ("<!-- what study.py measured -->", "<!-- end -->")
COLOURS = {
    "GRPO": style.NULL,
    "DelTA": style.RUN,
    "LamPO": style.SECOND,
    "LamPO + DelTA": style.THIRD,
    "re-grounding, RELEX": "#CC79A7",
    "re-grounding, model": "#E69F00",
}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval over seeds (Student's t)."""
    mean = float(np.mean(values))
    half = float(
        student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    )
    return mean, mean - half, mean + half


def over_seeds(values: Iterable[float], sign: bool = False, digits: int = 3) -> str:
    """A mean with its interval."""
    mean, low, high = interval(list(values))
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arms_table(results: list[Seed]) -> str:
    """Every arm after its last step."""
    rows = []
    for arm in results[0]["arms"]:
        found = [seed["arms"][arm] for seed in results]
        plain = [seed["arms"]["GRPO"] for seed in results]

        def against(kind: str, found: list[Any] = found, plain: list[Any] = plain) -> str:
            pairs = zip(found, plain, strict=True)
            return over_seeds([a["final"][kind] - b["final"][kind] for a, b in pairs], sign=True)

        first = arm == "GRPO"
        rows.append(
            [
                arm,
                over_seeds(f["final"]["greedy"] for f in found),
                "" if first else against("greedy"),
                over_seeds(f["final"]["sampled"] for f in found),
                "" if first else against("sampled"),
                f"{np.mean([f['trained_steps'] for f in found]):.0f}",
                f"{np.mean([f['tokens'] for f in found]) / 1000:.0f}",
            ]
        )
    head = ("", "greedy", "against GRPO", "sampled", "against GRPO", "trained steps", "1000 tokens")
    return table(head, rows)


def g2d_table(results: list[Seed]) -> str:
    """G2D by K."""
    rows = []
    for index, first in enumerate(results[0]["g2d"]):
        found = [seed["g2d"][index] for seed in results]
        told = [f["informativeness"] for f in found]
        final = [seed["arms"]["GRPO"]["final"]["greedy"] for seed in results]

        def mean(name: str, told: list[Any] = told) -> float:
            return float(np.mean([entry[name] for entry in told]))

        rows.append(
            [
                str(first["k"]),
                first["pairs"],
                f"{mean('pairs'):.0f}",
                f"{mean('entropy'):.3f}",
                f"{mean('margin'):+.3f}",
                f"{mean('accuracy_spread'):.3f}",
                over_seeds(f["before"] for f in found),
                over_seeds(f["after"] for f in found),
                over_seeds([f["after"] - f["before"] for f in found], sign=True),
                over_seeds(
                    [f["after"] - last for f, last in zip(found, final, strict=True)], sign=True
                ),
            ]
        )
    rows.sort(key=lambda row: (row[1] == "fresh", int(row[0])))
    head = (
        "K",
        "pairs from",
        "pairs",
        "entropy",
        "margin",
        "spread",
        "GRPO(K)",
        "after DPO",
        "gain",
        "against the whole run",
    )
    return table(head, rows)


def extrapolation_table(results: list[Seed]) -> str:
    """Predictions of the last step, on the task."""
    steps = results[0]["steps"]
    rows = []
    for index, first in enumerate(results[0]["extrapolated"]["predictions"]):
        if first["method"] == "hold":
            continue
        found = [seed["extrapolated"]["predictions"][index] for seed in results]
        observed = [
            seed["extrapolated"]["observed"][str(first["until"])]["greedy"] for seed in results
        ]
        final = [seed["arms"]["GRPO"]["final"]["greedy"] for seed in results]
        rows.append(
            [
                str(first["until"]),
                first["method"],
                over_seeds(observed),
                over_seeds(f["greedy"] for f in found),
                over_seeds(
                    [f["greedy"] - o for f, o in zip(found, observed, strict=True)], sign=True
                ),
                over_seeds(
                    [f["greedy"] - last for f, last in zip(found, final, strict=True)], sign=True
                ),
            ]
        )
    head = (
        "T_cut",
        "method",
        "observed at T_cut",
        f"predicted for {steps}",
        "against T_cut",
        f"against trained {steps}",
    )
    return table(head, rows)


def claims_table(results: list[Seed]) -> str:
    """What accounts of such runs claim, beside what these runs show."""
    steps = results[0]["steps"]

    def geometry(name: str) -> str:
        observed, walk = (
            float(np.mean([seed["extrapolated"]["geometry"][name][kind] for seed in results]))
            for kind in ("observed", "walk")
        )
        return f"{style.percent(observed)}; a walk without direction gives {style.percent(walk)}"

    drift = [seed["extrapolated"]["geometry"]["drift_to_noise"] for seed in results]
    lows = sum(entry is not None and entry[1] > 1 for entry in drift)
    trained = [seed["arms"]["GRPO"]["final"]["greedy"] for seed in results]
    half = [
        next(
            p["greedy"]
            for p in seed["extrapolated"]["predictions"]
            if (p["method"], p["until"]) == ("relex", steps // 2)
        )
        for seed in results
    ]
    errors = {
        name: over_seeds(seed["extrapolated"]["ablation"][name] for seed in results)
        for name in results[0]["extrapolated"]["ablation"]
    }
    shared = over_seeds(seed["arms"]["GRPO"]["shares"]["token_share/shared"] for seed in results)
    scales = {}
    for arm in ("GRPO", "LamPO", "DelTA", "LamPO + DelTA"):
        noise = [seed["arms"][arm]["noise"] for seed in results]
        scales[arm] = noise_scale([n["trace"] for n in noise], [n["signal"] for n in noise])
    k, pairs, after = best_early_g2d(results)
    reached, jumped = (
        over_seeds(np.subtract(values, trained).tolist(), sign=True) for values in (half, after)
    )
    rows = [
        ["the first direction holds 92 % of the variance", geometry("first")],
        ["the first two hold 96 %", geometry("first_two")],
        [
            "the trajectory is a line, all else is noise",
            f"drift to noise certainly above 1 in {lows} of {len(results)} runs",
        ],
        [
            "a line reaches far at equal quality",
            f"RELEX from {steps // 2} to {steps}: {reached} greedy against the trained step",
        ],
        [
            "more directions or curves do not help",
            "relative error of the weights: "
            + "; ".join(f"{name} {value}" for name, value in errors.items()),
        ],
        ["shared tokens carry over 80 % of the update", f"{shared} is on token ids of both sides"],
        [
            "pairwise advantages lower gradient variance",
            "noise scale in prompts: "
            + ", ".join(f"{arm} {value:.0f}" for arm, value in scales.items()),
        ],
        [
            "a few online steps, then DPO, beat many online steps",
            f"{k} steps, then DPO on {pairs} pairs, against {steps} steps: {jumped} greedy",
        ],
    ]
    return table(("claimed", "measured"), rows)


def best_early_g2d(results: list[Seed]) -> tuple[int, str, list[float]]:
    """The kind of G2D within the first third of the steps that is best on average: K, pairs, and
    accuracies by seed.
    """
    by_kind: dict[tuple[int, str], list[float]] = {}
    for seed in results:
        for row in seed["g2d"]:
            if row["k"] <= seed["steps"] // 3:
                by_kind.setdefault((row["k"], row["pairs"]), []).append(row["after"])
    (k, pairs), values = max(by_kind.items(), key=lambda item: np.mean(item[1]))
    return k, pairs, values


def _save(draw: Callable[[Any], None], height: float, folder: Path, name: str) -> None:
    with style.styled():
        figure = style.new_figure(height)
        draw(figure)
        style.save(figure, folder, name)
    for other in ("svg", "pdf"):
        (folder / f"{name}.{other}").unlink(missing_ok=True)


def curves(results: list[Seed], folder: Path) -> None:
    """Validation accuracy against steps and generated tokens: means over seeds, intervals where
    they tell arms apart.
    """

    def draw(figure: Any) -> None:
        axes: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
        for arm, colour in COLOURS.items():
            points = [seed["arms"][arm]["curve"] for seed in results]
            stats = np.array(
                [interval([p[row]["accuracy"] for p in points]) for row in range(len(points[0]))]
            ).T
            for place, (axis, scale) in zip(axes, (("step", 1.0), ("tokens", 1000.0)), strict=True):
                x = np.mean([[entry[axis] / scale for entry in p] for p in points], axis=0)
                dashed = "--" if arm.startswith("re-") else "-"
                place.plot(
                    x, stats[0], color=colour, linestyle=dashed, marker="o", markersize=3, label=arm
                )
                if arm == "GRPO" or dashed == "--":
                    place.fill_between(x, stats[1], stats[2], color=colour, alpha=0.15, linewidth=0)
        axes[0].set(xlabel="optimizer step", ylabel="greedy accuracy", ylim=(0, 1))
        axes[1].set(xlabel="thousand generated tokens")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)

    _save(draw, 3.0, folder, "curves")


def by_k(results: list[Seed], folder: Path) -> None:
    """Accuracy before and after DPO by K."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        ks = sorted({row["k"] for row in results[0]["g2d"]})
        shown = [
            ("before", "training", "GRPO(K)", style.NULL),
            ("after", "training", "DPO on the training's pairs", style.SECOND),
            ("after", "fresh", "DPO on fresh pairs", style.RUN),
        ]
        for shift, (key, pairs, label, colour) in enumerate(shown):
            values = [
                [
                    r[key]
                    for seed in results
                    for r in seed["g2d"]
                    if r["k"] == k and r["pairs"] == pairs
                ]
                for k in ks
            ]
            stats = np.array([interval(v) for v in values]).T
            x = np.array(ks) + 0.5 * (shift - 1)
            axes.errorbar(
                x,
                stats[0],
                [stats[0] - stats[1], stats[2] - stats[0]],
                color=colour,
                marker="o",
                markersize=3.5,
                label=label,
                capsize=2,
                linewidth=1,
            )
        axes.set(xlabel="K, steps of GRPO before DPO", ylabel="greedy accuracy", xticks=ks)
        axes.legend()

    _save(draw, 2.6, folder, "g2d")


def write_report(results: list[Seed], folder: Path) -> None:
    """Put tables into docs/study.md and figures beside ``folder``'s scripts."""
    curves(results, folder)
    by_k(results, folder)
    steps = results[0]["steps"]
    seeds = ", ".join(str(seed["seed"]) for seed in results)
    pieces = [
        (
            f"Seeds {seeds}; {steps} steps of 128 rollouts; 512 held-out problems. Means over"
            " seeds, 95 % intervals (Student's t)."
        ),
        "![Accuracy of every arm](study/curves.png)",
        arms_table(results),
        "### G2D",
        "![Accuracy by K](study/g2d.png)",
        g2d_table(results),
        "### Extrapolation of the GRPO runs",
        extrapolation_table(results),
        "### Claims",
        claims_table(results),
    ]
    text = "\n\n".join(pieces)
    page = folder.parent / "study.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text(
        before + MARKS[0] + "\n\n" + text + "\n\n" + MARKS[1] + rest.partition(MARKS[1])[2]
    )


if __name__ == "__main__":
    write_report(json.loads(Path(sys.argv[1]).read_text()), Path(__file__).parent)
