"""How much the first direction explains in each part of the model: a table by layer and module
type, and its heat map.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from relexkit.analysis import style
from relexkit.extension import Gram, Spectrum, center, decompose, layer_of, module_of

MAX_ROWS = 48
"""Most rows of each part of the heat map; the tensors with the most parameters keep theirs."""


@dataclass(frozen=True)
class VarianceTable:
    """Explained variance ratio of the first direction, by place in the model; NaN where nothing
    moved.

    Attributes:
        layers: L layer numbers, ascending; may have gaps, may be empty.
        modules: K module types that occur in layers, in order of appearance.
        ratios: ``float64 [K, L]``.
        present: ``bool [K, L]``, whether the model has such a tensor at all.
        others: names of the tensors that are in no layer (embeddings, final norm, head).
        other_ratios: ``float64``, one for each of ``others``.
        num_left_out: module types and other tensors that had no room.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    ratios: np.ndarray
    present: np.ndarray
    others: tuple[str, ...]
    other_ratios: np.ndarray
    num_left_out: int


def variance_table(
    gram: Gram, *, centered: bool = False, max_rows: int = MAX_ROWS
) -> VarianceTable:
    """First explained variance ratios by layer and module type.

    Tensors that share a cell are analysed together, as one group: those of an encoder's and a
    decoder's layer of the same number, and the experts of one layer (numbers inside a module's name
    become ``*``).
    """
    cells: dict[tuple[str, int | None], list[int]] = {}
    for row, name in enumerate(gram.names):
        cells.setdefault(
            (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module_of(name)), layer_of(name)), []
        ).append(row)
    inside = _largest(
        gram,
        {
            m: [
                r
                for (n, layer), rows in cells.items()
                if n == m and layer is not None
                for r in rows
            ]
            for m, layer in cells
            if layer is not None
        },
        max_rows,
    )
    outside = _largest(
        gram, {m: rows for (m, layer), rows in cells.items() if layer is None}, max_rows
    )
    layers = tuple(sorted({layer for _, layer in cells if layer is not None}))
    ratios = np.full((len(inside), len(layers)), np.nan)
    present = np.zeros(ratios.shape, bool)
    for i, module in enumerate(inside):
        for j, layer in enumerate(layers):
            rows = cells.get((module, layer))
            if rows is not None:
                present[i, j] = True
                ratios[i, j] = _first_ratio(gram, rows, centered)
    other_ratios = np.array([_first_ratio(gram, cells[name, None], centered) for name in outside])
    named = len({(module, layer is None) for module, layer in cells})
    return VarianceTable(
        layers, inside, ratios, present, outside, other_ratios, named - len(inside) - len(outside)
    )


def _largest(gram: Gram, groups: dict[str, list[int]], count: int) -> tuple[str, ...]:
    """Names of the ``count`` groups with the most parameters, in their own order."""
    sizes = {name: int(gram.num_parameters[rows].sum()) for name, rows in groups.items()}
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:count])
    return tuple(name for name in groups if name in kept)


def _first_ratio(gram: Gram, rows: list[int], centered: bool) -> float:
    matrix = gram.matrices[rows].sum(axis=0)
    ratios = decompose(center(matrix) if centered else matrix).explained_variance_ratio
    return float(ratios[0]) if len(ratios) else float("nan")


def variance_figure(
    gram: Gram,
    whole: Spectrum,
    *,
    width_inches: float = style.WIDTH_INCHES,
    bar: bool = True,
) -> Figure:
    """Heat map of ``variance_table``: layers across, module types down, tensors outside the layers
    below.

    The null's value is marked on the colour bar, if there is one; a cell that never moved is grey
    and hatched, one that the model does not have is empty.
    """
    table = variance_table(gram, centered=whole.centered)
    null = float(whole.null.explained_variance_ratio[0])
    values = np.concatenate([table.ratios.ravel(), table.other_ratios])
    norm = _ratio_norm(values[np.isfinite(values)], null)
    rows = [n for n in (len(table.modules), len(table.others)) if n]
    height = 0.35 + 1.0 * bar + 0.3 * len(rows) + 0.165 * sum(rows)
    figure = style.new_figure(height, width_inches)
    grid = GridSpec(bar + len(rows), 1, figure=figure, height_ratios=[0.8] * bar + rows)
    meshes = []
    if table.modules:
        axes = figure.add_subplot(grid[int(bar)])
        meshes.append(_cells(axes, table.ratios, table.present, table.modules, norm, "layers"))
        axes.xaxis.set_major_locator(FixedLocator(_layer_ticks(len(table.layers))))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: str(table.layers[int(value)]))
        )
        axes.set_xlabel("layer")
    if table.others:
        axes = figure.add_subplot(grid[bar + len(rows) - 1])
        column = table.other_ratios[:, None]
        meshes.append(
            _cells(axes, column, np.ones(column.shape, bool), table.others, norm, "others")
        )
        axes.set_xlim(-0.5, 9.5)  # one cell and room for its value in words
        axes.xaxis.set_visible(False)
        for row, ratio in enumerate(table.other_ratios):
            text = style.percent(ratio) if np.isfinite(ratio) else "did not move"
            axes.text(0.7, row, text, va="center", fontsize=7.5)
        if table.modules:
            axes.set_title("outside the layers", color=style.MUTED, fontsize=7.5, pad=3)
    kind = "centered" if whole.centered else "uncentered"
    if bar:
        _colour_bar(figure, figure.add_subplot(grid[0]), meshes[0], norm, null, kind)
    notes = [
        Patch(
            facecolor=style.STILL,
            edgecolor=style.MUTED,
            hatch="/////",
            label="did not move",
            linewidth=0.4,
        )
    ]
    shown = np.isnan(table.ratios[table.present]).any() or np.isnan(table.other_ratios).any()
    if shown:
        figure.legend(handles=notes, loc="outside lower left")
    if table.num_left_out:
        figure.supxlabel(
            f"({table.num_left_out} smaller rows are not shown)",
            fontsize=7.5,
            color=style.MUTED,
            x=0.99,
            ha="right",
        )
    return figure


def _ratio_norm(ratios: np.ndarray, null: float) -> Normalize:
    """Limits at multiples of 5 % around all values and the null."""
    low, high = (
        np.floor(20 * min(ratios.min(), null)) / 20,
        np.ceil(20 * max(ratios.max(), null)) / 20,
    )
    return Normalize(
        max(0.0, low - 0.05 * (high - low < 0.05)), min(1.0, high + 0.05 * (high - low < 0.05))
    )


def _cells(
    axes: Axes,
    ratios: np.ndarray,
    present: np.ndarray,
    names: Sequence[str],
    norm: Normalize,
    gid: str,
) -> QuadMesh:
    num_rows, num_columns = ratios.shape
    edge = 0.4 if num_columns <= 40 else 0.2
    columns, rows = np.arange(num_columns + 1) - 0.5, np.arange(num_rows + 1) - 0.5
    mesh = axes.pcolormesh(
        columns,
        rows,
        np.ma.masked_invalid(ratios),
        cmap=style.SEQUENTIAL,
        norm=norm,
        edgecolors="white",
        linewidth=edge,
        gid=gid,
    )
    for row, column in zip(*np.nonzero(present & np.isnan(ratios)), strict=True):
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(
            Rectangle(
                corner,
                1,
                1,
                facecolor=style.STILL,
                edgecolor=style.MUTED,
                hatch="/////",
                linewidth=0.3,
                gid="still",
            )
        )
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.yaxis.set_major_locator(FixedLocator(range(num_rows)))
    axes.set_yticklabels([style.elide(name) for name in names], fontsize=7)
    axes.tick_params(length=0)
    return mesh


def _layer_ticks(count: int) -> list[int]:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if count <= 16 * n)
    return list(range(0, count, every))


def _colour_bar(
    figure: Figure, axes: Axes, mesh: QuadMesh, norm: Normalize, null: float, kind: str
) -> None:
    bar = figure.colorbar(mesh, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(style.tick_percent))
    axes.set_xlabel(f"explained variance ratio of the first direction ({kind})")
    axes.axvline(null, color="white", linewidth=3)
    axes.axvline(null, color="black", linewidth=1.2, gid="null")
    place = float(norm(null))
    side = "left" if place < 0.3 else "right" if place > 0.7 else "center"
    axes.text(
        null,
        1.25,
        f"{style.NULL_LABEL}: {style.percent(null)}",
        transform=axes.get_xaxis_transform(),
        ha=side,
        fontsize=7.5,
    )
