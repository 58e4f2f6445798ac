"""A matplotlib figure as a drawing inside the page: colours that follow light and dark, values
under the pointer, series that can be switched off.

The colours of ``style`` become CSS variables, heat maps become two images of which the page shows
one, and the legend becomes HTML, so that it wraps on a phone.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from relexkit.analysis import style

_MOST_PIXELS = 400  # of a heat map's side


@dataclass(frozen=True)
class Drawing:
    """What the page needs of a figure.

    Attributes:
        svg: the drawing, an ``<svg>`` element; all its identifiers begin with the anchor.
        legend: HTML of its legend, empty without one.
        values: what lies under the pointer, for the page's script.
        title: the first title in it, which is no longer drawn.
    """

    svg: str
    legend: str
    values: dict[str, Any]
    title: str


def inline(figure: Figure, anchor: str) -> Drawing:
    """``figure`` as part of the page; must run inside ``style.styled()``."""
    shown = figure.axes
    title = shown[0].get_title("left") if shown else ""
    if len(shown) == 1:
        shown[0].set_title("")
    for drawn in list(figure.legends):
        drawn.remove()
    figure.draw_without_rendering()  # settles the layout, on which all positions depend
    figure.set_layout_engine("none")
    scales = [_scale_of_colours(axes) for axes in figure.axes]
    values = [_axes_values(figure, axes, f"{index}") for index, axes in enumerate(figure.axes)]
    for axes in figure.axes:
        _maps_to_images(axes)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = _for_page(buffer.getvalue(), anchor)
    legend = _legend(figure) + next(filter(None, scales), "")
    width, height = (72 * inches for inches in figure.get_size_inches())
    under_pointer = {"size": [width, height], "axes": [v for v in values if v is not None]}
    return Drawing(svg, legend, under_pointer, title)


def script_data(drawings: dict[str, Drawing]) -> str:
    """The values of all drawings as JSON that may stand inside a ``<script>``."""
    text = json.dumps({a: d.values for a, d in drawings.items()}, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# -- values under the pointer ----------------------------------------------------------------------


def _axes_values(figure: Figure, axes: Axes, place: str) -> dict[str, Any] | None:
    series = [
        line_series
        for index, line in enumerate(axes.get_lines())
        if (line_series := _series(figure, axes, line, f"{place}-{index}")) is not None
    ]
    cells = _cells(axes)
    if not (series or cells) or not axes.axison:
        return None
    box = axes.get_position()
    width, height = (72 * inches for inches in figure.get_size_inches())
    return {
        "box": [
            _short(v)
            for v in (
                box.x0 * width,
                (1 - box.y1) * height,
                box.x1 * width,
                (1 - box.y0) * height,
            )
        ],
        "x": axes.get_xlabel() or _below(axes),
        "y": axes.get_ylabel(),
        "rows": _row_names(axes),
        "series": series,
        "cells": cells,
    }


def _below(axes: Axes) -> str:
    """The label of the axis that this one shares its steps with."""
    shared = axes.get_shared_x_axes().get_siblings(axes)
    return next((other.get_xlabel() for other in shared if other.get_xlabel()), "")


def _series(figure: Figure, axes: Axes, line: Line2D, gid: str) -> dict[str, Any] | None:
    """A line's name, values and places in the drawing; None for lines that only guide the eye."""
    label = str(line.get_label())
    if re.fullmatch(r"_child\d+", label) or not label.strip("_ "):
        return None
    x, y = (np.atleast_1d(np.asarray(v, float)) for v in line.get_data())
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        return None
    x, y = x[finite], y[finite]
    places = axes.transData.transform(np.column_stack([x, y])) * 72 / figure.dpi
    line.set_gid(f"line-{gid}")
    return {
        "id": gid,
        "name": label.lstrip("_"),
        "v": [[_short(a), _short(b)] for a, b in zip(x, y, strict=True)],
        "p": [
            [round(float(a), 1), round(float(72 * figure.get_size_inches()[1] - b), 1)]
            for a, b in places
        ],
    }


def _cells(axes: Axes) -> dict[str, Any] | None:
    meshes = [c for c in axes.collections if isinstance(c, QuadMesh)]
    if not meshes:
        return None
    columns, rows, known = _grid(meshes[0])
    to_axes = axes.transData + axes.transAxes.inverted()
    left = to_axes.transform(np.column_stack([columns, np.full(len(columns), rows[0])]))[:, 0]
    top = 1 - to_axes.transform(np.column_stack([np.full(len(rows), columns[0]), rows]))[:, 1]
    values = np.ma.filled(known.astype(float), np.nan)
    middle = (columns[:-1] + columns[1:]) / 2
    names = [str(_short(v)) for v in middle]
    if axes.xaxis.get_visible() and not np.allclose(middle, middle.round()):
        names = [str(math.ceil(v)) for v in middle]
    return {
        "left": [round(float(v), 4) for v in left],
        "top": [round(float(v), 4) for v in top],
        "columns": names,
        "rows": _row_names(axes) or [str(_short(v)) for v in (rows[:-1] + rows[1:]) / 2],
        "v": [[None if math.isnan(v) else round(float(v), 3) for v in row] for row in values],
    }


def _row_names(axes: Axes) -> list[str]:
    """Words at the ticks of the vertical axis; empty if they are numbers of a scale."""
    texts = [label.get_text() for label in axes.get_yticklabels()]
    places = axes.get_yticks()
    is_list = len(texts) > 1 and np.array_equal(places, np.arange(len(texts)))
    return texts if is_list and any(texts) else []


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# -- the drawing -----------------------------------------------------------------------------------


def _maps_to_images(axes: Axes) -> None:
    """Each heat map as two images, one in the map of the dark page: thousands of cells stay
    small.
    """
    for index, mesh in enumerate(c for c in axes.collections if isinstance(c, QuadMesh)):
        columns, rows, values = _grid(mesh)
        picked = values[np.ix_(_nearest(rows), _nearest(columns))]
        limits = axes.get_xlim(), axes.get_ylim(), axes.get_aspect()
        for scheme in ("light", "dark"):
            cmap = mesh.cmap if scheme == "light" else style.DARK_MAPS.get(mesh.cmap.name)
            if cmap is None:
                continue
            axes.imshow(
                cmap(mesh.norm(picked)),
                extent=(columns[0], columns[-1], rows[0], rows[-1]),
                origin="lower",
                aspect="auto",
                interpolation="none",
                gid=f"{scheme}-map-{index}",
                zorder=mesh.get_zorder(),
            )
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
        axes.set_aspect(limits[2])
        mesh.set_visible(False)


def _grid(mesh: QuadMesh) -> tuple[np.ndarray, np.ndarray, Any]:
    """Edges of the columns and rows of a heat map, and its masked values."""
    corners = np.asarray(mesh.get_coordinates())
    columns, rows = corners[0, :, 0], corners[:, 0, 1]
    values: Any = np.ma.asarray(mesh.get_array())
    return columns, rows, values.reshape(len(rows) - 1, len(columns) - 1)


def _nearest(edges: np.ndarray) -> np.ndarray:
    """Cells at evenly spaced places, as many as show every cell of an even grid."""
    count = len(edges) - 1
    even = np.allclose(np.diff(edges), np.diff(edges)[0])
    side = count if even else min(_MOST_PIXELS, max(4 * count, 100))
    places = edges[0] + (np.arange(side) + 0.5) / side * (edges[-1] - edges[0])
    return np.clip(np.searchsorted(edges, places, side="right") - 1, 0, count - 1)


def _for_page(text: str, anchor: str) -> str:
    """The ``<svg>`` element alone, without a fixed size, with its own identifiers and the page's
    colours.
    """
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'id="(light|dark)-map', r'class="\1" id="\1-map', svg)
    svg = re.sub(r'\bid="', f'id="{anchor}-', svg)
    svg = re.sub(r"url\(#", f"url(#{anchor}-", svg)
    svg = svg.replace("xlink:href", "href").replace('href="#', f'href="#{anchor}-')
    known = {colour.lower() for colour in style.DARK}
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda m: _variable(m[0]) if m[0] in known else _PLAIN.get(m[0], m[0]),
        svg,
    )


_PLAIN = {"#000000": "currentColor", "#ffffff": "var(--ground)"}


def _variable(colour: str) -> str:
    return f"var(--c{colour[1:].lower()})"


def colour_variables(dark: bool) -> str:
    """CSS that sets the colours of all drawings."""
    return "".join(
        f"--c{light[1:].lower()}:{other if dark else light};" for light, other in style.DARK.items()
    )


# -- legend ----------------------------------------------------------------------------------------


def _legend(figure: Figure) -> str:
    """A button for each named series of the figure, which switches it off and on."""
    series: dict[str, tuple[str, bool, list[str]]] = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            label, gid = str(line.get_label()), line.get_gid() or ""
            name = label.lstrip("_")
            if not gid.startswith("line-") or (label.startswith("_") and name not in series):
                continue
            dashed = line.get_linestyle() not in ("-", "None", "")
            _, _, ids = series.setdefault(name, (to_hex(line.get_color()), dashed, []))
            ids.append(gid.removeprefix("line-"))
    return "".join(
        f'<button type="button" class="series{" dashed" * dashed}"'
        f' style="--series:{_variable(colour) if colour != "#000000" else "currentColor"}"'
        f' data-series="{" ".join(ids)}" aria-pressed="true">{html.escape(name)}</button>'
        for name, (colour, dashed, ids) in series.items()
    )


def _scale_of_colours(axes: Axes) -> str:
    """Limits and colours of a heat map that has no bar of its own."""
    meshes = [c for c in axes.collections if isinstance(c, QuadMesh)]
    if not meshes:
        return ""
    in_words = style.tick_percent if meshes[0].cmap.name == "sequential" else style.number
    low, high = (in_words(v) for v in meshes[0].get_clim())
    return f'<span class="scale {meshes[0].cmap.name}">{low}<i></i>{high}</span>'
