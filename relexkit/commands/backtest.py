"""``relexkit backtest``: every method in the run's own past, how far to trust it, and where the run
goes from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relexkit.assess.backtest import CHEAP
from relexkit.commands.console import number, print_json, print_table, progress_bar, say, show
from relexkit.commands.observer import OfGram, observer
from relexkit.options import Wide, option
from relexkit.predict.extrapolators import BASELINE
from relexkit.registry import plot
from relexkit.weights.layout import Scope

if TYPE_CHECKING:
    from relexkit.assess.backtest import Backtest
    from relexkit.assess.forecast import Forecast

_FORECAST_RATIOS = (1.25, 1.5, 2.0, 4.0)
_SHOWN_GROUPS = 40
_LEAST = ("first-update", "least-squares-origin", "average", "least-squares", "two-point", "model")
"""Methods that a narrow terminal goes without, the least important first."""


@dataclass(frozen=True, kw_only=True)
class Options(OfGram, Wide):
    """Options of ``relexkit backtest``."""

    method: tuple[str, ...] = option(default=(*CHEAP, "model"), metavar="M")
    """only these (hold is always there)"""
    until: tuple[int, ...] | None = option(default=None, metavar="STEP")
    """prefixes to predict from (default: up to eight)"""
    since: int | None = option(default=None, metavar="STEP")
    """use only the steps after this one, relative to it, up to the next jump"""
    scope: Scope = "global"
    """also each group's error and skill, unless global"""
    plot: Path | None = option(default=None, metavar="DIR")
    """also write figures there"""


def run(options: Options) -> None:
    """Print the grid, the horizons and the forecast."""
    from relexkit.assess.backtest import backtest
    from relexkit.assess.forecast import forecast
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(options.store)
    with observer(options.compute) as observed:
        matrices = observed.observe(store, since=options.since).gram
    if observed.silent:
        return
    ahead = None
    with progress_bar():
        result = backtest(matrices, options.method, options.until)
        if len(matrices.steps) >= 3 and np.trace(matrices.matrices.sum(axis=0)) > 0:
            targets = [round(ratio * int(matrices.steps[-1])) for ratio in _FORECAST_RATIOS]
            ahead = forecast(matrices, targets)
    if options.json:
        print_json(_document(result, ahead, options.scope))
    else:
        _print_backtest(result, ahead, options.wide)
        if options.scope != "global":
            _print_groups(result, options.scope, options.wide)
    if options.plot:
        for path in plot("backtest")(matrices, result, options.plot):
            say(f"wrote {path}")


def _document(result: Backtest, ahead: Forecast | None, scope: str) -> dict[str, Any]:
    document = {
        "methods": result.methods,
        "grid": [asdict(row) for row in result.grid],
        "horizon": [asdict(h) for h in result.horizon],
        "forecast": (
            None
            if ahead is None
            else {
                "targets": ahead.targets.tolist(),
                "coefficients": ahead.coefficients[:, 0].tolist(),
                "low": ahead.low[:, 0].tolist(),
                "high": ahead.high[:, 0].tolist(),
                "level": ahead.level,
            }
        ),
    }
    if scope != "global":
        groups = result.by_group(scope)
        document["groups"] = {name: [asdict(row) for row in rows] for name, rows in groups.items()}
    return document


def _print_backtest(result: Backtest, ahead: Forecast | None, wide: bool) -> None:
    """Relative error of the whole model's delta: a row for a prefix and a later step, a column for
    a method.
    """
    table = _table("Relative error of the whole model's delta", ("from", "to", *result.methods))
    errors = {(row.until, row.target, row.method): row.relative_error for row in result.grid}
    for until in sorted({key[0] for key in errors}):
        later = sorted({key[1] for key in errors if key[0] == until})
        # the next recorded steps at 1.25, 1.5, 2, 4 times the prefix, and the last one
        wanted = [
            next((s for s in later if s >= ratio * until), later[-1]) for ratio in (1.25, 1.5, 2, 4)
        ]
        for target in sorted({*wanted, later[-1]}):
            row_errors = [
                errors.get((until, target, method), math.nan) for method in result.methods
            ]
            best = min((e for e in row_errors if not math.isnan(e)), default=math.nan)
            cells = [f"[bold]{number(e)}[/bold]" if e == best else number(e) for e in row_errors]
            table.add_row(str(until), str(target), *cells)
    print_table(table, least=_LEAST, wide=wide)
    for horizon in result.horizon:
        show(str(horizon))
    for (method, until), reason in result.failures.items():
        show(f"{method} from step {until}: {reason}")
    if ahead is not None:
        places = ", ".join(
            f"{c:.3g} ({low:.3g} to {high:.3g}) at {t:.0f}"
            for t, c, low, high in zip(
                ahead.targets,
                ahead.coefficients[:, 0],
                ahead.low[:, 0],
                ahead.high[:, 0],
                strict=True,
            )
        )
        show(
            f"First coefficient by the trajectory model, {100 * ahead.level:.0f} % intervals by"
            f" {ahead.num_prefixes} checks in the run's own past: {places}."
        )


def _print_groups(result: Backtest, scope: str, wide: bool) -> None:
    """Each group's skill against hold, averaged over prefixes and later steps."""
    others = [method for method in result.methods if method != BASELINE]
    table = _table(
        "Mean skill against hold over all prefixes and later steps",
        (scope, "hold's error", *others),
    )
    for name, rows in list(result.by_group(scope).items())[:_SHOWN_GROUPS]:
        held = _mean([row.relative_error for row in rows if row.method == BASELINE])
        skills = [_mean([row.skill for row in rows if row.method == method]) for method in others]
        table.add_row(name, number(held), *(number(s) for s in skills))
    print_table(table, least=_LEAST, wide=wide)


def _table(title: str, headings: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for heading in headings:
        table.add_column(
            heading,
            justify="left" if heading in ("layer", "module", "tensor") else "right",
            no_wrap=True,
        )
    return table


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
