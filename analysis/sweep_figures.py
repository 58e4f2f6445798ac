"""The figure of a sweep: every candidate beside the last observed step; reads what ``relexkit sweep
--json`` printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from relexkit.analysis import style


def sweep_figure(sweep: Mapping[str, Any], width_inches: float = style.WIDTH_INCHES) -> Figure:
    """Accuracies with 95 % intervals; hollow where a candidate was stopped before the last
    problems.
    """
    candidates = sorted(sweep["candidates"], key=lambda c: (c["num_problems"], c["accuracy"]))
    figure = style.new_figure(0.9 + 0.21 * (len(candidates) + 1), width_inches)
    axes = figure.add_subplot()
    base = sweep["baseline"]
    axes.axvspan(
        *base["interval"],
        color=style.STILL,
        zorder=0,
        label=f"step {sweep['last_step']}, observed, 95 %",
    )
    axes.axvline(base["accuracy"], **style.NULL_LINE)
    for row, c in enumerate(candidates):
        colour, whole = (
            style.METHODS.get(c["method"], style.MUTED),
            c["num_problems"] == sweep["num_problems"],
        )
        axes.plot(c["interval"], [row, row], color=colour, linewidth=1.2)
        axes.plot(
            c["accuracy"],
            row,
            marker="o",
            markersize=4.5,
            color=colour,
            markerfacecolor=colour if whole else "white",
        )
    axes.plot(
        [],
        [],
        "o",
        color=style.MUTED,
        markerfacecolor="white",
        label="stopped early, on fewer problems",
    )
    axes.set_yticks(
        range(len(candidates)), [f"{c['name']}  ({c['num_problems']})" for c in candidates]
    )
    axes.set_ylim(-0.6, len(candidates) - 0.4)
    axes.xaxis.set_major_formatter(FuncFormatter(style.number))
    axes.set_xlabel("accuracy (number of problems in parentheses)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure
