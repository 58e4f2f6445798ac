"""The report as HTML: verdict and what to do, reward and the pictures that decide, then the rest.

One file without any network: drawings, style and script are inside. It follows the reader's light
or dark setting, fits a phone, and prints.
"""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from relexkit.analysis import figures, style, svg
from relexkit.analysis.claims import Claim, measure_claims
from relexkit.analysis.glossary import explained
from relexkit.analysis.panels import (
    COMPACT,
    WIDE,
    Analysed,
    Panel,
    compared_panels,
    distance_panels,
    first_screen,
    line_panels,
    metric_panels,
    place_panels,
)
from relexkit.analysis.run_figures import LABELS
from relexkit.analysis.sweep_figures import sweep_figure
from relexkit.extension import (
    CHEAP,
    Advice,
    Observed,
    Spectrum,
    __version__,
    advise,
    backtest,
    single_threaded_blas,
    spectrum,
)

Progress = Callable[[str, int, int], None]

SOURCES = (
    "RELEX, the straight line through rank-1 trajectories: arXiv:2605.21468, and a replication,"
    " https://github.com/basetenlabs/relex-replication.",
    "Linear weights and re-grounding in RL runs: arXiv:2601.04537.",
    "DelTA, weights for tokens: arXiv:2605.21467. G2D, a few online steps and then DPO:"
    " arXiv:2605.21266.",
    "Random rewards as a control: arXiv:2506.10947.",
)


@dataclass(frozen=True)
class Subject:
    """What the page is about.

    Attributes:
        name: of the run.
        path: of its store, for the commands.
        model: in words, or empty.
        task: name that ``--task`` takes, or empty.
        date: of the page.
        facts: further names and values.
    """

    name: str
    path: str
    model: str = ""
    task: str = ""
    date: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)

    def command(self, text: str) -> str:
        """A command with ``{store}`` and ``TASK`` filled in."""
        filled = text.format(store=shlex.quote(self.path))
        return filled.replace("TASK", self.task) if self.task else filled


def build_page(
    subject: Subject,
    run: Observed,
    *,
    others: Mapping[str, Observed] | None = None,
    sweep: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> str:
    """The page as text, from Gram matrices and metrics alone; ``others`` are runs to compare."""
    tell = progress or (lambda what, done, total: None)
    tell("advice", 0, 3)
    advice = advise(run.gram, run.metrics)
    tell("advice", 1, 3)
    whole = spectrum(run.gram, scope="global")
    result = backtest(run.gram, (*CHEAP, "model")) if len(run.gram.steps) >= 2 else None
    tell("advice", 2, 3)
    claims = measure_claims(run.gram, whole, result, advice, run.metrics) if result else []
    tell("advice", 3, 3)
    seen = Analysed(subject.name, run, whole, result, others or {})
    with style.styled(), single_threaded_blas():
        shown, values = _sections(subject, seen, claims, advice, sweep, tell)
    return _whole(subject, shown, values)


def _sections(
    subject: Subject,
    seen: Analysed,
    claims: list[Claim],
    advice: Advice,
    sweep: Mapping[str, Any] | None,
    tell: Progress,
) -> tuple[str, str]:
    """The body of the page, and the values under its pointer."""
    nothing = figures.nothing_to_draw(seen.gram, seen.whole)
    top = [] if nothing else first_screen(seen)
    groups: list[tuple[str, str, list[Panel]]] = [("metrics", "Metrics", [])]
    if not nothing:
        groups = [
            ("line", "Is it a line?", line_panels(seen)),
            ("far", "How far?", distance_panels(seen)),
            ("where", "Where it moves", place_panels(seen)),
            ("metrics", "Metrics", metric_panels(seen)),
            ("compared", "Runs compared", compared_panels(seen)),
        ]
    count = len(top) + sum(len(panels) for _, _, panels in groups)
    drawn = _Drawn(count, tell)
    first = "".join(drawn.twice(panel) for panel in top)
    if nothing:
        first = f"<p class=nothing>{explained(nothing)}</p>"
    body: dict[str, tuple[str, str]] = {}
    if sweep is not None:
        body["task"] = ("On the task", _on_the_task(subject, sweep, drawn))
    body["why"] = ("Why", _why(advice))
    body["run"] = ("The run", _facts(subject, seen))
    for anchor, heading, panels in groups:
        if panels:
            body[anchor] = (heading, _group(anchor, panels, drawn, seen))
    body["claims"] = ("Claims", _claims_table(claims))
    body["reproduce"] = ("Reproduce", _commands(subject, advice))
    body["sources"] = (
        "Sources",
        "<ul>" + "".join(f"<li>{explained(s)}</li>" for s in SOURCES) + "</ul>",
    )
    contents = "".join(f'<a href="#{a}">{html.escape(h)}</a>' for a, (h, _) in body.items())
    text = (
        f"{_head(subject, seen)}{_verdict(subject, advice)}"
        f'<div class="first">{first}</div><nav aria-label="Contents">{contents}</nav>'
        + "".join(
            f'<section id="{a}"><h2>{html.escape(h)}</h2>{inner}</section>'
            for a, (h, inner) in body.items()
        )
    )
    return text, svg.script_data(drawn.drawings)


class _Drawn:
    """The drawings of a page so far, with a bar that counts them."""

    def __init__(self, count: int, tell: Progress):
        self.drawings: dict[str, svg.Drawing] = {}
        self._count, self._tell, self._done = count, tell, 0

    def add(self, anchor: str, panel: Panel, size: tuple[float, float]) -> svg.Drawing:
        drawing = svg.inline(panel.draw(size), anchor)
        self.drawings[anchor] = drawing
        return drawing

    def once(self, panel: Panel, size: tuple[float, float] = WIDE) -> str:
        drawing = self.add(panel.anchor, panel, size)
        self.count()
        return _figure(panel, drawing.svg, drawing)

    def twice(self, panel: Panel) -> str:
        """A panel of the first screen, which has a small drawing for phones beside its own."""
        drawing = self.add(panel.anchor, panel, WIDE)
        small = self.add(
            f"{panel.anchor}-small", replace(panel, draw=_without_labels(panel)), COMPACT
        )
        self.count()
        both = f'<div class="large">{drawing.svg}</div><div class="small">{small.svg}</div>'
        return _figure(panel, both, drawing)

    def count(self) -> None:
        self._done += 1
        self._tell("figures", min(self._done, self._count), self._count)


def _without_labels(panel: Panel) -> Callable[[tuple[float, float]], Figure]:
    """Draws a panel without the names of its vertical axis, for which a phone has no room."""

    def draw(size: tuple[float, float]) -> Figure:
        figure = panel.draw(size)
        for axes in figure.axes:
            axes.set_ylabel("")
        return figure

    return draw


def _figure(panel: Panel, drawing: str, drawn: svg.Drawing) -> str:
    heading = panel.heading or drawn.title
    legend = f'<div class="legend">{drawn.legend}</div>' if drawn.legend else ""
    caption = f"<figcaption>{explained(panel.caption)}</figcaption>" if panel.caption else ""
    return (
        f'<figure id="{panel.anchor}"><h3>{html.escape(heading)}</h3>'
        f'<div class="drawing" role="img" aria-label="{html.escape(heading, quote=True)}">'
        f"{drawing}</div>{legend}{caption}</figure>"
    )


# -- head ------------------------------------------------------------------------------------------


def _head(subject: Subject, seen: Analysed) -> str:
    last = int(seen.gram.steps[-1])
    told = (subject.model, subject.task, f"step {last}", subject.date)
    line = " · ".join(html.escape(text) for text in told if text)
    return (
        '<header><button type="button" id="scheme" aria-label="Light or dark">◐</button>'
        f"<h1>{html.escape(subject.name)}</h1><p>{line}</p></header>"
    )


def _verdict(subject: Subject, advice: Advice) -> str:
    command = advice.next_command or "relexkit advise {store}"
    label = "Do next" if advice.next_command else "Train on, and ask again"
    return (
        f'<div class="verdict-box {advice.verdict}"><p class="lead">{explained(advice.headline)}'
        f'</p><p class="next"><span>{label}</span>{_copied(subject.command(command))}</p></div>'
    )


def _copied(command: str) -> str:
    """A command with a button that copies it."""
    text = html.escape(command)
    return f'<code>{text}</code><button type="button" class="copy">copy</button>'


def _why(advice: Advice) -> str:
    halves = (("The numbers", advice.reasons), ("What would change this", advice.would_change))
    inner = "".join(f"<div><h3>{heading}</h3>{_list(told)}</div>" for heading, told in halves)
    return f'<div class="halves">{inner}</div>'


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{explained(s)}</li>" for s in sentences) + "</ul>"


def _facts(subject: Subject, seen: Analysed) -> str:
    informative = seen.run.informative
    facts = [
        ("run", subject.name),
        ("model", subject.model or "not known"),
        ("task", subject.task or "not recorded"),
        *subject.facts,
    ]
    if informative:
        share = f"{informative.count} of {informative.known} ({informative.metric})"
        facts.append(("informative steps", share))
    if not seen.run.metrics:
        facts.append(("metrics", "none were logged: no reward, no count of informative steps"))
    facts.append(("written", f"{subject.date} by relexkit {__version__}".strip()))
    rows = "".join(f"<div><dt>{explained(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{rows}</dl>'


# -- sections --------------------------------------------------------------------------------------


def _group(anchor: str, panels: list[Panel], drawn: _Drawn, seen: Analysed) -> str:
    """A grid of pictures; of the metrics, those beyond the fourth open on demand."""
    pictures = [drawn.once(panel) for panel in panels]
    table = _compared(seen) if anchor == "compared" else ""
    if anchor == "metrics" and len(pictures) > 4:
        rest = f"<details><summary>{len(pictures) - 4} more metrics</summary>"
        grid = _grid(pictures[:4]) + rest + _grid(pictures[4:]) + "</details>"
        return grid
    return table + _grid(pictures)


def _grid(pictures: list[str]) -> str:
    return f'<div class="grid">{"".join(pictures)}</div>'


def _compared(seen: Analysed) -> str:
    """The headline statistics of all runs, each beside its walk without direction."""
    runs: dict[str, Spectrum] = {seen.name: seen.whole}
    runs |= {name: spectrum(o.gram, scope="global") for name, o in seen.others.items()}
    heads = ["run", "steps", *LABELS.values()]
    rows = [
        [
            html.escape(name),
            str(len(run_spectrum.steps)),
            *(
                f"{_share(run_spectrum.whole.observed[s])}"
                f" <small>({_share(run_spectrum.whole.expected[s])})</small>"
                for s in LABELS
            ),
        ]
        for name, run_spectrum in runs.items()
    ]
    told = "In parentheses: a walk without direction, of the run's own step sizes."
    return f"<p>{explained(told)}</p>{_table(heads, rows, 'compared')}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _claims_table(claims: list[Claim]) -> str:
    if not claims:
        return "<p>One recorded step tests no claim: record more steps.</p>"
    rows = [
        [
            f"{html.escape(c.claimed)} <small>{explained(c.source)}</small>",
            html.escape(c.measured),
            explained(c.interval),
            f"<code>{html.escape(c.how)}</code>"
            if c.how.startswith("relexkit ")
            else explained(c.how),
            f'<span class="verdict {c.verdict.replace(" ", "-")}">{c.verdict}</span>',
        ]
        for c in claims
    ]
    heads = ["Claimed", "Measured", "Interval, null", "How", "Here"]
    return _table(heads, rows, "claims")


def _table(heads: list[str], rows: list[list[str]], kind: str) -> str:
    """A table of HTML cells, which a phone shows as one list a row."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{html.escape(h, quote=True)}">{cell}</td>'
            for h, cell in zip(heads, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _on_the_task(subject: Subject, sweep: Mapping[str, Any], drawn: _Drawn) -> str:
    panel = Panel(
        "sweep", str(sweep["recommendation"]), "", lambda size: sweep_figure(sweep, size[0])
    )
    command = sweep.get("command", f"relexkit sweep {shlex.quote(subject.path)} --json")
    return drawn.once(panel, (1.3 * WIDE[0], WIDE[1])) + f"<p>{_copied(command)}</p>"


def _commands(subject: Subject, advice: Advice) -> str:
    lines = [
        "relexkit spectrum {store} --scope global --plot figures",
        "relexkit backtest {store} --plot figures",
        "relexkit advise {store}",
        "relexkit report {store} -o report.html",
        *([advice.next_command] if advice.next_command else []),
    ]
    if advice.target is not None:
        lines.append(
            f"relexkit extrapolate {{store}} --to {advice.target} --method {advice.method}"
            " -o predicted"
        )
    return "".join(f'<p class="next">{_copied(subject.command(line))}</p>' for line in lines)


# -- the whole -------------------------------------------------------------------------------------


def _whole(subject: Subject, body: str, values: str) -> str:
    title = html.escape(f"{subject.name}: {subject.model}" if subject.model else subject.name)
    here = Path(__file__).parent
    css = (here / "page.css").read_text(encoding="utf-8")
    script = (here / "page.js").read_text(encoding="utf-8")
    light, dark = (svg.colour_variables(dark) + _maps(dark) for dark in (False, True))
    css = css.replace("/*light*/", light).replace("/*dark*/", dark)
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<style>{css}</style></head>\n<body><main>{body}</main>"
        f"<footer>relexkit {__version__}</footer>"
        '<div id="tip" role="status" hidden></div>'
        f'<script type="application/json" id="values">{values}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _maps(dark: bool) -> str:
    """The colour maps as CSS gradients."""
    maps = style.DARK_MAPS if dark else {m.name: m for m in (style.DIVERGING, style.SEQUENTIAL)}
    stops = np.linspace(0, 1, 9)
    return "".join(
        f"--{name}:linear-gradient(to right,{','.join(svg.to_hex(cmap(s)) for s in stops)});"
        for name, cmap in maps.items()
    )
