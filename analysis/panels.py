"""Which pictures the report shows, in which section, and what to see in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from relexkit.analysis import backtest_figures, figures, run_figures
from relexkit.analysis.variance_map import variance_figure
from relexkit.extension import Backtest, Gram, Observed, Spectrum, percent, spectrum

WIDE, COMPACT = (3.45, 2.35), (2.05, 1.7)
"""Inches of a panel, and of the small one that a phone shows four of."""
_FEWEST_STEPS = 4  # of a backtest that is worth a picture


@dataclass(frozen=True)
class Panel:
    """A picture of the report.

    Attributes:
        anchor: its identifier in the page.
        heading: above it; empty for the title that the drawing gives itself.
        caption: what to see in it.
        draw: makes the figure of the given size in inches.
    """

    anchor: str
    heading: str
    caption: str
    draw: Callable[[tuple[float, float]], Figure]


@dataclass(frozen=True)
class Analysed:
    """What the pictures are drawn from: a run, its spectrum, its backtest and other runs."""

    name: str
    run: Observed
    whole: Spectrum
    result: Backtest | None
    others: Mapping[str, Observed]

    @property
    def gram(self) -> Gram:
        """Of the run."""
        return self.run.gram

    @property
    def can_be_checked(self) -> bool:
        """Whether there are enough recorded steps to backtest."""
        return self.result is not None and len(self.gram.steps) >= _FEWEST_STEPS


def single(draw: Callable[..., None], size: tuple[float, float]) -> Figure:
    """A figure of one panel."""
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot())
    return figure


def _panel(anchor: str, heading: str, caption: str, draw: Callable[..., None]) -> Panel:
    return Panel(anchor, heading, caption, partial(single, draw))


def first_screen(seen: Analysed) -> list[Panel]:
    """The metric that training optimises and the three pictures that decide, as far as the run has
    them.
    """
    return [*_reward(seen), *_evidence(seen), *list(_distance(seen))]


def _reward(seen: Analysed) -> Iterator[Panel]:
    known = run_figures.known_metrics(seen.run.metrics)
    if not known:
        return
    name = known[0]
    caption = "What training is for; the rest of this page is about weights."
    values = seen.run.metrics[name]
    draw = partial(run_figures.metric_panel, steps=seen.gram.steps, values=values, name=name)
    yield _panel("reward", name.capitalize(), caption, draw)


def _evidence(seen: Analysed) -> Iterator[Panel]:
    yield _panel(
        "null",
        "Line or walk?",
        "Dot: this run. Stroke: a walk without direction that takes its steps; grey: 90 % of"
        " sign-flipped runs. Only beyond the grey is evidence.",
        partial(run_figures.null_panel, runs={seen.name: seen.whole}),
    )


def _distance(seen: Analysed) -> Iterator[Panel]:
    if seen.result is None or not seen.can_be_checked:
        return
    yield _panel(
        "skill",
        "How far can it be predicted?",
        "Skill against hold in the run's own past, by target over last step: above 0 a"
        " method beats standing still.",
        partial(backtest_figures.skill_panel, result=seen.result),
    )
    yield _panel(
        "forecast",
        "Where does it go?",
        "The trajectory model's continuation, with 90 % intervals that the run's own past"
        " calibrated.",
        partial(backtest_figures.forecast_panel, gram=seen.gram, count=len(seen.gram.steps)),
    )


def line_panels(seen: Analysed) -> list[Panel]:
    """Whether the run is a line."""
    modules = spectrum(seen.gram, scope="module")
    return [
        _panel(
            "directions",
            "",
            "Explained variance ratio of each principal direction, beside the walk.",
            partial(figures.each_direction_panel, whole=seen.whole, modules=modules),
        ),
        _panel(
            "together",
            "",
            "How many directions reach 90, 95 and 99 %; those of the walk in parentheses.",
            partial(figures.first_directions_panel, whole=seen.whole, modules=modules),
        ),
        _panel(
            "coefficients",
            "",
            "A straight first coefficient proves nothing: the walk's is nearly as straight.",
            partial(figures.coefficients_panel, whole=seen.whole),
        ),
        _panel(
            "lags",
            "",
            "On a line all cosines are equal and positive; on a walk only momentum relates"
            " neighbours.",
            partial(run_figures.cosine_by_distance_panel, gram=seen.gram),
        ),
        _panel(
            "cosines",
            "",
            "Every update with every other: blocks show where the run turned.",
            partial(run_figures.cosine_map_panel, gram=seen.gram),
        ),
        _panel(
            "turning",
            "Cosine of neighbouring updates",
            "0 is a walk; momentum alone gives its own value.",
            partial(figures.turning_panel, whole=seen.whole),
        ),
        _panel(
            "agreement",
            "When its direction was found",
            "|cos| of the first direction up to each step with that of all steps.",
            partial(figures.agreement_panel, gram=seen.gram, whole=seen.whole),
        ),
        _panel(
            "norms",
            "Norms of the updates",
            "Over the largest distance from the base, beside those of the walk.",
            partial(figures.update_norms_panel, gram=seen.gram),
        ),
    ]


def distance_panels(seen: Analysed) -> list[Panel]:
    """How far the run can be predicted."""
    if seen.result is None or not seen.can_be_checked:
        return []
    checked = _panel(
        "checked",
        "",
        "The same forecast made from half the steps, with what came after them.",
        partial(backtest_figures.forecast_panel, gram=seen.gram),
    )
    maps = [
        _panel(
            f"map-{method}",
            f"Backtest of {method}",
            "Each cell predicts a recorded step from an earlier prefix: blue beats keeping the"
            " prefix's last step.",
            partial(backtest_figures.map_panel, result=seen.result, method=method),
        )
        for method in backtest_figures.mapped_methods(seen.result)[:3]
    ]
    return [checked, *maps]


def place_panels(seen: Analysed) -> list[Panel]:
    """Where in the model it moves, and what the stored precision shows of it."""
    walk = float(seen.whole.null.explained_variance_ratio[0])
    panels = [
        Panel(
            "variance",
            "Explained variance ratio of the first direction",
            f"By layer and module type. A walk's: {percent(walk)}.",
            lambda size: variance_figure(seen.gram, seen.whole, width_inches=size[0], bar=False),
        )
    ]
    if seen.gram.changed.any():
        panels.append(
            _panel(
                "resolution",
                "",
                "Where few change, and most by one unit, the stored precision hides the motion.",
                partial(run_figures.resolution_panel, gram=seen.gram),
            )
        )
    return panels


def metric_panels(seen: Analysed) -> list[Panel]:
    """Every metric but the first, by step, and the first by position along the first direction."""
    known, steps = run_figures.known_metrics(seen.run.metrics), seen.gram.steps
    panels = [
        _panel(
            f"metric-{index}",
            name,
            "",
            partial(
                run_figures.metric_panel, steps=steps, values=seen.run.metrics[name], name=name
            ),
        )
        for index, name in enumerate(known[1:])
    ]
    if known and np.trace(seen.gram.matrices.sum(axis=0)) > 0:
        along = partial(
            run_figures.metric_along_panel,
            gram=seen.gram,
            values=seen.run.metrics[known[0]],
            name=known[0],
        )
        panels.insert(
            0,
            _panel(
                "along",
                "",
                "How the metric changes along the direction in which the weights move most.",
                along,
            ),
        )
    return panels


def compared_panels(seen: Analysed) -> list[Panel]:
    """Several runs beside each other, by name."""
    if not seen.others:
        return []
    runs = {seen.name: seen.run, **seen.others}
    spectra = {seen.name: seen.whole}
    spectra |= {name: spectrum(o.gram, scope="global") for name, o in seen.others.items()}
    panels = [
        _panel(
            "null-of-runs",
            "",
            "Every run beside a walk of its own.",
            partial(run_figures.null_panel, runs=spectra),
        )
    ]
    for index, name in enumerate(run_figures.known_metrics(seen.run.metrics)[:3]):
        curves = {r: (o.gram.steps, o.metrics[name]) for r, o in runs.items() if name in o.metrics}
        draw = partial(run_figures.metric_of_runs_panel, runs=curves, name=name)
        panels.append(_panel(f"runs-{index}", name, "", draw))
    return panels
