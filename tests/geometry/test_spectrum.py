"""Spectra from Gram matrices against numpy's SVD, polyfit and cosines of the delta matrix
itself.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import Trajectory, gram_of, trajectories, trajectory

import relexkit.geometry.spectrum as module
from relexkit import Gram, RelexkitError, spectrum
from relexkit.geometry.shape import center, decompose, r_squared, update_cosines, walk_gram
from relexkit.geometry.spectrum import agreement, quarters

STEPS = np.array([1, 2, 4, 7, 20, 21, 33, 50])


def right_directions(deltas: np.ndarray) -> np.ndarray:
    """Right singular vectors ``[R, D]`` by numpy's SVD."""
    return np.linalg.svd(deltas, full_matrices=False)[2]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("num_columns", [3, 8, 400])
@pytest.mark.parametrize("kind", ["walk", "noise"])
def test_directions_equal_the_svd_of_the_deltas(
    kind: str, num_columns: int, centered: bool
) -> None:
    deltas = trajectory(kind, STEPS, num_columns, seed=num_columns).deltas
    [found] = spectrum(gram_of({"w": deltas}, STEPS), centered=centered).scopes

    about = deltas - deltas.mean(axis=0) if centered else deltas
    left, singular, _ = np.linalg.svd(about, full_matrices=False)
    rank = int((singular > 1e-7 * singular[0]).sum())
    assert rank == min(num_columns, len(STEPS) - (centered and num_columns >= len(STEPS)))
    assert len(found.singular_values) == rank
    # eigenvalues carry an error of 1e-16 of the largest, singular values in proportion to their
    # distance from the first
    np.testing.assert_allclose(found.singular_values, singular[:rank], rtol=1e-9)
    np.testing.assert_allclose(
        found.explained_variance_ratio, singular[:rank] ** 2 / (singular**2).sum(), rtol=1e-9
    )
    expected = left[:, :rank] * singular[:rank]
    expected = expected * np.sign(expected[-1])
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-8 * singular[0])
    assert (found.coefficients[-1] > 0).all()


@pytest.mark.parametrize("centered", [False, True])
def test_r2_equals_that_of_a_fitted_line(centered: bool) -> None:
    deltas = trajectory("walk", STEPS, 60, seed=3).deltas
    [found] = spectrum(gram_of({"w": deltas}, STEPS), centered=centered).scopes
    for column, r2 in zip(found.coefficients.T, found.r2, strict=True):
        residual = column - np.polyval(np.polyfit(STEPS, column, 1), STEPS)
        expected = 1 - (residual**2).sum() / ((column - column.mean()) ** 2).sum()
        assert r2 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("centered", [False, True])
def test_agreement_equals_cosines_of_right_singular_vectors(centered: bool) -> None:
    """Each prefix on its own: with ``centered``, about the mean of that prefix."""
    deltas = trajectory("walk", STEPS, 60, seed=4).deltas
    [found] = spectrum(gram_of({"w": deltas}, STEPS), centered=centered).scopes
    lengths = [2, 4, 6]
    assert quarters(len(STEPS)).tolist() == lengths
    first = {
        n: right_directions(deltas[:n] - centered * deltas[:n].mean(axis=0))[0]
        for n in (*lengths, len(STEPS))
    }
    expected = [abs(first[n] @ first[len(STEPS)]) for n in lengths]
    np.testing.assert_allclose(found.agreement, expected, atol=1e-9)


def test_quarters_of_few_steps_keep_at_least_one() -> None:
    assert quarters(1).tolist() == [1, 1, 1]
    assert quarters(3).tolist() == [1, 1, 2]
    assert quarters(5).tolist() == [1, 2, 3]


def test_agreement_skips_prefixes_that_have_not_moved() -> None:
    deltas = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])
    found = agreement(deltas @ deltas.T, quarters(4))
    assert np.isnan(found[:2]).all()
    assert found[2] == pytest.approx(1.0)


def test_update_cosines_equal_the_direct_ones() -> None:
    deltas = trajectory("walk", STEPS, 60, seed=5).deltas
    updates = np.diff(deltas, axis=0, prepend=0.0)
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairwise(updates)]
    np.testing.assert_allclose(update_cosines(deltas @ deltas.T), expected, atol=1e-10)


def test_update_cosines_are_nan_beside_a_step_that_changed_nothing() -> None:
    deltas = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 3.0], [1.0, 6.0]])
    assert np.isnan(update_cosines(deltas @ deltas.T)[:2]).all()
    assert update_cosines(deltas @ deltas.T)[2] == pytest.approx(1.0)


def test_energy_shares_and_scopes_add_up() -> None:
    names = [
        f"model.layers.{layer}.mlp.{kind}.weight"
        for layer in range(2)
        for kind in ("up_proj", "down_proj")
    ]
    deltas = {
        n: trajectory("walk", STEPS, 10 + i, seed=i).deltas
        for i, n in enumerate([*names, "model.norm.weight"])
    }
    gram = gram_of(deltas, STEPS)
    everything = np.hstack(list(deltas.values()))
    for scope, groups in {
        "layer": {"layer 0": names[:2], "layer 1": names[2:], "norm": ["model.norm.weight"]},
        "module": {
            "mlp.up_proj": names[::2],
            "mlp.down_proj": names[1::2],
            "norm": ["model.norm.weight"],
        },
        "global": {"global": list(deltas)},
    }.items():
        found = spectrum(gram, scope=scope)
        assert [s.name for s in found.scopes] == list(groups)
        for s, members in zip(found.scopes, groups.values(), strict=True):
            joined = np.hstack([deltas[m] for m in members])
            assert s.num_parameters == joined.shape[1]
            np.testing.assert_allclose(
                s.singular_values, np.linalg.svd(joined, compute_uv=False)[: len(s.singular_values)]
            )
            assert s.energy_share == pytest.approx((joined**2).sum() / (everything**2).sum())
            np.testing.assert_allclose(s.moved, (joined != 0).mean(axis=1))


@pytest.mark.parametrize("centered", [False, True])
def test_many_tensors_in_blocks_are_what_their_svd_says(centered: bool) -> None:
    deltas = {
        f"model.layers.{i}.mlp.up_proj.weight": trajectory("walk", STEPS, 9, seed=i).deltas
        for i in range(300)  # more than one block holds
    }
    found = spectrum(gram_of(deltas, STEPS), centered=centered)
    assert [s.name for s in found.scopes] == list(deltas)
    for s, rows in zip(found.scopes, deltas.values(), strict=True):
        expected = np.linalg.svd(rows - rows.mean(axis=0) * centered)[1]
        np.testing.assert_allclose(
            s.singular_values, expected[: len(s.singular_values)], atol=1e-6 * expected[0]
        )
        assert s.null is not None
        assert s.null.observed["first"] == pytest.approx(expected[0] ** 2 / (expected**2).sum())


def test_a_prefix_uses_only_its_steps() -> None:
    deltas = trajectory("walk", STEPS, 40, seed=6).deltas
    [found] = spectrum(gram_of({"w": deltas}, STEPS), until=8).scopes
    [alone] = spectrum(gram_of({"w": deltas[:4]}, STEPS[:4])).scopes
    np.testing.assert_array_equal(found.coefficients, alone.coefficients)
    with pytest.raises(
        RelexkitError, match=r"--until 0 keeps no step; the store holds 8 steps from 1 to 50"
    ):
        spectrum(gram_of({"w": deltas}, STEPS), until=0)


def test_a_tensor_that_never_moved_has_no_directions() -> None:
    deltas = {
        "moved": trajectory("walk", STEPS, 5, seed=1).deltas,
        "still": np.zeros((len(STEPS), 4)),
    }
    moved, still = spectrum(gram_of(deltas, STEPS)).scopes
    assert moved.energy_share == 1.0
    assert still.energy_share == 0.0
    for values in (still.singular_values, still.explained_variance_ratio, still.r2):
        assert len(values) == 0
    assert still.coefficients.shape == (len(STEPS), 0)
    assert np.isnan(still.agreement).all()
    assert np.isnan(still.update_cosines).all()
    assert still.num_directions(0.9) is None
    [alone] = spectrum(gram_of({"still": deltas["still"]}, STEPS)).scopes
    assert np.isnan(alone.energy_share)


def test_one_step_has_one_direction_and_no_line() -> None:
    [found] = spectrum(gram_of({"w": np.array([[3.0, -4.0]])}, np.array([7]))).scopes
    assert found.singular_values.tolist() == [5.0]
    assert found.coefficients.tolist() == [[5.0]]
    assert found.explained_variance_ratio.tolist() == [1.0]
    assert np.isnan(found.r2).all()
    assert found.agreement.tolist() == [1.0, 1.0, 1.0]
    assert len(found.update_cosines) == 0
    [centred] = spectrum(
        gram_of({"w": np.array([[3.0, -4.0]])}, np.array([7])), centered=True
    ).scopes
    assert len(centred.singular_values) == 0


def test_two_steps_have_no_r2_because_every_line_fits() -> None:
    assert np.isnan(r_squared(np.array([[1.0], [5.0]]), np.array([1, 2]))).all()


@pytest.mark.parametrize(
    ("num_steps", "draws"),
    [
        *((num_steps, 5) for num_steps in (3, 9, 14, 40)),
        (77, 1),
        *(pytest.param(n, 20, marks=pytest.mark.slow) for n in (3, 9, 14, 40, 77)),
    ],
)
def test_a_move_at_the_first_step_only_leaves_no_centered_direction(
    num_steps: int, draws: int
) -> None:
    """All rows are equal, so nothing varies about the mean: what is left after centering is
    rounding.
    """
    for seed in range(draws):
        deltas = np.tile(np.random.default_rng(seed).standard_normal(30) * 1e-3, (num_steps, 1))
        [found] = spectrum(
            gram_of({"w": deltas}, np.arange(1, num_steps + 1)), centered=True
        ).scopes
        assert len(found.singular_values) == 0
        assert np.isnan(found.agreement).all()


def test_r2_of_a_constant_coefficient_is_nan() -> None:
    deltas = np.tile(np.random.default_rng(2).standard_normal(30) * 1e-3, (9, 1))
    [found] = spectrum(gram_of({"w": deltas}, np.arange(1, 10))).scopes
    assert len(found.singular_values) == 1
    assert np.isnan(found.r2).all()


@pytest.mark.parametrize("num_steps", [5, 60, 300])
def test_rank_deficient_runs_drop_numerically_zero_directions(num_steps: int) -> None:
    steps = np.arange(1, num_steps + 1)
    deltas = trajectory("low rank", steps, 500, seed=9).deltas
    assert len(decompose(deltas @ deltas.T).singular_values) == 2
    line = trajectory("line", steps, 500, seed=9).deltas
    assert len(decompose(line @ line.T).singular_values) == 1


def test_directions_down_to_the_tolerance_are_kept() -> None:
    kept = np.diag([1.0, 1e-6**2, 1e-8**2])
    assert len(decompose(kept).singular_values) == 2


def test_num_directions_by_hand() -> None:
    deltas = np.diag(np.sqrt([90.0, 5.0, 4.0, 1.0]))
    [found] = spectrum(gram_of({"w": deltas}, np.arange(1, 5))).scopes
    shares = (0.5, 0.9, 0.91, 0.95, 0.96, 0.99, 0.995, 1.0)
    assert [found.num_directions(p) for p in shares] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_the_null_has_the_shares_of_the_analytic_limit() -> None:
    """Eigenfunctions sin((k - 1/2) pi x) of min(s, t): 8 / ((2k - 1)^2 pi^2) of the energy, and R^2
    of sin(pi x / 2) on x.
    """
    steps = np.arange(1, 801)
    null = decompose(walk_gram(steps))
    ratios = null.explained_variance_ratio
    covariance, variances = 4 / np.pi**2 - 1 / np.pi, (1 / 12) * (1 / 2 - 4 / np.pi**2)
    # the discrete walk differs from the limit by about 1 / T
    assert ratios[0] == pytest.approx(8 / np.pi**2, abs=2e-3)
    assert ratios[:2].sum() == pytest.approx(8 / np.pi**2 * (1 + 1 / 9), abs=2e-3)
    assert r_squared(null.coefficients, steps)[0] == pytest.approx(
        covariance**2 / variances, abs=2e-3
    )
    assert covariance**2 / variances == pytest.approx(0.96, abs=0.005)


def test_a_simulated_walk_without_direction_shows_the_null() -> None:
    steps = np.array([3, 4, 9, 10, 11, 30, 41, 60, 61, 80])
    walk = trajectory("walk", steps, 40_000, seed=12).deltas
    result = spectrum(gram_of({"w": walk}, steps))
    # the ratios of a walk over D columns scatter by about 1 / sqrt(D)
    np.testing.assert_allclose(
        result.scopes[0].explained_variance_ratio, result.null.explained_variance_ratio, atol=0.01
    )
    assert result.scopes[0].r2[0] == pytest.approx(result.null.r2[0], abs=0.01)
    np.testing.assert_array_equal(walk_gram(np.array([2, 5])), [[2.0, 2.0], [2.0, 5.0]])


def test_shares_of_changes_and_unit_moves() -> None:
    matrices = np.eye(2)[None].repeat(2, axis=0)
    counts = np.array([[4, 6], [0, 10]])
    gram = Gram(
        np.array([1, 2]),
        ("a", "b"),
        np.array([10, 20]),
        matrices,
        counts,
        counts,
        np.array([[1, 4], [-1, -1]]),
    )
    first, second = spectrum(gram).scopes
    assert first.changed.tolist() == [0.4, 0.6]
    assert first.unit_moves == 0.5
    assert second.changed.tolist() == [0.0, 0.5]
    assert np.isnan(second.unit_moves)


@settings(deadline=None, max_examples=80)
@given(trajectories())
def test_any_trajectory_keeps_its_energy_and_orthogonal_directions(given_run: Trajectory) -> None:
    gram = given_run.deltas @ given_run.deltas.T
    found = decompose(gram)
    rank = len(found.singular_values)
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(rank), atol=1e-10)
    assert (np.diff(found.singular_values) <= 0).all()
    assert found.explained_variance_ratio.sum() == pytest.approx(1.0 if rank else 0.0, abs=1e-9)
    np.testing.assert_allclose(
        found.coefficients @ found.coefficients.T, gram, atol=1e-9 * max(np.trace(gram), 1e-300)
    )
    centred = given_run.deltas - given_run.deltas.mean(axis=0)
    np.testing.assert_allclose(
        center(gram), centred @ centred.T, atol=1e-12 * max(np.trace(gram), 1e-300)
    )


@pytest.mark.parametrize("centered", [False, True])
def test_leading_groups_are_those_of_all_with_most_energy(
    centered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is decomposed for the others."""
    rng = np.random.default_rng(8)
    deltas = {f"w{i}": (1 + i % 7) * rng.standard_normal((len(STEPS), 12)) for i in range(30)}
    deltas["still"] = np.zeros((len(STEPS), 4))
    deltas["jumped"] = np.ones((len(STEPS), 4)) * 9.0
    gram = gram_of(deltas, STEPS)
    whole = spectrum(gram, centered=centered)
    ordered = sorted(whole.scopes, key=lambda s: -s.energy_share)[:5]
    decomposed = []
    original = module.decompose_all

    def counted(matrices: np.ndarray) -> list[Any]:
        decomposed.append(len(matrices))
        return original(matrices)

    monkeypatch.setattr(module, "decompose_all", counted)
    found = spectrum(gram, centered=centered).leading(5)
    assert decomposed == [5]
    for one, other in zip(found, ordered, strict=True):
        assert one.name == other.name
        np.testing.assert_equal(one.coefficients, other.coefficients)
        np.testing.assert_equal(one.agreement, other.agreement)
        assert one.null is not None
        assert other.null is not None
        assert one.null.observed == pytest.approx(other.null.observed, nan_ok=True)
    still = {s.name for s in whole.scopes if not len(s.singular_values)}
    assert {
        name for name, still in zip(whole.groups.names, whole.groups.still, strict=True) if still
    } == still
    assert still == ({"still", "jumped"} if centered else {"still"})
