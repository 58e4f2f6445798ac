"""``relexkit linearity``: how straight every single weight's path is, beside a walk's."""

from __future__ import annotations

from dataclasses import dataclass

from relexkit.commands.console import number, print_json, print_table, progress_bar, show
from relexkit.commands.observer import OfGram, observer
from relexkit.options import Wide, option
from relexkit.weights.layout import Scope

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, kw_only=True)
class Options(OfGram, Wide):
    """Options of ``relexkit linearity``."""

    until: int | None = option(default=None, metavar="STEP")
    """use only steps up to this one"""
    scope: Scope = "module"
    """what a row of the table is"""


def run(options: Options) -> None:
    """Print quantiles of the per-weight R^2 of every group and of the walk."""
    from rich.table import Table

    from relexkit.geometry.linearity import quantiles_of, weight_linearity
    from relexkit.geometry.null import calibrate
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(options.store)
    with observer(options.compute) as observed:
        matrices = observed.observe(store, options.until).gram
    if observed.silent:
        return
    fit = calibrate(matrices.scoped("global")).fitted
    with progress_bar() as progress:
        walk = None if fit is None else fit.walk_covariance()
        result = weight_linearity(store, until=options.until, covariance=walk, progress=progress)
    result = result.scoped(options.scope)
    rows = [*zip(result.names, result.counts, result.still.tolist(), strict=True)]
    if options.json:
        print_json(
            {
                "steps": result.steps.tolist(),
                "groups": [{"name": n, "counts": c.tolist(), "still": s} for n, c, s in rows],
                "walk": result.null.tolist(),
            }
        )
        return
    table = Table(
        title="R² of each weight's line on the step: quantiles over the moving weights",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    table.add_column(options.scope, no_wrap=True)
    for heading in (*(f"{share:.0%}" for share in _SHARES), "over 0.9", "still"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, counts, still in [*rows, ("walk without direction", result.null, 0)]:
        total = counts.sum()
        cells = [number(v) for v in quantiles_of(counts, _SHARES)]
        high = f"{100 * counts[90:].sum() / total:.1f} %" if total else "-"
        table.add_row(
            name,
            *cells,
            high,
            "" if name.startswith("walk") else f"{still / max(1, still + int(total)):.1%}",
        )
    print_table(table, least=("75%", "25%", "still"), wide=options.wide)
    if not result.counts.any():
        show("Nothing moved, so no weight has a line.")
