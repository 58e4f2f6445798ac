from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from simulated import Run, recorded, simulate
from test_figures import assert_readable, line, mesh

from relexkit.analysis import backtest_figures, run_figures, style
from relexkit.analysis.panels import WIDE, single
from relexkit.assess.backtest import backtest
from relexkit.assess.forecast import forecast
from relexkit.errors import RelexkitError
from relexkit.geometry.spectrum import spectrum
from relexkit.gram_matrix import Gram


@pytest.fixture(scope="module")
def gram() -> Gram:
    return recorded(simulate(Run(drift=0.3, beta=0.9), 30, 0), np.arange(1, 31))


def test_all_files_are_written(gram: Gram, tmp_path) -> None:
    paths = backtest_figures.plot_backtest(
        gram, backtest(gram, ["model", "relex"]), tmp_path / "new"
    )
    names = [
        f"{name}.{kind}" for name in ("backtest_map", "skill", "forecast") for kind in style.FORMATS
    ]
    assert [path.name for path in paths] == names
    assert all(path.stat().st_size > 1000 for path in paths)


def test_map_shows_the_skill_of_every_cell(gram: Gram) -> None:
    result = backtest(gram, ["two-point", "relex", "least-squares"])
    with style.styled():
        figure = backtest_figures.map_figure(result)
    shown = mesh(figure, "relex").get_array()
    np.testing.assert_allclose(np.ma.filled(shown, np.nan), np.maximum(result.skill("relex"), -1))
    assert_readable(figure)


def test_skill_by_distance_has_a_line_for_every_method(gram: Gram) -> None:
    result = backtest(gram, ["two-point", "relex", "model"])
    with style.styled():
        figure = backtest_figures.skill_figure(result)
    [axes] = figure.axes
    for method in ("two-point", "relex", "model"):
        assert line(axes, method).get_color() == style.METHODS[method]
    assert_readable(figure)


def test_forecast_draws_the_calibrated_interval(gram: Gram) -> None:
    with style.styled():
        figure = backtest_figures.forecast_figure(gram)
    drawn = line(figure.axes[1], "direction 1, model")
    ahead = forecast(gram, drawn.get_xdata(), num_directions=2)
    np.testing.assert_allclose(drawn.get_ydata(), ahead.coefficients[:, 0])
    assert drawn.get_xdata()[-1] == 60
    assert_readable(figure)


def test_two_steps_cannot_be_plotted(gram: Gram, tmp_path) -> None:
    with pytest.raises(RelexkitError, match="record at least 4 steps"):
        backtest_figures.plot_backtest(gram.until(2), backtest(gram.until(2)), tmp_path)


def test_run_figures_are_readable(gram: Gram) -> None:
    metrics = {
        "reward": np.linspace(0.1, 0.7, 30),
        "kl": np.r_[np.full(10, np.nan), np.arange(20.0)],
        "constant": np.ones(30),
    }
    runs = {
        "one run": spectrum(gram, scope="global"),
        "the same, shorter": spectrum(gram.until(20), scope="global"),
    }
    draws = [
        partial(run_figures.cosine_map_panel, gram=gram),
        partial(run_figures.cosine_by_distance_panel, gram=gram),
        partial(run_figures.resolution_panel, gram=gram),
        partial(
            run_figures.metric_panel, steps=gram.steps, values=metrics["reward"], name="reward"
        ),
        partial(run_figures.metric_along_panel, gram=gram, values=metrics["reward"], name="reward"),
        partial(run_figures.null_panel, runs=runs),
    ]
    with style.styled():
        figures = [single(draw, (5.5, 2.7)) for draw in draws]
    for figure in figures:
        assert figure is not None
        assert_readable(figure)
    assert run_figures.known_metrics(metrics) == ["reward", "kl"]


def test_what_was_hardly_logged_is_left_out() -> None:
    assert run_figures.known_metrics({"reward": np.full(30, np.nan)}) == []


def test_cosines_are_those_of_the_updates() -> None:
    deltas = simulate(Run(), 12, 1)
    gram = recorded(deltas, np.arange(1, 13))
    with style.styled():
        shown = mesh(
            single(partial(run_figures.cosine_map_panel, gram=gram), WIDE), "cosines"
        ).get_array()
    updates = np.diff(deltas, axis=0, prepend=0.0)
    unit = updates / np.linalg.norm(updates, axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(shown), unit @ unit.T, atol=1e-9)
