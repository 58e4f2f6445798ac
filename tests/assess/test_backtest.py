"""The backtest: against errors of explicitly predicted weights, and horizons that can be worked out
by hand.
"""

from __future__ import annotations

import numpy as np
import pytest

from relexkit import Prediction
from relexkit.assess.backtest import CHEAP, MODEL, Backtest, backtest
from relexkit.errors import ExtrapolationError
from relexkit.geometry.shape import leading_eigenpairs
from relexkit.geometry.trajectory_model import fit_trajectory
from relexkit.gram_matrix import Gram
from relexkit.predict.extrapolators import METHODS, predict_weights
from relexkit.predict.fits import Options

STEPS = np.array([1, 2, 4, 7, 8, 11, 15, 16, 20, 23, 30, 31])
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.frozen.weight",
)


def gram_of(deltas: list[np.ndarray], steps: np.ndarray, names: tuple[str, ...]) -> Gram:
    counts = np.zeros((len(deltas), len(steps)), np.int64)
    sizes = np.array([d.shape[1] for d in deltas])
    return Gram(steps, names, sizes, np.array([d @ d.T for d in deltas]), counts, counts, counts)


@pytest.fixture
def deltas() -> list[np.ndarray]:
    """A curved, a noisy, a straight, a turning and a frozen tensor ``[T, D]`` over irregular
    steps.
    """
    rng = np.random.default_rng(0)
    time, T = STEPS[:, None].astype(float), len(STEPS)
    direction = rng.standard_normal((4, 60))
    return [
        np.sqrt(time) * direction[0]
        + 0.1 * time**1.5 * direction[1]
        + 0.2 * rng.standard_normal((T, 60)),
        rng.standard_normal((T, 37)).cumsum(axis=0),
        0.5 * time * direction[2] + 0.01 * rng.standard_normal((T, 60)),
        np.sin(time / 9) * direction[3] + np.cos(time / 9) * direction[2] - direction[2],
        np.zeros((T, 8)),
    ]


@pytest.fixture
def gram(deltas: list[np.ndarray]) -> Gram:
    return gram_of(deltas, STEPS, NAMES)


def explicit(
    gram: Gram,
    deltas: list[np.ndarray],
    method: str,
    options: Options,
    until: int,
    targets: list[int],
) -> np.ndarray:
    """``[J, N, 3]``: squared error, inner product and squared norm of predictions formed weight by
    weight.
    """
    prefix = gram.until(until)
    count = len(prefix.steps)
    if method == MODEL:
        fit = fit_trajectory(
            prefix.matrices.sum(axis=0),
            prefix.steps,
            num_parameters=float(gram.num_parameters.sum()),
        )
        weights = np.array([[fit.weights(float(t))] * len(deltas) for t in targets])
    else:
        weights = predict_weights(
            prefix, [float(t) for t in targets], Prediction(method=method, options=options)
        )
    found = np.empty((len(targets), len(deltas), 3))
    for j, target in enumerate(targets):
        for n, delta in enumerate(deltas):
            predicted, truth = (
                delta[:count].T @ weights[j, n],
                delta[int(np.flatnonzero(target == STEPS)[0])],
            )
            found[j, n] = ((predicted - truth) ** 2).sum(), predicted @ truth, predicted @ predicted
    return found


CASES = [(method, Options()) for method in (*CHEAP, MODEL)] + [
    ("relex", Options(rank=3)),
    ("relex", Options(rank=40, window=4)),
    ("relex", Options(fit="polynomial", degree=3)),
    ("relex", Options(axis="row", window=5)),
    ("relex", Options(refit_every=2, window=4)),
    ("relex", Options(fit="sinusoid")),
    ("two-point", Options(anchor=2)),
    ("first-update", Options(alpha=3.0)),
    ("average", Options(window=3)),
    ("drift", Options()),
]


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_grid_is_what_predicted_weights_would_show(
    gram: Gram, deltas: list[np.ndarray], method: str, options: Options
) -> None:
    prefixes = (
        [8, 16, 30] if options.fit != "sinusoid" else [16, 30]
    )  # a sinusoid does not converge on five steps
    result = backtest(gram, [method], prefixes, options)
    assert not result.failures
    rows = [row for row in result.grid if row.method == method]
    assert [(row.until, row.target) for row in rows] == [
        (u, int(t)) for u in prefixes for t in STEPS if t > u
    ]
    truth = np.array([[(d**2).sum() for d in delta] for delta in deltas])
    for until in prefixes:
        targets = [int(t) for t in STEPS if t > until]
        square, inner, norm = np.moveaxis(
            explicit(gram, deltas, method, options, until, targets), -1, 0
        )
        held = explicit(gram, deltas, "hold", Options(), until, targets)[..., 0]
        for scope, members in (
            ("all", [0, 1, 2, 3, 4]),
            ("layer 0", [1, 2]),
            ("mlp.up_proj", [1, 3]),
        ):
            kind = "layer" if scope == "layer 0" else "module"
            found = (
                rows
                if scope == "all"
                else [r for r in result.by_group(kind)[scope] if r.method == method]
            )
            for j, row in enumerate(r for r in found if r.until == until):
                total = truth[members, int(np.flatnonzero(row.target == STEPS)[0])].sum()
                error = square[j, members].sum()
                # what is left of 1e-16 after the norms of predictions and truth cancel, against the
                # norms
                assert row.relative_error == pytest.approx(
                    np.sqrt(error / total), rel=1e-6, abs=1e-6
                )
                assert row.cosine == pytest.approx(
                    inner[j, members].sum() / np.sqrt(norm[j, members].sum() * total), abs=1e-7
                )
                assert row.skill == pytest.approx(
                    1 - error / held[j, members].sum(), rel=1e-6, abs=1e-6
                )


def test_groups_follow_the_names_and_frozen_ones_have_no_scores(gram: Gram) -> None:
    result = backtest(gram, prefixes=[8])
    assert list(result.by_group("layer")) == ["embed_tokens", "layer 0", "layer 1"]
    assert list(result.by_group("tensor")) == list(NAMES)
    frozen = result.by_group("module")["frozen"]
    assert len(frozen) == len(result.grid)
    assert all(np.isnan([row.relative_error, row.cosine, row.skill]).all() for row in frozen)
    held = [row for row in result.grid if row.method == "hold"]
    assert all(row.skill == 0 for row in held)


def test_default_grid_has_every_method_that_can_predict_a_later_step() -> None:
    assert set(CHEAP) == set(METHODS) - {"reconstruct", "average", "drift", MODEL}
    steps = np.arange(1, 41)
    gram = gram_of(
        [np.random.default_rng(1).standard_normal((40, 50)).cumsum(axis=0)], steps, ("w",)
    )
    result = backtest(gram)
    assert result.methods[0] == "hold"
    assert set(result.methods) == set(CHEAP)
    assert len(result.prefixes) >= 5
    assert result.prefixes[0] == 4
    assert len(result.grid) == len(CHEAP) * sum(40 - n for n in result.prefixes)


def test_flat_spectra_fall_back_to_the_full_decomposition() -> None:
    """Near-equal leading eigenvalues are what subspace iteration cannot separate."""
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.standard_normal((20, 20))).Q
    flat = turn @ np.diag(np.linspace(1.0, 0.99, 20)) @ turn.T
    steep = turn @ np.diag(0.1 ** np.arange(20.0)) @ turn.T
    values, vectors = leading_eigenpairs(np.array([flat, steep, np.zeros((20, 20))]), 2)
    np.testing.assert_allclose(values[:2], [[1.0, 0.99 + 0.01 * 18 / 19], [1.0, 0.1]], rtol=1e-9)
    for row in (0, 1):
        np.testing.assert_allclose(np.abs(vectors[row].T @ turn[:, :2]), np.eye(2), atol=1e-6)
    assert not values[2].any()
    assert not vectors[2].any()


# -- trust horizon ---------------------------------------------------------------------------------


def one_direction(position: np.ndarray) -> Gram:
    return gram_of([position[:, None] * np.ones(3)], np.arange(1, len(position) + 1), ("w",))


def test_horizon_of_a_run_that_stops_moving() -> None:
    """Along one direction the run reaches 50 and stays: from n < 50 the two-point line beats hold
    while t - 50 < 50 - n.
    """
    result = backtest(
        one_direction(np.minimum(np.arange(1, 81), 50.0)), ["two-point"], prefixes=[20, 30, 40]
    )
    (horizon,) = result.horizon
    # last winning steps 79, 69 and 59; half of the three prefixes are still ahead at 69 / 30
    assert horizon.low == 59 / 40
    assert horizon.ratio == 69 / 30
    assert horizon.high == 79 / 20
    assert horizon.start == 31 / 30
    assert not horizon.beyond
    assert (
        "has beaten hold up to 2.30 times the last step (between 1.48 and 3.95 over 3 prefixes)"
        in str(horizon)
    )


def test_a_line_is_trusted_as_far_as_three_prefixes_could_check() -> None:
    result = backtest(
        one_direction(np.arange(1.0, 81)), ["two-point", "first-update"], prefixes=[10, 20, 40, 64]
    )
    for horizon in result.horizon:
        assert horizon.ratio == horizon.low == 80 / 40
        assert horizon.high == 80 / 10
        assert horizon.beyond
        assert "the farthest that could be checked; nothing is known beyond" in str(horizon)


def test_a_method_that_never_helps_has_no_horizon() -> None:
    walk = np.random.default_rng(3).standard_normal((60, 4000)).cumsum(axis=0)
    horizons = {h.method: h for h in backtest(gram_of([walk], np.arange(1, 61), ("w",))).horizon}
    assert "hold" not in horizons
    assert horizons["relex"].ratio == horizons["relex"].high == 1
    assert not horizons["relex"].beyond
    assert np.isnan(horizons["relex"].start)
    assert "has not beaten hold in this run" in str(horizons["relex"])


def test_a_method_that_wins_only_farther_out_says_where_it_starts() -> None:
    """A line with a bump at its beginning: the fit lags behind at first, and hold falls farther
    behind later.
    """
    steps, prefixes = np.arange(1, 61), [20, 25, 30]
    position = steps + 10.0 * (steps < 8)
    (horizon,) = backtest(one_direction(position), ["least-squares"], prefixes).horizon
    starts = []
    for n in prefixes:
        slope, offset = np.polyfit(steps[:n], position[:n], 1)
        wins = [t for t in range(n + 1, 61) if abs(offset + slope * t - t) < t - n]
        starts.append(wins[0] / n)
        assert wins == list(range(wins[0], 61))
    assert horizon.start == np.median(starts)
    assert min(starts) > 1.1
    assert horizon.ratio == 60 / 30
    assert horizon.beyond


@pytest.fixture(scope="module")
def long_run() -> tuple[Gram, Backtest]:
    """Drifting walks of 400 steps, and every later step of its prefixes."""
    rng = np.random.default_rng(5)
    drift = 0.2 * rng.standard_normal(50)
    walks = [(drift + rng.standard_normal((400, 50))).cumsum(axis=0) for _ in range(3)]
    gram = gram_of(walks, np.arange(1, 401), ("a.w", "b.w", "c.w"))
    prefixes = backtest(gram, ["hold"]).prefixes.tolist()
    return gram, backtest(gram, METHODS_OF_A_LONG_RUN, prefixes)


METHODS_OF_A_LONG_RUN = ("relex", "least-squares", "two-point", "drift")


def test_a_long_run_is_checked_at_evenly_spaced_steps(long_run: tuple[Gram, Backtest]) -> None:
    """Which are as they are among all; the farthest horizon ends where one of them is lost."""
    gram, whole = long_run
    found = backtest(gram, METHODS_OF_A_LONG_RUN)
    checked = np.flatnonzero(found.checked.any(axis=0))
    assert 100 <= len(checked) <= 128
    assert np.ptp(np.diff(checked)) <= 1
    assert checked[-1] == 399
    assert (found.checked <= whole.checked).all()
    known = {(r.method, r.until, r.target): r.relative_error for r in whole.grid}
    assert len(found.grid) == len(found.methods) * found.checked.sum()
    for row in found.grid:
        exact = known[row.method, row.until, row.target]
        assert row.relative_error == pytest.approx(exact, rel=1e-9)
    for horizon in found.horizon:
        farthest = 1.0
        for skills, row, count in zip(
            whole.skill(horizon.method), found.checked, found.prefixes, strict=True
        ):
            wins = skills[row] > 0
            stretch = np.logical_and.accumulate(wins[wins.argmax() :])
            if wins.any():
                last = np.flatnonzero(row)[wins.argmax() :][stretch][-1]
                farthest = max(farthest, gram.steps[last] / gram.steps[count - 1])
        assert horizon.high == pytest.approx(farthest)


def test_ratios_are_the_first_steps_that_far(long_run: tuple[Gram, Backtest]) -> None:
    gram, whole = long_run
    found = backtest(gram, METHODS_OF_A_LONG_RUN, ratios=(1.25, 2.0))
    expected = np.zeros_like(whole.checked)
    for row, count in enumerate(whole.prefixes):
        wanted = [int(np.ceil(r * count)) for r in (1.25, 2.0)]
        expected[row, [w - 1 for w in wanted if w <= 400]] = True
    np.testing.assert_array_equal(found.checked, expected)
    for method in METHODS_OF_A_LONG_RUN:
        np.testing.assert_allclose(
            found.skill(method)[expected], whole.skill(method)[expected], rtol=1e-9
        )


# -- use -------------------------------------------------------------------------------------------


def test_what_cannot_be_fitted_is_reported_and_the_rest_goes_on(gram: Gram) -> None:
    result = backtest(
        gram, ["least-squares", "two-point", MODEL], prefixes=[1, 8], options=Options(anchor=8)
    )
    assert set(result.failures) == {
        ("least-squares", 1),
        ("two-point", 1),
        ("two-point", 8),
        (MODEL, 1),
    }
    assert "1 recorded step" in result.failures["least-squares", 1]
    assert {(row.method, row.until) for row in result.grid} == {
        ("hold", 1),
        ("hold", 8),
        ("least-squares", 8),
        (MODEL, 8),
    }
    missing = {h.method: h for h in result.horizon}["two-point"]
    assert str(missing) == "two-point: could not be checked in this run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["relx"]}, "method relx cannot be backtested; choose among relex"),
        ({"methods": ["reconstruct"]}, "method reconstruct cannot be backtested"),
        (
            {"prefixes": [9]},
            "prefix 9 is not a recorded step with a later one; choose from 1 to 30",
        ),
        ({"prefixes": [31]}, "prefix 31 is not a recorded step with a later one"),
        (
            {"methods": ["two-point"], "options": Options(rank=2)},
            "option rank has no effect on hold, two-point",
        ),
    ],
)
def test_bad_arguments_say_what_to_do(gram: Gram, arguments: dict, message: str) -> None:
    with pytest.raises(ExtrapolationError, match=message):
        backtest(gram, **arguments)


def test_a_single_step_cannot_be_backtested(gram: Gram) -> None:
    with pytest.raises(ExtrapolationError, match="record at least 2 steps"):
        backtest(gram.until(1))


def test_two_steps_are_enough(gram: Gram) -> None:
    result: Backtest = backtest(gram.until(2))
    assert {(row.until, row.target) for row in result.grid} == {(1, 2)}
