"""``relexkit report``: one self-contained HTML page of a run, with its figures, the claims table
and the commands behind them.

No network, no scripts: the figures are vector images inside the page, which follows the reader's
light or dark setting, fits a phone, and prints.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from relexkit import RelexkitError
from relexkit.analysis import backtest_figures, figures, run_figures, style, variance_map
from relexkit.analysis.claims import Claim, measure_claims
from relexkit.analysis.page import CAPTIONS, CSS
from relexkit.analysis.run_figures import LABELS
from relexkit.analysis.run_names import name_runs
from relexkit.analysis.sweep_figures import sweep_figure
from relexkit.extension import (
    CHEAP,
    Advice,
    Gram,
    Spectrum,
    TrajectoryStore,
    __version__,
    advise,
    backtest,
    describe_steps,
    gram,
    informative_steps,
    progress_bar,
    say,
    single_threaded_blas,
    spectrum,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit report``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE.html", help="the page to write"
    )
    parser.add_argument("--until", type=int, metavar="STEP", help="use only steps up to this one")
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE.json",
        help="what relexkit sweep --json printed: adds its results",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="[NAME=]OTHER.zarr",
        help="other runs to compare with, by their paths or by names of your own",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    with progress_bar() as progress:
        path = write_report(
            arguments.store,
            arguments.out,
            until=arguments.until,
            compare=arguments.compare,
            sweep=arguments.sweep,
            progress=progress,
        )
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def write_report(
    store: str | Path,
    out: str | Path,
    *,
    until: int | None = None,
    compare: list[str] | None = None,
    sweep: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the page of a run to ``out``, replacing it; returns its path.

    One pass over the deltas if the store has no Gram matrices yet, else no weights are read. A
    store with few steps or without metrics gives a shorter page that says what is missing.

    Raises:
        RelexkitError: the store has no steps, or its folder cannot be read.
    """
    named = name_runs([store, *(compare or [])])
    name = next(iter(named))
    opened = TrajectoryStore(named[name])
    if not len(opened.steps):
        raise RelexkitError(
            f"{store}: holds no steps yet; record or import some, then ask for the report again"
        )
    matrices = gram(opened, progress=progress).until(until)
    metrics = {name: values[: len(matrices.steps)] for name, values in opened.metrics().items()}
    others = {
        other: gram(TrajectoryStore(path), progress=progress)
        for other, path in named.items()
        if other != name
    }
    facts, found = _facts(opened, matrices, metrics), _read_sweep(sweep)
    text = build_page(name, matrices, metrics, facts=facts, others=others, sweep=found)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _read_sweep(path: str | Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text())
    except ValueError:
        found = None
    if (
        not isinstance(found, dict)
        or not {"candidates", "baseline", "recommendation"} <= found.keys()
    ):
        raise RelexkitError(
            f"{path}: is not what relexkit sweep --json prints; run the sweep with --json again"
        )
    return found


def build_page(
    name: str,
    gram: Gram,
    metrics: dict[str, np.ndarray],
    *,
    facts: list[tuple[str, str]],
    others: dict[str, Gram] | None = None,
    sweep: dict[str, Any] | None = None,
) -> str:
    """The page as text, from Gram matrices and metrics alone; ``facts`` are names and values for
    its head.
    """
    advice = advise(gram, metrics)
    whole = spectrum(gram, scope="global")
    result = backtest(gram, (*CHEAP, "model")) if len(gram.steps) >= 2 else None
    claims = measure_claims(gram, whole, result, advice, metrics) if result is not None else []
    with style.styled(), matplotlib.rc_context({"svg.fonttype": "path"}), single_threaded_blas():
        shown = _figures(name, gram, metrics, whole, result, others or {})
        if sweep is not None:
            command = sweep.get("command", f"relexkit sweep {name} --json")
            shown.insert(
                0,
                _Shown(
                    "sweep",
                    "On the task",
                    f"{sweep['recommendation']}",
                    sweep_figure(sweep),
                    command,
                ),
            )
        pictures = "\n".join(_picture(figure) for figure in shown)
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="lead {advice.verdict}">{html.escape(advice.headline)}</p>',
        _list("Why", advice.reasons),
        _list("What would change this", advice.would_change),
        "<h2>The run</h2>",
        '<dl class="facts">'
        + "".join(f"<div><dt>{_safe(k)}</dt><dd>{_safe(v)}</dd></div>" for k, v in facts)
        + "</dl>",
        _compared(name, whole, others or {}),
        _claims_table(claims),
        "<h2>Figures</h2>",
        pictures,
        _commands(name, advice),
    ]
    title = html.escape(f"{name}: is it a line?")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><meta'
        ' name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme"'
        ' content="light dark"><link rel="icon"'
        f' href="data:,"><style>{CSS}</style></head>\n<body><main>\n'
        + "\n".join(sections)
        + f"\n</main><footer>relexkit {__version__}</footer></body></html>\n"
    )


@dataclass(frozen=True)
class _Shown:
    """A figure of the page: anchor, heading, what to see in it, the command that makes it."""

    anchor: str
    heading: str
    caption: str
    figure: Figure
    command: str


def _figures(
    name: str,
    gram: Gram,
    metrics: dict[str, np.ndarray],
    whole: Any,
    result: Any,
    others: dict[str, Gram],
) -> list[_Shown]:
    reason = figures.nothing_to_draw(gram, whole)
    if reason:
        return [
            _Shown(
                "nothing",
                "Nothing to draw",
                reason,
                figures.words_figure("No geometry yet", reason),
                f"relexkit info {name}",
            )
        ]
    runs = {name: whole, **{other: spectrum(g, scope="global") for other, g in others.items()}}
    plot, test = (
        f"relexkit spectrum {name} --plot figures",
        f"relexkit backtest {name} --plot figures",
    )
    modules = spectrum(gram, scope="module")
    drawn: list[tuple[str, Figure | None, str]] = [
        ("null", run_figures.null_figure(runs), f"relexkit spectrum {name} --scope global"),
        ("spectrum", figures.spectrum_figure(whole, modules), plot),
        ("coefficients", figures.coefficients_figure(whole), plot),
        ("variance", variance_map.variance_figure(gram, whole), plot),
        ("cosines", run_figures.cosines_figure(gram), f"relexkit report {name} -o report.html"),
        ("geometry", figures.geometry_figure(gram, whole), plot),
    ]
    if result is not None and len(gram.steps) >= 4:
        drawn += [
            ("map", backtest_figures.map_figure(result), test),
            ("skill", backtest_figures.skill_figure(result), test),
            ("forecast", backtest_figures.forecast_figure(gram), test),
        ]
    if gram.changed.any():
        drawn.append(
            (
                "resolution",
                run_figures.resolution_figure(gram),
                f"relexkit report {name} -o report.html",
            )
        )
    drawn.append(
        (
            "metrics",
            run_figures.metrics_figure(gram, metrics),
            f"relexkit report {name} -o report.html",
        )
    )
    return [
        _Shown(anchor, *CAPTIONS[anchor], figure, command)
        for anchor, figure, command in drawn
        if figure is not None
    ]


def _picture(shown: _Shown) -> str:
    buffer = io.BytesIO()
    shown.figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = (round(96 * inches) for inches in shown.figure.get_size_inches())
    alt = html.escape(f"{shown.heading}: {shown.caption}", quote=True)
    return (
        f'<figure id="{shown.anchor}"><h3>{_safe(shown.heading)}</h3><img'
        f' src="data:image/svg+xml;base64,{data}" width="{width}" height="{height}"'
        f' alt="{alt}"><figcaption>{_safe(shown.caption)}'
        f" <code>{_safe(shown.command)}</code></figcaption></figure>"
    )


def _facts(
    store: TrajectoryStore, gram: Gram, metrics: dict[str, np.ndarray]
) -> list[tuple[str, str]]:
    base = store.attributes["base"]["description"]
    kept = "bit for bit" if store.exact else f"deltas with {store.mantissa_bits} mantissa bits"
    facts = [
        ("steps", describe_steps(gram.steps)),
        ("parameters", f"{int(gram.num_parameters.sum()):,} in {len(gram.names)} tensors"),
        ("recorded", kept),
        ("base", str(base)),
        (
            "metrics",
            ", ".join(sorted(metrics))
            or "none were logged: there is no reward to draw and no count of informative steps",
        ),
    ]
    informative = informative_steps(metrics)
    if informative:
        facts.append(
            (
                "informative steps",
                f"{informative.count} of {informative.known} ({informative.metric})",
            )
        )
    return facts


def _compared(name: str, whole: Spectrum, others: dict[str, Gram]) -> str:
    """The headline statistics of all runs, each beside its walk without direction."""
    if not others:
        return ""
    runs = {name: whole, **{other: spectrum(g, scope="global") for other, g in others.items()}}
    heads = "".join(f"<th>{head}</th>" for head in ("Run", "Steps", *LABELS.values()))
    rows = "".join(
        f"<tr><td>{_safe(run)}</td><td>{len(found.steps)}</td>"
        + "".join(
            f"<td>{_percent(found.whole.observed[s])} ({_percent(found.whole.expected[s])})</td>"
            for s in LABELS
        )
        + "</tr>"
        for run, found in runs.items()
    )
    return (
        "<h2>Runs compared</h2><p>In parentheses: a walk without direction of the run's own step"
        f' sizes.</p><table class="compared"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _claims_table(claims: list[Claim]) -> str:
    if not claims:
        return "<h2>Claims</h2><p>One recorded step tests no claim: record more steps.</p>"
    heads = "".join(
        f"<th>{h}</th>" for h in ("Claimed", "Measured", "Interval, null", "How", "Here")
    )
    rows = "".join(
        f'<tr><td data-label="Claimed">{_safe(c.claimed)}</td><td'
        f' data-label="Measured">{_safe(c.measured)}</td><td data-label="Interval,'
        f' null">{_safe(c.interval)}</td><td data-label="How">{_command(c.how)}</td><td'
        ' data-label="Here"><span class="verdict'
        f' {c.verdict.replace(" ", "-")}">{_safe(c.verdict)}</span></td></tr>'
        for c in claims
    )
    return f"<h2>Claims</h2><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _command(text: str) -> str:
    return f"<code>{_safe(text)}</code>" if text.startswith("relexkit ") else _safe(text)


def _commands(name: str, advice: Advice) -> str:
    lines = [
        f"relexkit spectrum {name} --scope global --plot figures",
        f"relexkit backtest {name} --plot figures",
        f"relexkit advise {name}",
        f"relexkit report {name} -o report.html",
    ]
    if advice.next_command is not None:
        lines.append(advice.next_command.format(store=name))
    if advice.target is not None:
        lines.append(
            f"relexkit extrapolate {name} --to {advice.target} --method {advice.method} -o"
            " predicted"
        )
    return "<h2>Reproduce</h2><pre><code>" + html.escape("\n".join(lines)) + "</code></pre>"


def _list(heading: str, sentences: tuple[str, ...]) -> str:
    return f"<h2>{heading}</h2><ul>" + "".join(f"<li>{_safe(s)}</li>" for s in sentences) + "</ul>"


def _safe(text: str) -> str:
    return html.escape(text)
