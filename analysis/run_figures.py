"""Panels of the run itself: cosines between updates, what the stored precision shows, metrics along
the way, several runs.

Every panel draws into matplotlib axes of the caller's and must run inside ``style.styled()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relexkit.analysis import style
from relexkit.extension import STATISTICS, Gram, Spectrum, cosines_of_updates, decompose

LABELS = {
    "first": "first direction",
    "first_two": "first two directions",
    "r2": "R² of the first",
    "cosine": "neighbouring cosine",
    "straightness": "straightness",
    "agreement": "half against all",
}
FIRST_METRICS = ("reward", "eval/accuracy", "accuracy", "kl", "entropy", "grad_norm", "loss")
"""Metrics that come first, in this order."""


def cosine_map_panel(axes: Axes, gram: Gram) -> None:
    """Cosines between all updates."""
    cosines = cosines_of_updates(gram.matrices.sum(axis=0))
    edges = np.arange(len(cosines) + 1) + 0.5
    axes.pcolormesh(
        edges,
        edges,
        np.ma.masked_invalid(cosines),
        cmap=style.DIVERGING,
        vmin=-1,
        vmax=1,
        gid="cosines",
        rasterized=True,
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("update")
    axes.set_ylabel("update")
    axes.set_title("Cosines between updates")


def cosine_by_distance_panel(axes: Axes, gram: Gram) -> None:
    """Mean cosine of updates by how many lie between them: how long a direction lasts."""
    cosines = cosines_of_updates(gram.matrices.sum(axis=0))
    means = [_mean(np.diag(cosines, lag)) for lag in range(1, len(cosines))]
    axes.plot(np.arange(1, len(cosines)), means, color=style.RUN, label="_mean cosine")
    axes.axhline(0, **style.NULL_LINE)
    axes.set_ylim(min(-0.2, np.nanmin(means) - 0.05) if np.isfinite(means).any() else -0.2, 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("updates apart")
    axes.set_ylabel("mean cosine")
    axes.set_title("Mean cosine by distance")


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def resolution_panel(axes: Axes, gram: Gram) -> None:
    """Shares of the weights that changed at a step, that ever left the base, and of changes by one
    unit in the last place.
    """
    size = max(1, int(gram.num_parameters.sum()))
    changed, moved = gram.changed.sum(axis=0), gram.moved.sum(axis=0)
    shown = [
        ("differ from the base", style.RUN, 100 * moved / size),
        ("changed since the previous step", style.SECOND, 100 * changed / size),
    ]
    if (gram.unit_moves >= 0).all() and changed.any():
        with np.errstate(invalid="ignore", divide="ignore"):
            units = 100 * gram.unit_moves.sum(axis=0) / changed
        shown.append(("of these by one unit in the last place", style.THIRD, units))
    for label, color, values in shown:
        axes.plot(gram.steps, values, color=color, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("share of the weights")
    axes.set_title("How much of the weights the stored precision lets move")


def known_metrics(metrics: Mapping[str, np.ndarray]) -> list[str]:
    """Metrics that were logged three times and vary, those of ``FIRST_METRICS`` first."""
    known = [n for n, v in metrics.items() if np.isfinite(v).sum() >= 3 and np.nanstd(v) > 0]
    first = [name for name in FIRST_METRICS if name in known]
    return [*first, *sorted(name for name in known if name not in first)]


def metric_panel(axes: Axes, steps: np.ndarray, values: np.ndarray, name: str) -> None:
    """A metric by step; steps at which it was not logged are left out."""
    seen = np.isfinite(values)
    axes.plot(steps[seen], values[seen], color=style.RUN, linewidth=1.0, label=f"_{name}")
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_title(name)


def metric_along_panel(axes: Axes, gram: Gram, values: np.ndarray, name: str) -> None:
    """A metric by position along the first direction."""
    seen = np.isfinite(values)
    place = decompose(gram.matrices.sum(axis=0)).coefficients[:, 0]
    axes.plot(
        place[seen], values[seen], "o", color=style.RUN, markersize=2.5, alpha=0.7, label=f"_{name}"
    )
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.xaxis.set_major_formatter(FuncFormatter(style.number))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("first coefficient (L2 norm of weights)")
    axes.set_title(f"{name} by position along the first direction")


def metric_of_runs_panel(
    axes: Axes, runs: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str
) -> None:
    """A metric of several runs by step; ``runs`` holds steps and values by name."""
    for (run, (steps, values)), color in zip(runs.items(), run_colours(len(runs)), strict=True):
        seen = np.isfinite(values)
        axes.plot(steps[seen], values[seen], color=color, linewidth=1.0, label=run)
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_title(name)


def null_panel(axes: Axes, runs: Mapping[str, Spectrum]) -> None:
    """Every headline statistic of one or several runs beside its walk without direction and the
    sign-flips' 90 %.
    """
    for index, (name, colour) in enumerate(zip(runs, run_colours(len(runs)), strict=True)):
        whole = runs[name].whole
        for row, statistic in enumerate(STATISTICS):
            place = row + 0.7 * ((index + 0.5) / len(runs) - 0.5)
            low, high = whole.low[statistic], whole.high[statistic]
            first = not (index or row)
            if np.isfinite([low, high]).all():
                axes.plot(
                    [low, high],
                    [place, place],
                    color=style.STILL,
                    linewidth=6,
                    solid_capstyle="butt",
                    zorder=1.5,
                    label="90 % of sign-flips" if first else "_90 % of sign-flips",
                )
            axes.plot(
                whole.expected[statistic],
                place,
                marker="|",
                markersize=8,
                color=style.NULL,
                linestyle="",
                zorder=2,
                label=style.NULL_LABEL if first else f"_{style.NULL_LABEL}",
            )
            axes.plot(
                whole.observed[statistic],
                place,
                marker="o",
                markersize=4,
                color=colour,
                linestyle="",
                zorder=3,
                label=f"_{name}" if row else name,
            )
    axes.set_yticks(range(len(STATISTICS)), [LABELS[s] for s in STATISTICS])
    axes.set_ylim(len(STATISTICS) - 0.5, -0.5)
    values = [
        v
        for s in runs.values()
        for d in (s.whole.observed, s.whole.expected)
        for v in d.values()
        if np.isfinite(v)
    ]
    axes.set_xlim(min([0.0, *(v - 0.05 for v in values)]), 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(style.number))
    axes.set_title("Against a walk without direction")


def run_colours(count: int) -> Sequence[str]:
    """One colour for each of ``count`` runs."""
    colours = (style.RUN, style.SECOND, style.THIRD, *list(style.METHODS.values())[3:6])
    return [colours[i % len(colours)] for i in range(count)]
