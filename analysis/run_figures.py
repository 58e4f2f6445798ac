"""Figures of the run itself: cosines between updates, what the stored precision shows, metrics
along the way, several runs.

Every figure is a function that returns a matplotlib ``Figure`` of its own and must run inside
``style.styled()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relexkit.analysis import style
from relexkit.extension import STATISTICS, Gram, Spectrum, decompose

LABELS = {
    "first": "first direction",
    "first_two": "first two directions",
    "r2": "R² of the first",
    "cosine": "neighbouring cosine",
    "straightness": "straightness",
    "drift": "half against all",
}
_MOST_PANELS = 4


def cosines_figure(gram: Gram) -> Figure:
    """Cosines between all updates, and their mean by lag: how long a direction lasts."""
    matrix = gram.matrices.sum(axis=0)
    updates = np.diff(np.diff(np.pad(matrix, ((1, 0), (1, 0))), axis=0), axis=1)
    norms = np.sqrt(np.maximum(np.diag(updates), 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = updates / np.outer(norms, norms)
    figure = style.new_figure(2.7)
    image, lags = figure.subplots(1, 2, width_ratios=[1, 1.1])
    edges = np.arange(len(cosines) + 1) + 0.5
    values = np.ma.masked_invalid(cosines)
    shown = image.pcolormesh(
        edges, edges, values, cmap="RdBu", vmin=-1, vmax=1, gid="cosines", rasterized=True
    )
    image.set_aspect("equal")
    image.invert_yaxis()
    image.grid(False)
    for axis in (image.xaxis, image.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    image.set_xlabel("update")
    image.set_ylabel("update")
    image.set_title("a  Cosines between updates")
    figure.colorbar(shown, ax=image, shrink=0.8, ticks=[-1, 0, 1]).outline.set_visible(False)
    means = [_mean(np.diag(cosines, lag)) for lag in range(1, len(cosines))]
    lags.plot(np.arange(1, len(cosines)), means, color=style.RUN)
    lags.axhline(0, **style.NULL_LINE)
    lags.set_ylim(min(-0.2, np.nanmin(means) - 0.05) if np.isfinite(means).any() else -0.2, 1.02)
    lags.yaxis.set_major_formatter(FuncFormatter(style.number))
    lags.set_xlabel("updates apart")
    lags.set_title("b  Mean cosine by distance")
    return figure


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def resolution_figure(gram: Gram) -> Figure:
    """Shares of the weights that changed at a step, that ever left the base, and of changes by one
    unit in the last place.
    """
    size = max(1, int(gram.num_parameters.sum()))
    changed, moved = gram.changed.sum(axis=0), gram.moved.sum(axis=0)
    figure = style.new_figure(2.3)
    axes = figure.add_subplot()
    axes.plot(gram.steps, 100 * moved / size, color=style.RUN, label="differ from the base")
    axes.plot(
        gram.steps,
        100 * changed / size,
        color=style.SECOND,
        label="changed since the previous step",
    )
    if (gram.unit_moves >= 0).all() and changed.any():
        with np.errstate(invalid="ignore", divide="ignore"):
            units = 100 * gram.unit_moves.sum(axis=0) / changed
        axes.plot(
            gram.steps,
            units,
            color=style.THIRD,
            linewidth=0.9,
            label="of these by one unit in the last place",
        )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_title("Resolution: how much of the weights the stored precision lets move")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def metrics_figure(gram: Gram, metrics: Mapping[str, np.ndarray]) -> Figure | None:
    """Reward and other metrics along the step and along the first coefficient; None if none was
    logged three times.
    """
    known = {
        name: v for name, v in metrics.items() if np.isfinite(v).sum() >= 3 and np.nanstd(v) > 0
    }
    first = [
        n
        for n in ("reward", "eval/accuracy", "accuracy", "kl", "entropy", "grad_norm", "loss")
        if n in known
    ]
    chosen = [*first, *(n for n in known if n not in first)][:_MOST_PANELS]
    matrix = gram.matrices.sum(axis=0)
    if not chosen or not np.trace(matrix) > 0:
        return None
    coefficient = decompose(matrix).coefficients[:, 0]
    figure = style.new_figure(0.5 + 1.25 * len(chosen))
    panels = figure.subplots(len(chosen), 2, squeeze=False, sharey="row", sharex="col")
    for (left, right), name in zip(panels, chosen, strict=True):
        seen = np.isfinite(known[name])
        left.plot(gram.steps[seen], known[name][seen], color=style.RUN, linewidth=0.9)
        points = right.scatter(
            coefficient[seen],
            known[name][seen],
            c=gram.steps[seen],
            cmap="viridis",
            s=7,
            linewidths=0,
        )
        left.set_ylabel(style.elide(name, 18))
        for axes in (left, right):
            axes.yaxis.set_major_formatter(FuncFormatter(style.number))
            axes.xaxis.set_major_formatter(FuncFormatter(style.number))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_locator(MaxNLocator(5))
    panels[-1, 0].set_xlabel("optimizer step")
    panels[-1, 1].set_xlabel("first coefficient (L2 norm of weights)")
    panels[0, 0].set_title("a  By step")
    panels[0, 1].set_title("b  By position along the first direction")
    figure.colorbar(points, ax=panels, shrink=0.8, aspect=30, label="step").outline.set_visible(
        False
    )
    return figure


def null_figure(runs: Mapping[str, Spectrum]) -> Figure:
    """Every headline statistic of one or several runs beside its walk without direction and the
    sign-flips' 90 %.
    """
    figure = style.new_figure(0.9 + 0.24 * len(LABELS) * max(1, len(runs) * 0.75))
    axes = figure.add_subplot()
    ticks: list[tuple[float, str]] = []
    for index, (name, colour) in enumerate(zip(runs, _colours(len(runs)), strict=True)):
        whole = runs[name].whole
        for row, statistic in enumerate(STATISTICS):
            place = row + 0.7 * ((index + 0.5) / len(runs) - 0.5)
            low, high = whole.low[statistic], whole.high[statistic]
            if np.isfinite([low, high]).all():
                axes.plot(
                    [low, high],
                    [place, place],
                    color=style.STILL,
                    linewidth=6,
                    solid_capstyle="butt",
                    zorder=1.5,
                )
            axes.plot(
                whole.expected[statistic],
                place,
                marker="|",
                markersize=8,
                color=style.NULL,
                linestyle="",
                zorder=2,
                label="walk without direction, sign-flips' 90 %" if not (index or row) else None,
            )
            axes.plot(
                whole.observed[statistic],
                place,
                marker="o",
                markersize=4,
                color=colour,
                linestyle="",
                zorder=3,
                label=name if not row else None,
            )
    ticks = [(row, LABELS[statistic]) for row, statistic in enumerate(STATISTICS)]
    axes.set_yticks([row for row, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(len(ticks) - 0.5, -0.5)
    values = [
        v
        for s in runs.values()
        for d in (s.whole.observed, s.whole.expected)
        for v in d.values()
        if np.isfinite(v)
    ]
    axes.set_xlim(min([0.0, *(v - 0.05 for v in values)]), 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(style.number))
    axes.set_title("Evidence is what lies beyond the grey band")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _colours(count: int) -> Sequence[str]:
    colours = (style.RUN, style.SECOND, style.THIRD, *style.METHODS.values())
    return [colours[i % len(colours)] for i in range(count)]
