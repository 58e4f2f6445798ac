"""The picture of the demo: accuracy against rollouts, with and without jumps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relexkit.analysis import style


def plot_demo(answers: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``demo`` into ``folder`` as PNG and SVG, from what ``summary.json`` of the demo holds;
    returns the paths.
    """
    with style.styled():
        return style.save(demo_figure(answers), Path(folder), "demo")


def demo_figure(answers: dict[str, Any]) -> Figure:
    """Left, accuracy of the three runs against rollouts; right, of predictions against steps."""
    figure = Figure(figsize=(style.WIDTH_INCHES, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    _rollouts(left, answers)
    _predictions(right, answers)
    low = min(model["greedy"]["accuracy"] for model in answers["predictions"])
    left.set_ylim(max(0.0, low - 0.08), 1.0)
    left.set_ylabel("greedy accuracy")
    return figure


def _rollouts(axes: Axes, answers: dict[str, Any]) -> None:
    half, each = answers["until"], answers["rollouts_per_step"] / 1000
    quarter = half // 2
    trained: dict[str, tuple[int, ...]] = {"plain": (0, quarter, half, half + quarter, 2 * half)}
    trained["jumps"] = (quarter, quarter, half, half)
    trained["walk"] = (0, int(answers["walk"][-1]["name"].removeprefix("step ")))
    looks = {
        "plain": (style.NULL, "small rate, plain"),
        "jumps": (style.RUN, "small rate, with jumps"),
        "walk": (style.THIRD, "33 times that rate, plain"),
    }
    for name, (color, label) in looks.items():
        heights = [model["greedy"]["accuracy"] for model in answers[name]]
        places = [steps * each for steps in trained[name]]
        axes.plot(places, heights, color=color, marker="o", label=label)
    axes.set_title("A jump costs no rollouts; a larger rate saves more")
    axes.set_xlabel("thousand rollouts")
    axes.legend(loc="lower right")


def _predictions(axes: Axes, answers: dict[str, Any]) -> None:
    held, reached, *predicted = answers["predictions"]
    half = answers["until"]
    heights = [held["greedy"]["accuracy"], reached["greedy"]["accuracy"]]
    axes.plot((half, 2 * half), heights, color=style.NULL, marker="o", label="trained")
    for method in dict.fromkeys(model["name"].split()[0] for model in predicted):
        rows = [model for model in predicted if model["name"].split()[0] == method]
        targets = [half, *(int(row["name"].split()[-1]) for row in rows)]
        values = [heights[0], *(row["greedy"]["accuracy"] for row in rows)]
        color = style.METHODS[method]
        axes.plot(targets, values, color=color, marker="s", linestyle=":", label=method)
    axes.set_title(f"Predicted from step {half}")
    axes.set_xlabel("step")
    axes.legend(loc="lower left")
