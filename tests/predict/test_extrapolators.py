"""Every method against a formula on the explicit delta matrix: SVD, least squares and the released
fits, re-derived here.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit
from strategies import Trajectory, gram_of, trajectories, trajectory

from relexkit import METHODS, ExtrapolationError, Options, Prediction, predict_weights
from relexkit.predict.fits import FITS

STEPS = np.array([1, 2, 4, 7, 20, 21, 33, 50])
DELTAS = (
    trajectory("walk", STEPS, 300, seed=1).deltas
    + 2 * trajectory("line", STEPS, 300, seed=2).deltas
)


def predicted(
    deltas: np.ndarray, steps: np.ndarray, target: float, method: str = "relex", **options: Any
) -> np.ndarray:
    """``M^T a`` of the library, ``[D]``."""
    weights = predict_weights(
        gram_of({"w": deltas}, steps),
        [target],
        Prediction(method=method, options=Options(**options)),
    )
    assert weights.shape == (1, 1, len(steps))
    assert weights.dtype == np.float64
    return deltas.T @ weights[0, 0]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-8) -> None:
    """Relative error of the predicted delta; eigenvectors of G carry about 1e-16 times the squared
    condition.
    """
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def directions(deltas: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients ``[T, R]`` and right singular vectors ``[R, D]`` by numpy's SVD."""
    right = np.linalg.svd(deltas, full_matrices=False)[2][:rank]
    return deltas @ right.T, right


@pytest.mark.parametrize("target", [10, 33, 51, 400, 77.5])
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 50])
def test_relex_equals_lines_through_svd_coefficients(rank: int, target: float) -> None:
    coefficients, right = directions(DELTAS, rank)
    expected = [np.polyval(np.polyfit(STEPS, c, 1), target) for c in coefficients.T] @ right
    close(predicted(DELTAS, STEPS, target, rank=rank), expected)


@pytest.mark.parametrize("degree", [1, 2, 3, 7])
def test_polynomial_fit_equals_polyfit(degree: int) -> None:
    coefficients, right = directions(DELTAS, 2)
    expected = [np.polyval(np.polyfit(STEPS, c, degree), 60) for c in coefficients.T] @ right
    close(predicted(DELTAS, STEPS, 60, rank=2, fit="polynomial", degree=degree), expected, 1e-6)


@pytest.mark.parametrize("window", [2, 3, 8, 100])
def test_window_fits_only_the_last_steps_but_decomposes_all(window: int) -> None:
    coefficients, right = directions(DELTAS, 2)
    expected = [
        np.polyval(np.polyfit(STEPS[-window:], c[-window:], 1), 90) for c in coefficients.T
    ] @ right
    close(predicted(DELTAS, STEPS, 90, rank=2, window=window), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("every", [1, 4, 1000])
def test_autoregressive_refit_on_real_steps(every: int, window: int | None) -> None:
    coefficients, right = directions(DELTAS, 2)
    width, target = window or len(STEPS), 63
    values = []
    for column in coefficients.T:
        x, y = list(map(float, STEPS[-width:])), list(column[-width:])
        for ahead, step in enumerate(range(51, target + 1)):
            if ahead % every == 0:
                line = np.polyfit(x, y, 1)
            x, y = [*x[1:], float(step)], [*y[1:], float(np.polyval(line, step))]
        values.append(y[-1])
    close(
        predicted(DELTAS, STEPS, target, rank=2, refit_every=every, window=window), values @ right
    )


def test_autoregressive_refit_ends_at_a_target_between_steps() -> None:
    line = trajectory("line", STEPS, 20, seed=3).deltas
    close(predicted(line, STEPS, 60.5, refit_every=2), line[0] * 60.5)
    close(predicted(line, STEPS, 20, refit_every=2), line[0] * 20)


# The released scripts fit against row numbers 0..W-1 and evaluate at W-1 + (target - last step);
# with refitting they
# evaluate at row W at every step, also between refits.


def released_row_fit(window: np.ndarray, at: float, fit: str, degree: int) -> float:
    rows = np.arange(len(window), dtype=np.float64)
    if fit == "linear":
        spread = rows - rows.mean()
        slope = (spread * (window - window.mean())).sum() / (spread**2).sum()
        return float(slope * at + window.mean() - slope * rows.mean())
    if fit == "polynomial":
        return float(np.poly1d(np.polyfit(rows, window, degree))(at))

    def wave(t: np.ndarray, a: float, f: float, phase: float, c: float) -> np.ndarray:
        return c + a * np.sin(phase + 2 * np.pi * f * t)

    strongest = 1 + np.argmax(np.abs(np.fft.rfft(window - window.mean()))[1:])
    first = [
        3 * window.std() / np.sqrt(2),
        np.fft.rfftfreq(len(window))[strongest],
        0.0,
        window.mean(),
    ]
    best, _ = curve_fit(wave, rows, window, p0=first, maxfev=10000)
    return float(wave(np.array([at]), *best)[0])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("fit", "degree"), [("linear", 2), ("polynomial", 2), ("polynomial", 3), ("sinusoid", 2)]
)
@pytest.mark.parametrize(
    "steps", [np.arange(1, 13), np.array([2, 3, 5, 9, 10, 14, 20, 22, 23, 30, 31, 40])]
)
def test_row_axis_equals_the_released_formulas(
    steps: np.ndarray, fit: str, degree: int, window: int | None
) -> None:
    deltas = (
        trajectory("line", steps, 90, seed=5).deltas
        + 0.3 * trajectory("walk", steps, 90, seed=6).deltas
    )
    if (
        fit == "sinusoid"
        # of a nearly straight coefficient any long wave is as good: only a turning one has a single
        # best fit
    ):
        turning = 2 + np.sin(2 * np.pi * np.arange(len(steps)) / 4.6 + 0.3)
        deltas = np.outer(turning, deltas[-1]) + 0.01 * deltas
    coefficients, right = directions(deltas, 1)
    tail = coefficients[-(window or len(steps)) :, 0]
    at = len(tail) - 1 + (47 - steps[-1])
    expected = released_row_fit(tail, at, fit, degree) * right[0]
    options: dict[str, Any] = {"degree": degree} if fit == "polynomial" else {}
    # curve_fit stops at a relative change of 1.5e-8 in the sum of squares, and in floating point
    # depends on the sign
    close(
        predicted(deltas, steps, 47, fit=fit, window=window, axis="row", **options), expected, 1e-5
    )


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("window", [None, 4])
def test_row_axis_refit_equals_the_released_loop(window: int | None, every: int) -> None:
    steps = np.arange(1, 11)
    deltas = (
        trajectory("line", steps, 90, seed=5).deltas + trajectory("walk", steps, 90, seed=6).deltas
    )
    coefficients, right = directions(deltas, 2)
    width = window or len(steps)
    values = []
    for column in coefficients.T:
        recent = deque(column[-width:], maxlen=width)
        since, fixed = every, np.empty(0)
        for _ in range(11, 25):
            if since >= every:
                fixed, since = np.array(recent), 0
            value = released_row_fit(fixed, width, "linear", 1)
            recent.append(value)
            since += 1
        values.append(value)
    close(
        predicted(deltas, steps, 24, rank=2, window=window, refit_every=every, axis="row"),
        values @ right,
    )


@pytest.mark.parametrize(
    "steps", [np.arange(1, 25), np.array([1, 2, 4, 5, 7, 8, 9, 12, 13, 15, 17, 18, 20, 21, 23, 25])]
)
def test_sinusoid_recovers_an_exact_one(steps: np.ndarray) -> None:
    direction = np.random.default_rng(3).standard_normal(40)

    def wave(t: np.ndarray | float) -> np.ndarray:
        return 0.3 * np.sin(2 * np.pi * t / 11 + 0.4) + 1.7

    found = predicted(np.outer(wave(steps), direction), steps, 40, fit="sinusoid")
    close(found, wave(40) * direction, 1e-5)


@pytest.mark.parametrize("target", [3, 20, 51, 500])
def test_least_squares_is_a_line_through_every_weight(target: float) -> None:
    expected = np.array([np.polyval(np.polyfit(STEPS, w, 1), target) for w in DELTAS.T])
    close(predicted(DELTAS, STEPS, target, "least-squares"), expected)
    slopes = np.linalg.lstsq(STEPS[:, None].astype(float), DELTAS, rcond=None)[0][0]
    close(predicted(DELTAS, STEPS, target, "least-squares-origin"), slopes * target)


def test_two_point_first_update_and_hold_by_hand() -> None:
    close(predicted(DELTAS, STEPS, 100, "two-point"), DELTAS[-1] * 2)
    close(
        predicted(DELTAS, STEPS, 67, "two-point", anchor=33), DELTAS[-1] + (DELTAS[-1] - DELTAS[-2])
    )
    close(
        predicted(DELTAS, STEPS, 100, "two-point", anchor=1),
        DELTAS[0] + (DELTAS[-1] - DELTAS[0]) * 99 / 49,
    )
    later = STEPS + 3
    close(predicted(DELTAS, later, 100, "first-update"), DELTAS[0] * 25)
    close(predicted(DELTAS, later, 100, "first-update", alpha=-0.5), -0.5 * DELTAS[0])
    np.testing.assert_array_equal(predicted(DELTAS, STEPS, 1e6, "hold"), DELTAS[-1])


def test_average_is_the_mean_of_the_latest_steps() -> None:
    many, steps = np.random.default_rng(4).standard_normal((14, 5)), np.arange(3, 17)
    close(predicted(many, steps, 100, "average"), many[-10:].mean(axis=0))
    close(predicted(many, steps, 100, "average", window=3), many[-3:].mean(axis=0))
    close(predicted(DELTAS, STEPS, 100, "average", window=50), DELTAS.mean(axis=0))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_reconstruct_projects_a_step_on_the_first_directions(rank: int) -> None:
    coefficients, right = directions(DELTAS, rank)
    for row, step in enumerate(STEPS):
        found = predicted(DELTAS, STEPS, step, "reconstruct", rank=rank)
        # small early steps are read against the size of the run: directions are fixed to 1e-8 of
        # the first
        assert np.linalg.norm(found - coefficients[row] @ right) <= 1e-8 * np.linalg.norm(DELTAS)


LINEAR = [
    ("relex", {}),
    ("relex", {"rank": 3}),
    ("relex", {"window": 2}),
    ("relex", {"window": 3, "refit_every": 2}),
    ("relex", {"fit": "polynomial"}),
    ("relex", {"fit": "polynomial", "degree": 1}),
    ("least-squares", {}),
    ("least-squares-origin", {}),
    ("two-point", {}),
    ("two-point", {"anchor": 4}),
    ("first-update", {}),
]


@pytest.mark.parametrize(("method", "options"), LINEAR)
def test_an_exact_line_extrapolates_exactly_at_irregular_steps(method: str, options: dict) -> None:
    line = trajectory("line", STEPS, 50, seed=8, scale=1e-4).deltas
    for target in (0.5, 30, 51, 200):
        close(predicted(line, STEPS, target, method, **options), line[0] * target, 1e-7)


def test_every_method_of_the_table_predicts_something_finite() -> None:
    gram = gram_of({"w": DELTAS}, STEPS)
    for method in METHODS:
        weights = predict_weights(gram, [50.0], Prediction(method=method))
        assert np.isfinite(weights).all()
        assert weights.any()


def test_several_tensors_targets_scopes_and_scale() -> None:
    names = [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    deltas = {n: trajectory("walk", STEPS, 20 + i, seed=20 + i).deltas for i, n in enumerate(names)}
    deltas["still.weight"] = np.zeros((len(STEPS), 6))
    gram = gram_of(deltas, STEPS)
    both = predict_weights(gram, [60.0, 90.0], Prediction(options=Options(rank=2)))
    assert both.shape == (2, 4, len(STEPS))
    assert not both[:, 3].any()
    for row, name in enumerate(names):
        for index, target in enumerate((60.0, 90.0)):
            close(deltas[name].T @ both[index, row], predicted(deltas[name], STEPS, target, rank=2))
    np.testing.assert_allclose(
        predict_weights(gram, [60.0], Prediction(options=Options(rank=2), scale=-0.25))[0],
        -0.25 * both[0],
    )

    groups = {"layer": [[0, 1], [2], [3]], "module": [[0, 2], [1], [3]], "global": [[0, 1, 2, 3]]}
    for scope, members in groups.items():
        weights = predict_weights(gram, [60.0], Prediction(scope=scope))
        for group in members:
            joined = np.hstack([deltas[list(deltas)[i]] for i in group])
            if not joined.any():
                assert not weights[0, group].any()
                continue
            close(joined.T @ weights[0, group[0]], predicted(joined, STEPS, 60.0))
            for i in group:
                np.testing.assert_array_equal(weights[0, i], weights[0, group[0]])


def test_one_step_works_where_one_step_is_enough() -> None:
    one, steps = np.array([[1.0, -2.0]]), np.array([4])
    for method in ("two-point", "first-update", "least-squares-origin"):
        close(predicted(one, steps, 12, method), one[0] * 3)
    close(predicted(one, steps, 12, "hold"), one[0])
    close(predicted(one, steps, 4, "reconstruct"), one[0])


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        (
            (
                r"1 recorded step cannot fix a polynomial of degree 1; record more steps,"
                r" .*two-point or hold"
            ),
            "relex",
            {},
        ),
        (r"1 recorded step cannot fix a line; .*least-squares-origin", "least-squares", {}),
        (
            r"--anchor 4 is the last recorded step; expected an earlier one",
            "two-point",
            {"anchor": 4},
        ),
        (r"--anchor 3 is not among the 1 steps used", "two-point", {"anchor": 3}),
        (r"--to 12 is not among the 1 steps used; expected a recorded step", "reconstruct", {}),
        (
            r"1 recorded steps? cannot fix a sinusoid of four numbers; expected at least 5",
            "relex",
            {"fit": "sinusoid"},
        ),
    ],
)
def test_too_few_steps_say_so(message: str, method: str, options: dict) -> None:
    with pytest.raises(ExtrapolationError, match=message):
        predicted(np.array([[1.0, -2.0]]), np.array([4]), 12, method, **options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (
            r"^8 recorded steps cannot fix a polynomial of degree 8",
            {"fit": "polynomial", "degree": 8},
        ),
        (
            r"^2 recorded steps cannot fix a polynomial of degree 2",
            {"fit": "polynomial", "window": 2},
        ),
        (r"^4 recorded steps cannot fix a sinusoid", {"fit": "sinusoid", "window": 4}),
    ],
)
def test_a_fit_that_cannot_work_says_why(message: str, options: dict) -> None:
    with pytest.raises(ExtrapolationError, match=message):
        predicted(DELTAS, STEPS, 60, **options)


def test_a_fit_that_does_not_converge_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise RuntimeError(
            "Optimal parameters not found: Number of calls to function has reached maxfev = 10000."
        )

    monkeypatch.setattr("scipy.optimize.curve_fit", never)
    with pytest.raises(
        ExtrapolationError,
        match=r"^w: the sinusoid fit did not converge; use --fit linear or polynomial",
    ):
        predicted(DELTAS, STEPS, 60, fit="sinusoid")


@pytest.mark.parametrize("target", [0.0, -3.0, float("nan"), float("inf")])
def test_targets_that_are_no_steps_are_refused(target: float) -> None:
    with pytest.raises(
        ExtrapolationError,
        match=rf"--to {re.escape(f'{target:g}')} is not a step; expected a positive number",
    ):
        predicted(DELTAS, STEPS, target)


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(
        ExtrapolationError, match=f"--method magic is unknown; choose one of {', '.join(METHODS)}"
    ):
        predicted(DELTAS, STEPS, 60, "magic")
    with pytest.raises(
        ExtrapolationError, match=f"--fit cubic is unknown; choose one of {', '.join(FITS)}"
    ):
        Options(fit="cubic")  # type: ignore[arg-type]
    with pytest.raises(ExtrapolationError, match="--axis time is unknown; choose step or row"):
        Options(axis="time")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="scope 'head' is unknown: choose one of tensor, layer, module, global"
    ):
        predict_weights(gram_of({"w": DELTAS}, STEPS), [60.0], Prediction(scope="head"))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("rank", 0, 1), ("degree", 0, 1), ("window", 1, 2), ("refit_every", 0, 1)],
)
def test_option_values_out_of_range(name: str, value: int, least: int) -> None:
    with pytest.raises(
        ExtrapolationError,
        match=f"--{name.replace('_', '-')} {value} is too small; expected at least {least}",
    ):
        Options(**{name: value})  # type: ignore[arg-type]


def test_an_option_that_a_method_ignores_is_refused() -> None:
    given_options = {
        "rank": 2,
        "fit": "polynomial",
        "window": 3,
        "refit_every": 2,
        "axis": "row",
        "anchor": 1,
        "alpha": 2.0,
    }
    for method, entry in METHODS.items():
        for name, value in given_options.items():
            if name not in entry.options:
                flag = f"--{name.replace('_', '-')}"
                with pytest.raises(
                    ExtrapolationError,
                    match=f"{flag} has no effect with --method {method}, which takes",
                ):
                    predicted(DELTAS, STEPS, 50, method, **{name: value})
    with pytest.raises(
        ExtrapolationError, match="--degree has an effect only with --fit polynomial"
    ):
        Options(degree=3)


@settings(deadline=None, max_examples=100)
@given(trajectories(min_steps=2), st.floats(0.25, 300))
def test_relex_with_every_direction_is_least_squares_per_weight(
    given_run: Trajectory, target: float
) -> None:
    found = predicted(given_run.deltas, given_run.steps, target, rank=len(given_run.steps))
    weights = predict_weights(
        gram_of({"w": given_run.deltas}, given_run.steps),
        [target],
        Prediction(method="least-squares"),
    )[0, 0]
    # directions below 1e-7 of the first are dropped, those near it are known to about a tenth of
    # their size
    bound = 1e-6 * np.linalg.norm(given_run.deltas, 2) * max(1.0, float(np.linalg.norm(weights)))
    assert np.linalg.norm(found - given_run.deltas.T @ weights) <= bound


@settings(deadline=None, max_examples=100)
@given(trajectories())
def test_reconstruct_with_every_direction_is_the_step_itself(given_run: Trajectory) -> None:
    for row, step in enumerate(given_run.steps):
        found = predicted(
            given_run.deltas, given_run.steps, step, "reconstruct", rank=len(given_run.steps)
        )
        assert np.linalg.norm(found - given_run.deltas[row]) <= 1e-6 * np.linalg.norm(
            given_run.deltas, 2
        )


@settings(deadline=None, max_examples=60)
@given(trajectories(min_steps=2), st.floats(0.1, 200), st.integers(1, 3))
def test_a_prediction_does_not_depend_on_the_unit_of_the_weights(
    given_run: Trajectory, target: float, rank: int
) -> None:
    gram, doubled = (
        gram_of({"w": factor * given_run.deltas}, given_run.steps) for factor in (1.0, 4.0)
    )
    options = Options(rank=rank)
    np.testing.assert_array_equal(
        predict_weights(gram, [target], Prediction(options=options)),
        predict_weights(doubled, [target], Prediction(options=options)),
    )
