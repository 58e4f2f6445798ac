"""``relexkit linearity``: how straight every single weight's path is, beside a walk's."""

from __future__ import annotations

import argparse

from relexkit.commands.console import console, number, print_json, progress_bar, show
from relexkit.commands.observer import add_pca, observer

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit linearity``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument("--until", type=int, metavar="STEP", help="use only steps up to this one")
    parser.add_argument(
        "--scope", choices=("global", "module", "layer", "tensor"), default="module"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )
    add_pca(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print quantiles of the per-weight R^2 of every group and of the walk."""
    from rich.table import Table

    from relexkit.geometry.linearity import quantiles_of, weight_linearity
    from relexkit.geometry.null import calibrate
    from relexkit.store import TrajectoryStore
    from relexkit.weights.layout import scope_of

    store = TrajectoryStore(arguments.store)
    with observer(arguments) as observed:
        matrices = observed.observe(store).gram.until(arguments.until)
    if observed.silent:
        return
    fit = calibrate(matrices.scoped("global")).fitted
    with progress_bar() as progress:
        walk = None if fit is None else fit.walk_covariance()
        found = weight_linearity(store, until=arguments.until, covariance=walk, progress=progress)
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(found.names):
        groups.setdefault(
            "global" if arguments.scope == "global" else scope_of(name, arguments.scope), []
        ).append(row)
    rows = [
        (name, found.counts[members].sum(axis=0), int(found.still[members].sum()))
        for name, members in groups.items()
    ]
    if arguments.json:
        print_json(
            {
                "steps": found.steps.tolist(),
                "groups": [{"name": n, "counts": c.tolist(), "still": s} for n, c, s in rows],
                "walk": found.null.tolist(),
            }
        )
        return
    table = Table(
        title="R² of each weight's line on the step: below it lie so many of the moving weights",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    table.add_column(arguments.scope, no_wrap=True)
    for heading in (*(f"{share:.0%}" for share in _SHARES), "over 0.9", "still"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, counts, still in [*rows, ("walk without direction", found.null, 0)]:
        total = counts.sum()
        cells = [number(v) for v in quantiles_of(counts, _SHARES)]
        high = f"{100 * counts[90:].sum() / total:.1f} %" if total else "-"
        table.add_row(
            name,
            *cells,
            high,
            "" if name.startswith("walk") else f"{still / max(1, still + int(total)):.1%}",
        )
    console().print(table)
    if not found.counts.any():
        show("Nothing moved, so no weight has a line.")
