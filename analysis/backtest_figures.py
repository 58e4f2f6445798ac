"""Figures of the backtest: where every method's errors lie, how skill falls with distance, where
the run goes from here.

Every figure is a function that returns a matplotlib ``Figure`` of its own and must run inside
``style.styled()``. All numbers come from ``relexkit.assess.backtest`` and
``relexkit.assess.forecast``.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relexkit import RelexkitError
from relexkit.analysis import style
from relexkit.extension import (
    BASELINE,
    Backtest,
    Forecast,
    Gram,
    decompose,
    forecast,
    single_threaded_blas,
)

MAP_METHODS = ("model", "relex", "two-point", "least-squares")
"""Methods of the map, as far as the backtest has them."""

_FLOOR = -1.0  # of skills on colours and axes: worse than that is worse than useless
_SKILL = TwoSlopeNorm(0.0, _FLOOR, 1.0)
_CHECK_SHARE = 0.5  # of the recorded steps from which the forecast is checked against the rest


def plot_backtest(gram: Gram, result: Backtest, folder: Path) -> list[Path]:
    """Write ``backtest_map``, ``skill`` and ``forecast`` into ``folder``; returns the paths.

    Raises:
        RelexkitError: fewer than four recorded steps, or nothing moved.
    """
    if len(gram.steps) < 4 or not np.trace(gram.matrices.sum(axis=0)) > 0:
        raise RelexkitError(
            f"{len(gram.steps)} recorded steps, or no motion: a backtest has nothing to plot;"
            " record at least 4 steps"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with style.styled(), single_threaded_blas():
        for name, figure in (
            ("backtest_map", map_figure(result)),
            ("skill", skill_figure(result)),
            ("forecast", forecast_figure(gram)),
        ):
            written += style.save(figure, folder, name)
    return written


def map_figure(result: Backtest) -> Figure:
    """Skill against hold by prefix and later step, a panel for each of ``MAP_METHODS``: blue beats
    standing still.
    """
    methods = mapped_methods(result)
    rows = -(-len(methods) // 2)
    figure = style.new_figure(0.7 + 1.75 * rows)
    panels = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
    for axes, method in zip(panels.ravel(), methods, strict=False):
        map_panel(axes, result, method)
        axes.set_xlabel("")
        axes.set_ylabel("")
    for axes in panels.ravel()[len(methods) :]:
        axes.set_axis_off()
    figure.supxlabel("predicted step", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("predicted from step")
    bar = figure.colorbar(
        ScalarMappable(_SKILL, style.DIVERGING),
        ax=panels,
        shrink=0.8,
        aspect=30,
        ticks=[-1, -0.5, 0, 0.5, 1],
    )
    bar.ax.set_yticklabels(["≤ \N{MINUS SIGN}1", "\N{MINUS SIGN}0.5", "0", "0.5", "1"])
    bar.set_label("skill against hold")
    bar.outline.set_visible(False)
    return figure


def mapped_methods(result: Backtest) -> list[str]:
    """Methods that get a map."""
    return [m for m in MAP_METHODS if m in result.methods] or [
        m for m in result.methods if m != BASELINE
    ][:4]


def map_panel(axes: Axes, result: Backtest, method: str) -> None:
    """Skill of one method against hold by prefix and later step."""
    shown = np.array(result.checked.any(axis=0))  # of a long run some steps
    shown[: result.prefixes[0]] = True
    steps, skill = result.steps[shown], np.maximum(result.skill(method)[:, shown], _FLOOR)
    columns = np.r_[steps[0] - 0.5, (steps[:-1] + steps[1:]) / 2, steps[-1] + 0.5]
    axes.pcolormesh(
        columns,
        np.arange(len(result.prefixes) + 1) - 0.5,
        np.ma.masked_invalid(skill),
        cmap=style.DIVERGING,
        norm=_SKILL,
        gid=method,
    )
    axes.set_facecolor(style.STILL)
    axes.grid(False)
    axes.set_title(method)
    axes.set_xlabel("predicted step")
    axes.set_ylabel("predicted from step")
    axes.set_yticks(
        range(len(result.prefixes)), [str(result.steps[n - 1]) for n in result.prefixes]
    )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def skill_figure(result: Backtest) -> Figure:
    """``skill_panel`` as a figure."""
    figure = style.new_figure(2.9)
    axes = figure.add_subplot()
    skill_panel(axes, result)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def skill_panel(axes: Axes, result: Backtest) -> None:
    """Skill of every method against the distance, target over last step of the prefix: median over
    prefixes and their range.
    """
    edges = np.geomspace(
        1.02, max(1.3, float(result.steps[-1] / result.steps[result.prefixes[0] - 1])), 11
    )
    lowest = 0.0
    for index, method in enumerate(m for m in result.methods if m != BASELINE):
        ratios, skills = _cells(result, method)
        places, medians = [], []
        for low, high in pairwise(edges):
            inside = (ratios >= low) & (ratios < high)
            if inside.any():
                places.append(float(np.sqrt(low * high)))
                medians.append(float(np.median(skills[inside])))
        color = style.METHODS.get(method, style.MUTED)
        axes.plot(
            places,
            np.maximum(medians, _FLOOR),
            color=color,
            marker=style.MARKERS[index % len(style.MARKERS)],
            label=method,
        )
        lowest = min([lowest, *medians])
    axes.axhline(0, **style.NULL_LINE, label="hold: stay at the last step")
    axes.set_xscale("log")
    axes.set_xticks(ticks := [r for r in (1.1, 1.5, 2, 3, 5, 10, 20, 50) if r <= edges[-1] * 1.01])
    axes.set_xticklabels([f"{r:g}" for r in ticks])
    axes.minorticks_off()
    axes.set_ylim(max(_FLOOR, lowest) - 0.05, 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.set_xlabel("target over last step")
    axes.set_ylabel("skill, median")
    note = f"; below {style.number(_FLOOR)} drawn there" if lowest < _FLOOR else ""
    axes.set_title(f"Skill against hold by distance, in the run's own past{note}")


def _cells(result: Backtest, method: str) -> tuple[np.ndarray, np.ndarray]:
    skill = result.skill(method)
    ratios = result.steps[None] / result.steps[result.prefixes - 1][:, None]
    known = np.isfinite(skill)
    return ratios[known], skill[known]


def forecast_figure(gram: Gram) -> Figure:
    """The first two coefficients, the model's continuation with its calibrated 90 % interval; also
    from half the steps.
    """
    figure = style.new_figure(3.0)
    panels = figure.subplots(1, 2)
    for axes, count in zip(panels, (None, len(gram.steps)), strict=True):
        forecast_panel(axes, gram, count)
    style.letter(panels)
    panels[1].set_ylabel("")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=2)
    return figure


def forecast_panel(axes: Axes, gram: Gram, count: int | None = None) -> None:
    """The forecast from the first ``count`` recorded steps (None: half of them), and what came."""
    matrix, steps = gram.matrices.sum(axis=0), gram.steps
    count = max(3, round(_CHECK_SHARE * len(steps))) if count is None else count
    checked = count < len(steps)
    title = f"Checked: from step {steps[count - 1]}" if checked else "From all steps"
    seen = matrix[:count, :count]
    if not np.trace(seen) > 0:
        style.say(axes, "nothing had moved by then", 30)
        axes.set_title(title)
        return
    parts = decompose(seen)
    num_directions = min(2, len(parts.singular_values))
    last = int(steps[count - 1])
    farthest = max(int(steps[-1]) if checked else 2 * last, last + 1)
    targets = np.unique(np.linspace(last, farthest, 25).round())[1:]
    ahead = forecast(gram.until(last), targets, num_directions=num_directions)
    projected = (
        parts.left[:, :num_directions] / parts.singular_values[:num_directions]
    ).T @ matrix[:count]
    for k, color in zip(range(num_directions), (style.RUN, style.SECOND), strict=False):
        name = f"direction {k + 1}"
        _observed(axes, steps, projected[k], count, color=color, label=name)
        _continued(axes, ahead, k, color=color, label=name)
    axes.axvline(last, color=style.MUTED, linewidth=0.7)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("coefficient (L2 norm of weights)")
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _observed(
    axes: Axes, steps: np.ndarray, projected: np.ndarray, count: int, *, color: str, label: str
) -> None:
    axes.plot(steps[:count], projected[:count], color=color, label=f"{label}, observed")
    if count < len(steps):
        axes.plot(
            steps[count - 1 :],
            projected[count - 1 :],
            color=color,
            linestyle=(0, (1, 1.2)),
            linewidth=1.0,
            label=f"{label}, what came",
        )


def _continued(axes: Axes, ahead: Forecast, k: int, *, color: str, label: str) -> None:
    axes.plot(
        ahead.targets,
        ahead.coefficients[:, k],
        color=color,
        linewidth=0.8,
        linestyle=(0, (5, 2)),
        label=f"{label}, model with 90 % interval",
    )
    axes.fill_between(
        ahead.targets, ahead.low[:, k], ahead.high[:, k], color=color, alpha=0.18, linewidth=0
    )
