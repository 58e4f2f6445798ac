"""One look for all figures: sizes, colours, number formats, saving.

The colours are those of Okabe and Ito (2008), which stay apart for every common form of colour
blindness; the walk without direction is dashed and dark grey in every figure. Figures are 5.5
inches wide, the text column of a one-column paper.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH_INCHES = 5.5
DOTS_PER_INCH = 200
FORMATS = ("png", "svg", "pdf")

RUN = "#0072B2"
SECOND = "#D55E00"
THIRD = "#009E73"
PARTS = "#56B4E9"
NULL = "#404040"
MUTED = "#767676"
GRID = "#DDDDDD"
STILL = "#E4E4E4"

METHODS = {
    "model": "#0072B2",
    "relex": "#D55E00",
    "two-point": "#009E73",
    "least-squares": "#CC79A7",
    "least-squares-origin": "#56B4E9",
    "first-update": "#E69F00",
    "hold": "#404040",
    "drift": "#0072B2",
    "average": "#8C6D1F",
}
"""One colour for a method in every figure."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#b5573c", "#f3f0eb", "#2f6d9e"])
SEQUENTIAL = LinearSegmentedColormap.from_list("sequential", ["#e8eff4", "#7ea9c9", "#1f4f78"])

DARK_MAPS = {
    "diverging": LinearSegmentedColormap.from_list("dark", ["#e09474", "#2d3136", "#86bbe6"]),
    "sequential": LinearSegmentedColormap.from_list("dark", ["#26323c", "#4f7fa5", "#b9dbf5"]),
}
"""The same maps for a dark ground."""

DARK = {
    RUN: "#68b3e8",
    SECOND: "#f0935a",
    THIRD: "#4cc79c",
    PARTS: "#8fcbee",
    NULL: "#b9c0c7",
    MUTED: "#8f969e",
    GRID: "#33393f",
    STILL: "#3b4147",
    "#CC79A7": "#e3a3c6",
    "#E69F00": "#f2bd4d",
    "#8C6D1F": "#cdb069",
}
"""Colours of the light page, and those that replace them on the dark page."""

NULL_LABEL = "walk without direction"
NULL_LINE: dict[str, Any] = {"color": NULL, "linestyle": (0, (4, 2)), "linewidth": 1.0}

_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "font.family": "sans-serif",
    "font.size": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",  # text stays text: searchable, and editable in a drawing program
    "svg.hashsalt": "relexkit",  # the same data give the same file
    "text.parse_math": False,  # a tensor name may hold dollar signs
    "xtick.color": MUTED,
    "xtick.labelcolor": "black",
    "xtick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelcolor": "black",
    "ytick.labelsize": 7.5,
    "ytick.major.width": 0.6,
}


def styled() -> AbstractContextManager[None]:
    """Context in which figures must be both built and saved; matplotlib's settings are restored
    after it.
    """
    return matplotlib.rc_context(
        {**matplotlib.rcParamsDefault, **_SETTINGS, "backend": matplotlib.rcParams["backend"]}
    )


def new_figure(height_inches: float, width_inches: float = WIDTH_INCHES) -> Figure:
    """A figure, of the standard width unless another is given, laid out by matplotlib so that
    nothing is cut off; belongs to no global state.
    """
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def letter(panels: Sequence[Axes]) -> None:
    """Put a, b, c before the titles of the panels of one figure."""
    for letter, axes in zip("abcdefghi", panels, strict=False):
        axes.set_title(f"{letter}  {axes.get_title('left')}")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``folder/name`` in every format of ``FORMATS``; returns the paths. The files carry no
    date.
    """
    paths = [folder / f"{name}.{extension}" for extension in FORMATS]
    for path in paths:
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata=metadata)
    return paths


def percent(share: float) -> str:
    """A share as text, with enough decimals that what lies below 100 % remains visible.

    >>> percent(0.9368), percent(0.999998), percent(0.00012), percent(1.0)
    ('93.7 %', '99.9998 %', '0.012 %', '100 %')
    """
    if not math.isfinite(share):
        return "none"
    value = 100 * share
    if value <= 0 or 100 - value < 1e-9:
        return f"{value:.0f} %"
    smaller = min(value, 100 - value)
    decimals = 1 if smaller >= 0.1 else math.ceil(-math.log10(smaller)) + (value < 50)
    return f"{value:.{decimals}f} %"


def tick_percent(share: float, _: int | None = None) -> str:
    """A share for a tick: no more decimals than it has.

    >>> tick_percent(0.995), tick_percent(1.0)
    ('99.5 %', '100 %')
    """
    return f"{100 * share:.6f}".rstrip("0").rstrip(".") + " %"


def number(value: float, _: int | None = None) -> str:
    r"""A number for a tick: short, with a real minus sign, without a factor above the axis (which
    the title would cover).

    >>> number(0.25), number(12500000.0), number(-2e-7) == "\N{MINUS SIGN}2e\N{MINUS SIGN}07"
    ('0.25', '1.25e+07', True)
    """
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def elide(name: str, limit: int = 30) -> str:
    """``name`` cut in its middle to at most ``limit`` characters: both ends of a tensor's name tell
    it apart.
    """
    if len(name) <= limit:
        return name
    tail = (limit - 1) * 3 // 5
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"


def say(axes: Axes, sentence: str, width: int = 72) -> None:
    """Put a sentence in the middle of otherwise empty axes."""
    axes.set_axis_off()
    text = textwrap.fill(sentence, width, break_long_words=False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", linespacing=1.5)
