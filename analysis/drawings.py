"""One pair of axes for each kind of answer: what ``.plot()`` draws, on the caller's axes or on new
ones of ``pyplot``, with the caller's own settings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes

from relexkit.analysis import style
from relexkit.extension import (
    Advice,
    Alignment,
    Backtest,
    Directions,
    Forecast,
    Gram,
    Linearity,
    Observed,
    OpenRun,
    Projection,
    Spectrum,
    cosines_of_updates,
)

_A = TypeVar("_A")
_MOST_GROUPS = 30
_FLOOR = -2.0  # of a skill: what is worse is drawn there
_REWARDS = ("reward", "train/reward", "rewards/mean")


def _on_axes(draw: Callable[[_A, Axes], None]) -> Callable[[_A, Axes | None], Axes]:
    """``draw`` on the axes that are given, or on new ones; returns them."""

    @wraps(draw)
    def drawn(answer: _A, axes: Axes | None = None) -> Axes:
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots(layout="constrained")[1]
        draw(answer, axes)
        return axes

    return drawn


@_on_axes
def draw_spectrum(answer: Spectrum, axes: Axes) -> None:
    """Share of the first direction of the groups with most energy, beside that of their walks."""
    shown = [s for s in answer.leading(_MOST_GROUPS) if s.null and len(s.singular_values)]
    places = np.arange(len(shown))
    axes.barh(places, [s.explained_variance_ratio[0] for s in shown], color=style.RUN, label="run")
    walks = [s.null.expected["first"] if s.null else np.nan for s in shown]
    axes.plot(walks, places, "|", color=style.NULL, markersize=10, label=style.NULL_LABEL)
    axes.set_yticks(places, [style.elide(s.name) for s in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.01)
    axes.set_xlabel("variance on the first direction")
    axes.legend()


@_on_axes
def draw_linearity(answer: Linearity, axes: Axes) -> None:
    """Distribution of every weight's R² over all groups, beside that of a walk."""
    counts = answer.counts.sum(axis=0)
    edges = np.linspace(0, 1, len(counts) + 1)
    axes.stairs(counts / max(counts.sum(), 1), edges, fill=True, color=style.RUN, label="weights")
    axes.stairs(answer.null, edges, **style.NULL_LINE, label=style.NULL_LABEL)
    axes.set_xlabel("R² of a weight's line on the step")
    axes.set_ylabel("share of the weights")
    axes.legend()


@_on_axes
def draw_backtest(answer: Backtest, axes: Axes) -> None:
    """Skill against hold by distance, of every method from every prefix."""
    for method in answer.methods:
        if method == "hold":
            continue
        rows = [r for r in answer.grid if r.method == method]
        ratios = [r.target / r.until for r in rows]
        skills = np.maximum([r.skill for r in rows], _FLOOR)
        color = style.METHODS.get(method)
        axes.plot(ratios, skills, "o", markersize=3, alpha=0.6, color=color, label=method)
    axes.axhline(0, **style.NULL_LINE, label="hold")
    axes.set_xscale("log")
    axes.set_ylim(_FLOOR - 0.05, 1.02)
    axes.set_xlabel("target step over last step of the prefix")
    axes.set_ylabel(f"skill (below {_FLOOR:g} drawn there)")
    axes.legend()


@_on_axes
def draw_advice(answer: Advice, axes: Axes) -> None:
    """Skill of every method by distance, over the latest prefixes."""
    for method, checks in answer.record.items():
        places = [check.ratio for check in checks]
        skills = np.maximum([check.skill for check in checks], _FLOOR)
        axes.plot(places, skills, "o-", color=style.METHODS.get(method), label=method)
    axes.axhline(0, **style.NULL_LINE, label="hold")
    axes.set_xlabel("target step over last step of the prefix")
    axes.set_ylabel("mean skill")
    axes.set_title(answer.headline, wrap=True)
    axes.legend()


@_on_axes
def draw_forecast(answer: Forecast, axes: Axes) -> None:
    """Predicted coefficients with their intervals."""
    for k in range(answer.coefficients.shape[1]):
        middle, low, high = (v[:, k] for v in (answer.coefficients, answer.low, answer.high))
        (line,) = axes.plot(answer.targets, middle, "o-", label=f"direction {k + 1}")
        axes.fill_between(answer.targets, low, high, alpha=0.2, color=line.get_color())
    axes.set_xlabel("step")
    axes.set_ylabel("coefficient")
    axes.legend()


@_on_axes
def draw_gram(answer: Gram, axes: Axes) -> None:
    """Cosines between all updates of the whole model."""
    cosines = np.ma.masked_invalid(cosines_of_updates(answer.matrices.sum(axis=0)))
    edges = np.arange(len(cosines) + 1) + 0.5
    shown = axes.pcolormesh(edges, edges, cosines, cmap="RdBu", vmin=-1, vmax=1)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xlabel("update")
    axes.set_ylabel("update")
    axes.figure.colorbar(shown, ax=axes, label="cosine")


@_on_axes
def draw_observed(answer: Observed, axes: Axes) -> None:
    """Distance from the base by step."""
    distance = np.sqrt(np.einsum("ntt->t", answer.gram.matrices))
    axes.plot(answer.gram.steps, distance, "o-", markersize=3, color=style.RUN)
    axes.set_xlabel("step")
    axes.set_ylabel("distance from the base")


@_on_axes
def draw_run(answer: OpenRun, axes: Axes) -> None:
    """The reward by step, or, where none was logged, the first metric."""
    logged = answer.store.metrics()
    name = next((n for n in _REWARDS if n in logged), next(iter(sorted(logged)), None))
    if name is None:
        style.say(axes, "No metrics were logged.")
        return
    axes.plot(answer.steps, logged[name], "o-", markersize=3, color=style.RUN)
    axes.set_xlabel("step")
    axes.set_ylabel(name)


@_on_axes
def draw_directions(answer: Directions, axes: Axes) -> None:
    """Share of the variance on each direction, of the groups with most of it."""
    groups = sorted(answer.groups.items(), key=lambda item: -item[1].total)[:_MOST_GROUPS]
    for name, parts in groups:
        ratios = parts.explained_variance_ratio[: answer.count]
        label = style.elide(name) if len(groups) <= len(style.MARKERS) else None
        axes.plot(np.arange(1, len(ratios) + 1), ratios, "o-", alpha=0.7, label=label)
    axes.set_xticks(range(1, answer.count + 1))
    axes.set_xlabel("direction")
    axes.set_ylabel("share of the variance")
    if len(groups) <= len(style.MARKERS):
        axes.legend()


@_on_axes
def draw_projection(answer: Projection, axes: Axes) -> None:
    """Share of the checkpoint's squared distance inside the directions, by group."""
    order = np.argsort(-answer.norms)[:_MOST_GROUPS]
    axes.barh(np.arange(len(order)), answer.inside[order], color=style.RUN)
    axes.set_yticks(np.arange(len(order)), [style.elide(answer.groups[g]) for g in order])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.01)
    axes.set_xlabel("share of the squared distance inside the directions")


@_on_axes
def draw_alignment(answer: Alignment, axes: Axes) -> None:
    """Cosine of the first directions by group, and what chance gives."""
    first = answer.cosines[:, 0, 0]
    order = np.argsort(-np.abs(np.nan_to_num(first)))[:_MOST_GROUPS]
    places = np.arange(len(order))
    axes.barh(places, first[order], color=style.RUN, label="first directions")
    for sign in (1, -1):
        label = "chance" if sign == 1 else None
        axes.plot(sign * answer.chance[order], places, "|", color=style.NULL, label=label)
    axes.set_yticks(places, [style.elide(answer.groups[g]) for g in order])
    axes.invert_yaxis()
    axes.set_xlim(-1.02, 1.02)
    axes.set_xlabel("cosine")
    axes.legend()


@_on_axes
def draw_table(answer: Any, axes: Axes) -> None:
    """Accuracy of each row with its interval, of a sweep or an evaluation."""
    rows = [row for row in answer.rows() if "accuracy" in row]
    if not rows:
        style.say(axes, "These rows have no accuracy to draw.")
        return
    for place, row in enumerate(rows):
        low, high = row["interval"] if "interval" in row else (row["low"], row["high"])
        axes.plot([low, high], [place, place], color=style.RUN)
        axes.plot(row["accuracy"], place, "o", color=style.RUN)
    axes.set_yticks(range(len(rows)), [style.elide(str(next(iter(row.values())))) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, 95 % interval")


DRAWINGS = {
    "Advice": draw_advice,
    "Alignment": draw_alignment,
    "Backtest": draw_backtest,
    "Directions": draw_directions,
    "Forecast": draw_forecast,
    "Gram": draw_gram,
    "Linearity": draw_linearity,
    "Observed": draw_observed,
    "OpenRun": draw_run,
    "Projection": draw_projection,
    "Spectrum": draw_spectrum,
    "Table": draw_table,
}
"""Name of the type of an answer -> what draws it."""
