"""Figures of one run's spectrum, each beside the walk without direction that it must be read
against.

``plot_spectra`` writes them all. Every figure is a function that returns a matplotlib ``Figure`` of
its own and must run inside ``style.styled()``. All numbers come from
``relexkit.geometry.spectrum``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from relexkit import RelexkitError
from relexkit.analysis import style
from relexkit.analysis.variance_map import variance_figure
from relexkit.extension import (
    Gram,
    ScopeSpectrum,
    Spectrum,
    agreement,
    single_threaded_blas,
    spectrum,
    walk_gram,
)

MARKS = (0.90, 0.95, 0.99)
"""Shares of the variance whose number of directions the spectrum figure tells."""

_MAX_PREFIXES = (
    60  # each prefix costs an eigendecomposition: 1000 of them on 1000 steps would take minutes
)
_MAX_MARKERS = 64  # more recorded steps than this are drawn as a bare line


def plot_spectra(gram: Gram, folder: Path, *, centered: bool = False) -> list[Path]:
    """Write the figures of a run into ``folder``, as PNG and SVG; returns the paths.

    ``spectrum``, ``coefficients``, ``variance_by_layer_and_module`` and ``geometry``. With a single
    recorded step, or if nothing moved, they say so in words instead.

    Args:
        gram: per-tensor Gram matrices, N tensors and T steps, already cut to the steps wanted.
        folder: made if missing; files of the same names are replaced.
        centered: about the mean checkpoint instead of the base.

    Raises:
        RelexkitError: there is no tensor at all.
        OSError: the folder cannot be written.

    Reads no weights; time grows with ``N T^3``, seconds for 272 tensors and 160 steps.
    """
    if not gram.names:
        raise RelexkitError(
            "there is no tensor to plot: the store holds no floating-point tensor that could move"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = spectrum(gram, scope="global", centered=centered)
    written: list[Path] = []
    with (
        style.styled(),
        single_threaded_blas(),
    ):  # hundreds of small decompositions: more threads make them slower
        reason = nothing_to_draw(gram, whole)
        figures = {
            "spectrum": lambda: spectrum_figure(
                whole, spectrum(gram, scope="module", centered=centered)
            ),
            "coefficients": lambda: coefficients_figure(whole),
            "variance_by_layer_and_module": lambda: variance_figure(gram, whole),
            "geometry": lambda: geometry_figure(gram, whole),
        }
        for name, draw in figures.items():
            figure = words_figure(name.replace("_", " ").capitalize(), reason) if reason else draw()
            written += style.save(figure, folder, name)
    return written


def nothing_to_draw(gram: Gram, whole: Spectrum) -> str | None:
    """Why a run has no geometry to draw, as sentences; None if it has one."""
    steps, run = gram.steps, whole.scopes[0]
    still = int(np.count_nonzero(np.trace(gram.matrices, axis1=1, axis2=2) == 0))
    if still == len(gram.names):
        recorded = (
            f"the one recorded step ({steps[0]})"
            if len(steps) == 1
            else f"{len(steps)} recorded steps ({_span(steps)})"
        )
        return (
            f"Nothing moved: all {len(gram.names)} tensors equal the base in {recorded}, so there"
            " is no variance to explain. Either training had no effect yet, or the stored"
            " precision hides it."
        )
    if len(steps) == 1:
        distance = float(np.sqrt(np.trace(gram.matrices[:, 0, 0, None, None].sum(axis=0))))
        moved = (
            f"{len(gram.names) - still} of {len(gram.names)} tensors moved, by {distance:.3g} in"
            " all (L2 norm)."
        )
        return (
            f"One recorded step ({steps[0]}): {moved} There is one direction by definition, which"
            " explains everything and tells nothing. Record more steps to see a spectrum."
        )
    if not len(run.singular_values):
        return (
            f"All {len(steps)} recorded steps ({_span(steps)}) are the same checkpoint: there is no"
            " variance about their mean. The spectrum about the base, uncentered, shows how far it"
            " lies from the base."
        )
    return None


def words_figure(title: str, sentences: str) -> Figure:
    """A small figure that only says something."""
    figure = style.new_figure(1.5)
    figure.suptitle(title, x=0.01, ha="left")
    style.say(figure.add_subplot(), sentences)
    return figure


# -- spectrum --------------------------------------------------------------------------------------


def spectrum_figure(whole: Spectrum, modules: Spectrum) -> Figure:
    """Explained variance ratio of each direction, and their running sum: whole model, module types,
    null.

    Args:
        whole: spectrum of the scope ``global``.
        modules: spectrum of the scope ``module``, thin lines behind.
    """
    figure = style.new_figure(2.9)
    each, together = figure.subplots(1, 2)
    each_direction_panel(each, whole, modules)
    first_directions_panel(together, whole, modules)
    style.letter([each, together])
    handles, labels = each.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=3)
    return figure


def each_direction_panel(axes: Axes, whole: Spectrum, modules: Spectrum) -> None:
    """Explained variance ratio of each direction, of the run, its module types and the null."""
    run, null = whole.scopes[0], whole.null
    _with_parts(axes, whole, modules, _ratios)
    axes.set_title(f"Each direction ({_kind(whole)})")
    axes.set_ylabel("explained variance ratio")
    _ratio_axis(axes, min(_ratios(run)[-1], _ratios(null)[-1]))


def first_directions_panel(axes: Axes, whole: Spectrum, modules: Spectrum) -> None:
    """Explained variance ratio of the first directions together, and how many reach ``MARKS``."""
    run, null = whole.scopes[0], whole.null
    moving = _with_parts(axes, whole, modules, _running_sum)
    axes.set_title("First directions together")
    _running_axis(axes, [run, null, *moving])
    _mark_directions(axes, run, null)


def _with_parts(
    axes: Axes,
    whole: Spectrum,
    modules: Spectrum,
    values: Callable[[ScopeSpectrum], np.ndarray],
) -> list[ScopeSpectrum]:
    """Draws ``values`` of the run, the null, and the module types that move; returns those."""
    run, null = whole.scopes[0], whole.null
    moving = [s for s in modules.scopes if len(s.singular_values)]
    for index, part in enumerate(moving):
        axes.plot(
            _numbers(part),
            values(part),
            color=style.PARTS,
            linewidth=0.6,
            alpha=0.7,
            label="each module type" if index == 0 else f"_{part.name}",
            zorder=1.5,
        )
    axes.plot(_numbers(null), values(null), **style.NULL_LINE, label=style.NULL_LABEL)
    axes.plot(
        _numbers(run),
        values(run),
        color=style.RUN,
        marker="o",
        markevery=slice(0, 10),
        label="whole model",
    )
    _direction_axis(axes, max(len(s.singular_values) for s in (run, null, *moving)))
    return moving


def _ratios(scope: ScopeSpectrum) -> np.ndarray:
    return scope.explained_variance_ratio


def _running_sum(scope: ScopeSpectrum) -> np.ndarray:
    return np.minimum(
        np.cumsum(scope.explained_variance_ratio), 1.0
    )  # rounding may carry the last one past 1


def _numbers(scope: ScopeSpectrum) -> np.ndarray:
    return np.arange(1, len(scope.singular_values) + 1)


def _direction_axis(axes: Axes, count: int) -> None:
    axes.set_xlabel("direction")
    if count > 10:  # the first few directions matter, and there may be a thousand
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(
            FixedLocator([d * 10**e for e in range(6) for d in (1, 2, 5) if d * 10**e <= count])
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(0.9, count * 1.1)
    else:
        axes.xaxis.set_major_locator(FixedLocator(range(1, count + 1)))
        axes.set_xlim(0.8, max(2, count) + 0.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _ratio_axis(axes: Axes, lowest: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(max(lowest / 2, 8e-7), 1.6)
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(style.tick_percent))


def _running_axis(axes: Axes, scopes: Sequence[ScopeSpectrum]) -> None:
    """Logarithmic in what is left to explain, so that 90, 95 and 99 % lie apart; the upper edge is
    100 %.
    """
    firsts = [float(s.explained_variance_ratio[0]) for s in scopes]
    least_left = float(np.clip((1 - firsts[0]) / 3, 1e-5, 5e-4))

    def left_to_explain(share: np.ndarray) -> np.ndarray:
        return -np.log10(np.maximum(1 - np.asarray(share, float), least_left))

    def share_at(height: np.ndarray) -> np.ndarray:
        return 1 - 10.0 ** -np.asarray(height, float)

    axes.set_yscale("function", functions=(left_to_explain, share_at))
    bottom = max(t for t in (0.0, 0.5, 0.8) if t <= min(firsts))
    inner = [
        t
        for t in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
        if t >= bottom and 1 - t > 1.9 * least_left
    ]
    axes.yaxis.set_major_locator(FixedLocator([*inner, 1.0]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(style.tick_percent))
    axes.set_ylim(bottom, 1.0)


def _mark_directions(axes: Axes, run: ScopeSpectrum, null: ScopeSpectrum) -> None:
    """Lines at ``MARKS``, and to the right of each how many directions the run and the null need to
    reach it.
    """
    place = axes.get_yaxis_transform()
    for share in MARKS:
        axes.axhline(share, color=style.MUTED, linewidth=0.7, zorder=1)
        text = f"{run.num_directions(share)}  ({null.num_directions(share)})"
        axes.text(1.03, share, text, transform=place, va="center", fontsize=7.5)
    heading, above = "directions\nneeded\n(walk)", (0, 8)
    axes.annotate(
        heading,
        (1.03, MARKS[-1]),
        above,
        place,
        "offset points",
        va="bottom",
        fontsize=7,
        color=style.MUTED,
    )


# -- coefficients ----------------------------------------------------------------------------------


def coefficients_figure(whole: Spectrum, count: int = 3) -> Figure:
    """``coefficients_panel`` as a figure."""
    figure = style.new_figure(3.1)
    axes = figure.add_subplot()
    coefficients_panel(axes, whole, count)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def coefficients_panel(axes: Axes, whole: Spectrum, count: int = 3) -> None:
    """The first ``count`` coefficients of the whole model against the step, with the first one's
    least-squares line.

    The null's first coefficient is drawn with the run's first singular value in place of its own.
    """
    run, null, steps = whole.scopes[0], whole.null, whole.steps
    axes.axhline(0, color=style.MUTED, linewidth=0.6, zorder=1)
    marker = _marker(steps)
    for k, color in zip(
        range(min(count, len(run.singular_values))),
        (style.RUN, style.SECOND, style.THIRD),
        strict=False,
    ):
        label = (
            f"direction {k + 1}: {style.percent(run.explained_variance_ratio[k])} of the variance"
        )
        axes.plot(
            steps,
            run.coefficients[:, k],
            color=color,
            marker=marker,
            label=label,
            linewidth=1.4 if k == 0 else 1.0,
        )
    if len(steps) >= 3:
        line = np.polynomial.Polynomial.fit(steps, run.coefficients[:, 0], 1)
        label = f"line through direction 1: R² {_r_squared(run)}"
        axes.plot(
            steps,
            line(steps),
            color="black",
            linewidth=0.9,
            linestyle=(0, (1, 1.5)),
            label=label,
            zorder=2.5,
        )
    shape = null.coefficients[:, 0] / null.singular_values[0] * run.singular_values[0]
    reading = f": R² {_r_squared(null)}" if len(steps) >= 3 else ""
    axes.plot(steps, shape, **style.NULL_LINE, label=f"{style.NULL_LABEL}, scaled{reading}")
    _step_axis(axes, steps)
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.set_ylabel("coefficient (L2 norm of weights)")
    axes.set_title(f"Position along the first directions ({_about(whole)})")
    if len(steps) < 3:
        axes.plot([], [], " ", label="two steps: every line fits, there is no R²")


def _r_squared(scope: ScopeSpectrum) -> str:
    if not np.isfinite(scope.r2[0]):
        return "undefined"
    return f"{scope.r2[0]:.3f}" if scope.r2[0] < 0.9995 else f"{scope.r2[0]:.6f}"


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) <= _MAX_MARKERS else None


def _step_axis(axes: Axes, steps: np.ndarray) -> None:
    margin = 0.02 * max(1, steps[-1] - steps[0])
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlabel("optimizer step")


# -- geometry --------------------------------------------------------------------------------------


def geometry_figure(gram: Gram, whole: Spectrum) -> Figure:
    """How straight the path is, step by step: cosines of neighbouring updates, agreement of the
    first direction, update norms.
    """
    figure = style.new_figure(5.0)
    turning, agreeing, striding = figure.subplots(3, 1, sharex=True)
    turning_panel(turning, whole)
    agreement_panel(agreeing, gram, whole)
    update_norms_panel(striding, gram)
    style.letter([turning, agreeing, striding])
    for axes in (turning, agreeing):
        axes.set_xlabel("")
    handles, labels = agreeing.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    figure.align_ylabels()
    return figure


def agreement_panel(axes: Axes, gram: Gram, whole: Spectrum) -> None:
    """|cos| of the first direction up to each step with that of all steps, beside the walk's."""
    prefixes = _prefixes(len(gram.steps))
    of_run, of_walk = (
        agreement(g, prefixes, centered=whole.centered)
        for g in (gram.scoped("global").matrices[0], walk_gram(gram.steps))
    )
    _against_null(axes, gram.steps[prefixes - 1], of_run, of_walk, _marker(gram.steps))
    axes.set_ylim(max(0.0, min(np.nanmin([*of_run, *of_walk]) - 0.05, 0.8)), 1.03)
    axes.set_ylabel("|cosine|")
    axes.set_title(f"First direction up to the step against that of all steps ({_about(whole)})")
    _step_axis(axes, gram.steps)


def update_norms_panel(axes: Axes, gram: Gram) -> None:
    """Norms of the updates beside the walk's."""
    run, walk = (
        relative_update_norms(g) for g in (gram.scoped("global").matrices[0], walk_gram(gram.steps))
    )
    _against_null(axes, gram.steps, run, walk, _marker(gram.steps))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(style.number))
    axes.set_ylabel("relative norm")
    axes.set_title("Norm of each update, relative to the largest distance from the base")
    _step_axis(axes, gram.steps)


def turning_panel(axes: Axes, whole: Spectrum) -> None:
    """Cosines of neighbouring updates by step."""
    cosines = whole.scopes[0].update_cosines
    finite = cosines[np.isfinite(cosines)]
    axes.axhline(0, **style.NULL_LINE)
    axes.plot(
        whole.steps[:-1],
        cosines,
        color=style.RUN,
        linewidth=0.8,
        marker=_marker(whole.steps),
        label="_cosine",
    )
    axes.set_ylim(min(-0.25, *(finite - 0.1)) if len(finite) else -0.25, 1.05)
    axes.set_ylabel("cosine")
    mean = (
        f"mean {_two_decimals(finite.mean())}"
        if len(finite)
        else "no two neighbouring updates move anything"
    )
    axes.set_title(f"Updates before and after the step ({mean})")
    _step_axis(axes, whole.steps)


def _two_decimals(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace(
        "-", "\N{MINUS SIGN}"
    )  # + 0.0: no minus before a zero


def _prefixes(num_steps: int) -> np.ndarray:
    return np.unique(np.linspace(1, num_steps, min(num_steps, _MAX_PREFIXES)).round().astype(int))


def _against_null(
    axes: Axes, steps: np.ndarray, run: np.ndarray, null: np.ndarray, marker: str | None
) -> None:
    axes.plot(steps, run, color=style.RUN, linewidth=1.2, marker=marker, label="whole model")
    axes.plot(steps, null, **style.NULL_LINE, label=style.NULL_LABEL)


def relative_update_norms(matrix: np.ndarray) -> np.ndarray:
    """Norm of each step-to-step update over the largest distance from the base, ``[T]``, from a
    Gram matrix ``[T, T]``.

    Updates span the gap between recorded steps, so wider gaps give larger ones: compare with the
    null of the same steps.
    """
    squared = np.diag(matrix)
    between = squared[1:] + squared[:-1] - 2 * np.diag(matrix, 1)
    return np.sqrt(np.maximum(np.concatenate([squared[:1], between]), 0.0) / squared.max())


def _span(steps: np.ndarray) -> str:
    return f"{steps[0]} to {steps[-1]}"


def _kind(whole: Spectrum) -> str:
    return "centered" if whole.centered else "uncentered"


def _about(whole: Spectrum) -> str:
    return "about the mean checkpoint" if whole.centered else "about the base"
