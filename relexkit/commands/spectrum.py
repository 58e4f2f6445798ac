"""``relexkit spectrum``: principal directions of the updates, beside those of a walk without
direction.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from relexkit.commands.console import (
    number,
    percent,
    print_json,
    print_table,
    progress_bar,
    say,
    show,
)
from relexkit.commands.observer import OfGram, observer
from relexkit.options import Wide, option
from relexkit.registry import plot
from relexkit.weights.layout import Scope

if TYPE_CHECKING:
    from relexkit.assess.metrics import Informative
    from relexkit.geometry.null import WalkNull
    from relexkit.geometry.spectrum import ScopeSpectrum, Spectrum

_SHOWN_ROWS = 40
_LEAST = (
    "changed/step",
    "ever",
    "90/95/99 %",
    "agree (walk)",
    "straight (walk)",
    "parameters",
    "1st-2nd % (walk)",
    "cos (walk)",
    "energy",
    "R² (walk)",
)
"""Columns that a narrow terminal goes without, the least important first."""


@dataclass(frozen=True, kw_only=True)
class Options(OfGram, Wide):
    """Options of ``relexkit spectrum``."""

    scope: Scope = "tensor"
    """what a row of the table is"""
    until: int | None = option(default=None, metavar="STEP")
    """use only steps up to this one"""
    since: int | None = option(default=None, metavar="STEP")
    """use only the steps after this one, relative to it, up to the next jump"""
    centered: bool = False
    """PCA about the mean checkpoint instead of the base"""
    momentum: float | None = option(default=None, metavar="BETA")
    """of the walk to compare with: Adam's first beta (default: fitted)"""
    all: bool = False
    """print every row, not only the 40 with most energy"""
    plot: Path | None = option(default=None, metavar="DIR")
    """also write figures there"""
    csv: Path | None = option(default=None, metavar="FILE")
    """also write the table there"""
    directions: Path | None = option(default=None, metavar="DIR")
    """also write the first 2 (or --components) directions there as safetensors"""
    norm: Literal["task", "unit"] = "task"
    """of written directions: the last step's coefficient, which makes a task vector, or 1"""


def run(options: Options) -> None:
    """Print the table, and write what was asked for."""
    from relexkit.geometry.spectrum import spectrum
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(options.store)
    with observer(options.compute) as observed:
        run_so_far = observed.observe(store, options.until, options.since)
    if observed.silent:
        return
    matrices, informative = run_so_far.gram, run_so_far.informative
    with progress_bar():
        result = spectrum(
            matrices,
            scope=options.scope,
            centered=options.centered,
            momentum=options.momentum,
        )
    if options.json:
        print_json(_spectrum_document(result, informative))
    else:
        _print_spectrum(result, options, informative)
    if options.plot:
        for path in plot("spectrum")(matrices, options.plot, centered=options.centered):
            say(f"wrote {path}")
    if options.csv:
        from relexkit.geometry.variance import write_csv

        write_csv(result, options.csv)
        say(f"wrote {options.csv}")
    if options.directions:
        from relexkit.materialize.directions import find_directions

        with progress_bar() as progress:
            directions = find_directions(
                store,
                matrices,
                count=options.compute.components or min(2, len(matrices.steps)),
                scope=options.scope,
                centered=options.centered,
            )
            paths = directions.write(options.directions, norm=options.norm, progress=progress)
        for path in paths:
            say(f"wrote {path}")


def _spectrum_document(result: Spectrum, informative: Informative | None) -> dict[str, Any]:
    scopes = [
        {
            "name": s.name,
            "num_parameters": s.num_parameters,
            "energy_share": s.energy_share,
            "singular_values": s.singular_values.tolist(),
            "explained_variance_ratio": s.explained_variance_ratio.tolist(),
            "n_components": {str(p): s.num_directions(p / 100) for p in (90, 95, 99)},
            "coefficients": s.coefficients.tolist(),
            "r2": s.r2.tolist(),
            "agreement": s.agreement.tolist(),
            "update_cosines": s.update_cosines.tolist(),
            "changed": s.changed.tolist(),
            "moved": s.moved.tolist(),
            "unit_moves": s.unit_moves,
            "null": _null_document(s.null),
            "ratio_error": s.ratio_error,
            "angle_error": s.angle_error,
        }
        for s in result.scopes
    ]
    null = {
        "explained_variance_ratio": result.null.explained_variance_ratio.tolist(),
        "r2": result.null.r2.tolist(),
    }
    return {
        "steps": result.steps.tolist(),
        "centered": result.centered,
        "scope": result.scope,
        "scopes": scopes,
        "null": null,
        "whole": _null_document(result.whole),
        "walk_momentum": result.momentum,
        "model": result.fit.summary() if result.fit else None,
        "informative_steps": asdict(informative) if informative else None,
    }


def _null_document(null: WalkNull | None) -> dict[str, Any] | None:
    if null is None:
        return None
    return {
        name: {
            "observed": null.observed[name],
            "walk": null.expected[name],
            "walk_interval": [null.low[name], null.high[name]],
            "p_value": null.p_value[name],
        }
        for name in null.observed
    }


def _print_spectrum(result: Spectrum, options: Options, informative: Informative | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from relexkit.store import describe_steps

    about = (
        "centered: about the mean checkpoint" if result.centered else "uncentered: about the base"
    )
    title = f"Spectrum of {describe_steps(result.steps)} ({about})"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, header_style="bold"
    )
    table.add_column(result.scope, overflow="fold")
    for heading in (
        "parameters",
        "energy",
        "1st % (walk)",
        "1st-2nd % (walk)",
        "90/95/99 %",
        "R² (walk)",
        "cos (walk)",
        "straight (walk)",
        "agree (walk)",
        "changed/step",
        "ever",
    ):
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(s: ScopeSpectrum) -> list[str]:
        null = s.null
        assert null is not None
        shown = [
            _with_null(null, name)
            for name in ("first", "first_two", "r2", "cosine", "straightness", "agreement")
        ]
        return [
            escape(s.name),
            f"{s.num_parameters:,}",
            percent(s.energy_share),
            *shown[:2],
            "/".join(str(s.num_directions(p) or "-") for p in (0.9, 0.95, 0.99)),
            *shown[2:],
            percent(float(s.changed.mean())),
            percent(float(s.moved[-1])),
        ]

    count = len(result.groups.names) if options.all else _SHOWN_ROWS
    ordered = result.scope in ("global", "layer")
    for s in result.scopes[:count] if ordered else result.leading(count):
        table.add_row(*cells(s))
    print_table(table, least=_LEAST, wide=options.wide)
    more = len(result.groups.names) - count
    if more > 0:
        show(f"({more} more rows hold less energy: --all shows them)")
    for line in spectrum_notes(result, informative):
        show(line)


def _with_null(null: WalkNull, name: str) -> str:
    """A statistic and, in parentheses, what its walk gives."""
    value, walk = null.observed[name], null.expected[name]
    if math.isnan(value):
        return "-"
    text, beside = (
        f"{100 * v:.1f}" if name.startswith("first") else number(v) for v in (value, walk)
    )
    return f"{text} [dim]({beside})[/dim]"


def spectrum_notes(result: Spectrum, informative: Informative | None = None) -> list[str]:
    """What a reader of the table must know, in sentences."""
    import numpy as np

    notes = [
        (
            "1st, 1st-2nd: explained variance ratio of the first direction, the first two. R²:"
            " first coefficient on the step. cos: mean cosine of neighbouring updates. straight:"
            " distance from the base over the length of the path. agree: first direction of half"
            " the steps against all, |cos|."
        ),
        (
            "In parentheses: a walk without direction, of the run's own step sizes and momentum;"
            " only what exceeds it is evidence."
        ),
        *_headline(result),
    ]
    if informative and informative.count < informative.known:
        notes.append(
            f"{informative.count} of {informative.known} steps were informative"
            f" ({informative.metric}); between them the optimizer coasts on its momentum, which"
            " looks like a line but is not one."
        )
    groups = result.groups
    still = [groups.names[row] for row in np.flatnonzero(groups.still)]
    if still:
        shown = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
        notes.append(f"Never moved, so there is no variance to explain: {shown}.")
    doubtful = float(np.nanmax(groups.ratio_error[~groups.still], initial=0.0))
    if doubtful > 1e-5:
        notes.append(
            "Approximate (randomized PCA): the first two ratios are off by at most about"
            f" {doubtful:.1g}."
        )
    if len(result.steps) == 1:
        notes.append(
            "One recorded step: there is one direction by definition; record more steps to learn"
            " anything."
        )
    known = ~np.isnan(groups.unit_moves)
    total = int(groups.num_changed[known].sum())
    if total and total < 0.5 * int(groups.num_parameters.sum()) * len(result.steps):
        share = float((groups.num_changed * groups.unit_moves)[known].sum()) / total
        notes.append(
            f"Resolution: few weights change at a step, {100 * share:.0f} % of the changes by"
            " exactly one unit in the last place: the stored precision hides most of the motion."
            " Record float32 weights where possible."
        )
    return notes


def _headline(result: Spectrum) -> list[str]:
    """The run as a whole against its walk, and what the trajectory model says about a drift."""
    fit, whole = result.fit, result.whole
    if fit is None:
        return []
    lines = []
    if whole.num_flips:
        first = f"{percent(whole.observed['first'])} against {percent(whole.expected['first'])} "
        first += (
            f"({percent(whole.low['first'])} to {percent(whole.high['first'])}, p ="
            f" {whole.p_value['first']:.2g})"
        )
        line = f"R² {number(whole.observed['r2'])} against {number(whole.expected['r2'])} "
        line += (
            f"({number(whole.low['r2'])} to {number(whole.high['r2'])}, p ="
            f" {whole.p_value['r2']:.2g})"
        )
        lines.append(
            f"Whole run against {whole.num_flips} walks with momentum {result.momentum:.2f} and its"
            f" own updates, signs flipped: first direction {first}; {line}."
        )
    low, high = fit.drift_to_noise_interval
    short, long = fit.correlation_time_interval
    lines.append(
        f"Drift to noise {fit.drift_to_noise:.2g} ({low:.2g} to {high:.2g}; above 1 a line beats"
        f" standing still), lasting {steps_text(fit.correlation_time)} ({steps_text(short)} to"
        f" {steps_text(long)}); chance of this evidence on a walk: {fit.p_value:.2g}."
    )
    return lines


def steps_text(value: float) -> str:
    """A number of steps, or that it has no end."""
    return "the whole run and on" if math.isinf(value) else f"{value:.3g} steps"
