"""Randomized PCA against a float64 SVD of the deltas themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import write_run
from stores import as_stored, store_of
from strategies import Trajectory, trajectories

from relexkit import (
    Compute,
    Output,
    Prediction,
    RelexkitError,
    TrajectoryStore,
    extrapolate,
    gram,
    import_checkpoints,
    spectrum,
)
from relexkit.assess import backtest
from relexkit.gram_matrix.lowrank.randomized import complete, randomized_gram, sample_spans
from relexkit.predict.extrapolators import predict_weights
from relexkit.store import StoreWriter

RATIO = 5e-3
"""Demanded of the first two ratios of a randomized result; exact ones: 1e-5."""
EXACT = 1e-5
ANGLE = 1e-2
"""Demanded of the first direction, in radians, where its eigenvalue stands out by at least 5 %."""

T, D = 60, 12_000
STEPS = np.cumsum(np.random.default_rng(9).integers(1, 5, T))


def spectra() -> dict[str, np.ndarray]:
    """Trajectories by the shape of their spectrum, ``[T, D]``."""
    random = np.random.default_rng(1)
    left = np.linalg.qr(random.standard_normal((T, T)))[0]
    right = np.linalg.qr(random.standard_normal((D, T)))[0].T
    line = np.outer(STEPS / STEPS[-1], random.standard_normal(D))
    walk = random.standard_normal((T, D)).cumsum(axis=0)
    still = walk.copy()
    still[: T // 2] = 0
    spiked = 1e-3 * random.standard_normal((T, D))
    spiked[:, D - 7] += STEPS
    return {
        "smooth": line + 0.3 * np.outer(np.sin(STEPS / 20), random.standard_normal(D)),
        "walk": walk,
        "line and noise": line + random.standard_normal((T, D)),
        "noise": random.standard_normal((T, D)),
        "rank 3": random.standard_normal((T, 3)) @ random.standard_normal((3, D)),
        "nearly degenerate": (left * np.r_[1, 0.999, 0.5 ** np.arange(1, T - 1)]) @ right,
        "slow decay": (left / np.sqrt(np.arange(1, T + 1))) @ right,
        "zero rows": still,
        "one column": spiked,
        "never moved": np.zeros((T, D)),
    }


def svd(deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and singular values in float64; of a long matrix, after an orthogonal
    reduction of its columns.
    """
    triangle = np.linalg.qr(deltas.T, mode="r")
    left, singular, _ = np.linalg.svd(triangle.T)
    return left, np.pad(singular, (0, 2))


def true_ratios(deltas: np.ndarray) -> np.ndarray:
    squares = svd(deltas)[1] ** 2
    return squares[:2] / squares.sum()


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrajectoryStore, dict[str, np.ndarray]]:
    """One store with a tensor for each spectrum, cut into parts of different tensors."""
    deltas = spectra()
    store = store_of(
        tmp_path_factory.mktemp("cases") / "run.zarr", deltas, STEPS, part_numel=3 * D + 1
    )
    return store, {name: as_stored(delta) for name, delta in deltas.items()}


@pytest.mark.parametrize(
    ("method", "centered"), [("exact", False), ("randomized", False), ("randomized", True)]
)
def test_ratios_and_directions_equal_a_float64_svd(cases, method: str, centered: bool) -> None:
    store, deltas = cases
    found = gram(store) if method == "exact" else randomized_gram(store)
    tolerance = EXACT if method == "exact" else RATIO
    for scope in spectrum(found, centered=centered).scopes:
        delta = deltas[scope.name] - (deltas[scope.name].mean(axis=0) if centered else 0)
        if not delta.any():
            assert len(scope.explained_variance_ratio) == 0
            continue
        left, singular = svd(delta)
        ratios = np.pad(scope.explained_variance_ratio, (0, 2))[:2]
        error = np.abs(ratios - singular[:2] ** 2 / (singular**2).sum()).max()
        assert error < tolerance, scope.name
        assert error <= max(scope.ratio_error, 1e-12), (
            f"{scope.name}: the stated error {scope.ratio_error} is too small"
        )
        cosine = abs(left[:, 0] @ (scope.coefficients[:, 0] / scope.singular_values[0]))
        angle = float(np.arccos(min(1.0, cosine)))
        assert angle <= scope.angle_error + 1e-7, (
            f"{scope.name}: turned by {angle}, stated {scope.angle_error}"
        )
        if singular[1] ** 2 < 0.95 * singular[0] ** 2:
            assert angle < ANGLE, scope.name


def test_the_stated_angle_is_large_where_directions_cannot_be_told_apart(cases) -> None:
    store, _ = cases
    errors = {s.name: s.angle_error for s in spectrum(randomized_gram(store)).scopes}
    assert errors["noise"] > 0.3
    assert errors["walk"] < 1e-3
    assert np.isnan(errors["never moved"])


@pytest.mark.parametrize("scope", ["layer", "module", "global"])
def test_scopes_are_sums(scope: str, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    names = [
        f"model.layers.{i}.{kind}.weight"
        for i in range(2)
        for kind in ("mlp.up_proj", "self_attn.q_proj")
    ]
    line = random.standard_normal(2000)
    deltas = {
        n: np.outer(STEPS, line) * 0.02 + random.standard_normal((T, 2000)).cumsum(axis=0)
        for n in names
    }
    store = store_of(tmp_path / "run.zarr", deltas, STEPS)
    for found in spectrum(randomized_gram(store), scope=scope).scopes:
        inside = [
            n for n in names if scope == "global" or found.name.replace("layer ", "layers.") in n
        ]
        everything = np.hstack([as_stored(deltas[n]) for n in inside])
        assert np.abs(found.explained_variance_ratio[:2] - true_ratios(everything)).max() < RATIO


def test_norms_trace_and_counts_are_exact(cases) -> None:
    store, deltas = cases
    found, exact = randomized_gram(store), gram(store)
    for row, name in enumerate(found.names):
        squares = (deltas[name] ** 2).sum(axis=1)
        np.testing.assert_allclose(
            np.diag(found.matrices[row]), squares, rtol=1e-5, atol=1e-9 * squares.max(initial=1e-30)
        )
        smallest = np.linalg.eigvalsh(found.matrices[row])[0]
        assert smallest >= -1e-6 * squares.sum()
    np.testing.assert_array_equal(found.changed, exact.changed)
    np.testing.assert_array_equal(found.moved, exact.moved)
    np.testing.assert_array_equal(found.unit_moves, exact.unit_moves)
    np.testing.assert_array_equal(found.num_parameters, exact.num_parameters)


@settings(deadline=None, max_examples=40)
@given(trajectories(max_steps=40, max_columns=60), st.integers(0, 3))
def test_any_shape_through_the_completion(drawn: Trajectory, seed: int) -> None:
    """Irregular steps, zero rows, fewer columns than steps, tiny and huge: PSD, exact norms, what
    lies in Q exact.
    """
    matrix = drawn.deltas @ drawn.deltas.T
    count = min(len(drawn.steps), 6)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(drawn.steps), count)))[0]
    lengths = np.diff(drawn.deltas, axis=0, prepend=0.0)
    norms = np.stack([np.diag(matrix), (lengths**2).sum(axis=1)])
    found, uncertainty = complete(basis, matrix @ basis, norms, drawn.steps)
    trace = np.trace(matrix)
    np.testing.assert_allclose(np.diag(found), np.diag(matrix), atol=3e-6 * trace)
    assert np.linalg.eigvalsh(found)[0] >= -1e-6 * trace
    assert (uncertainty >= 0).all()
    ratios = np.sort(np.linalg.eigvalsh(found))[::-1][:1] - np.linalg.eigvalsh(matrix)[::-1][:1]
    assert (
        abs(ratios[0])
        <= uncertainty[-1] + np.maximum(np.diag(matrix) - np.diag(found), 0).sum() + 0.75 * trace
    )


@settings(deadline=None, max_examples=15)
@given(drawn=trajectories(min_steps=2, max_steps=30, max_columns=40))
def test_any_shape_through_a_store(
    tmp_path_factory: pytest.TempPathFactory, drawn: Trajectory
) -> None:
    """Where ``Q`` spans all steps or all motion, the randomized result is the exact one; components
    never exceed steps.
    """
    store = store_of(
        tmp_path_factory.mktemp("drawn") / "run.zarr", {"w": drawn.deltas}, drawn.steps
    )
    compute = Compute(components=min(8, len(drawn.steps)))
    [found] = randomized_gram(store, oversampling=40, compute=compute).matrices
    [expected] = gram(store).matrices
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(np.trace(expected), 1e-300))


def test_sparse_log_and_exact_rows(tmp_path: Path) -> None:
    for dtype, encoding, density in (
        ("bfloat16", "auto", 0.05),
        ("bfloat16", "exact", 1.0),
        ("float32", "exact", 1.0),
    ):
        run = write_run(
            tmp_path / f"{dtype}{encoding}",
            dtype=dtype,
            motion="drift",
            density=density,
            steps=range(1, 31),
            seed=3,
            head="tied",
        )
        store = import_checkpoints(
            run.source, tmp_path / f"{dtype}{encoding}.zarr", base=run.base, encoding=encoding
        ).store
        exact, found = (
            spectrum(gram(store)),
            spectrum(randomized_gram(store, oversampling=4, compute=Compute(components=4))),
        )
        for expected, scope in zip(exact.scopes, found.scopes, strict=True):
            pair = [np.pad(s.explained_variance_ratio, (0, 2))[:2] for s in (expected, scope)]
            assert np.abs(pair[0] - pair[1]).max() < RATIO, scope.name
            np.testing.assert_array_equal(scope.moved, expected.moved)
            np.testing.assert_array_equal(scope.changed, expected.changed)


def test_extrapolators_and_backtest_take_it(cases) -> None:
    store, _ = cases
    exact, found = gram(store), randomized_gram(store)
    for method in ("relex", "two-point", "least-squares", "hold"):
        pair = [
            predict_weights(g, [2 * STEPS[-1]], Prediction(method=method)) for g in (exact, found)
        ]
        rows = [exact.names.index(n) for n in ("smooth", "walk")]
        difference = pair[0][0][rows] - pair[1][0][rows]
        energy = np.einsum("ni,nij,nj->n", difference, exact.matrices[rows], difference)
        assert (energy < 1e-2 * np.trace(exact.matrices[rows], axis1=1, axis2=2)).all(), method
    grids = [
        backtest.backtest(g.scoped("global"), ["hold", "relex"], [int(STEPS[30])]).grid
        for g in (exact, found)
    ]
    for one, other in zip(*grids, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, abs=0.05)


def test_until_uses_only_those_steps(cases) -> None:
    store, deltas = cases
    found = randomized_gram(store, until=int(STEPS[39]))
    assert found.steps.tolist() == STEPS[:40].tolist()
    for scope in spectrum(found).scopes:
        delta = deltas[scope.name][:40]
        if delta.any():
            assert (
                np.abs(
                    np.pad(scope.explained_variance_ratio, (0, 2))[:2] - true_ratios(delta)
                ).max()
                < RATIO
            )
    with pytest.raises(RelexkitError, match=r"--until 0 keeps no step; the store holds 60 steps"):
        randomized_gram(store, until=0)


@pytest.mark.parametrize("components", [0, 61, -1])
def test_more_components_than_steps(cases, components: int) -> None:
    with pytest.raises(
        RelexkitError, match=rf"--components {components} of 60 recorded steps; expected 1 to 60"
    ):
        randomized_gram(cases[0], compute=Compute(components=components))


def test_the_result_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(4)
    steps = np.arange(1, 31)
    deltas = {"w": random.standard_normal((30, 3000)).cumsum(axis=0)}
    store = store_of(tmp_path / "run.zarr", deltas, steps)
    first = randomized_gram(store)
    other = randomized_gram(TrajectoryStore(store.path), seed=1)
    assert np.abs(first.matrices - other.matrices).max() > 0
    again = randomized_gram(TrajectoryStore(store.path), seed=0)
    np.testing.assert_array_equal(first.matrices, again.matrices)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(TrajectoryStore, "read_row", refuse)
    np.testing.assert_array_equal(
        randomized_gram(TrajectoryStore(store.path)).matrices, first.matrices
    )
    monkeypatch.undo()
    with StoreWriter(store.path) as writer:  # another step: the result is no longer that of the run
        writer.begin(31)
        writer.write_row(0, np.zeros(3000, np.float32), 0)
        writer.commit()
    assert len(randomized_gram(TrajectoryStore(store.path)).steps) == 31
    with StoreWriter(store.path) as writer:
        writer.truncate(20)
    assert len(randomized_gram(TrajectoryStore(store.path)).steps) == 20


def test_the_sample_is_small_and_inside(tmp_path: Path) -> None:
    deltas = {"a": np.ones((2, 100_000)), "b": np.ones((2, 10)), "c": np.ones((2, 50_000))}
    store = store_of(tmp_path / "run.zarr", deltas, np.array([1, 2]))
    spans = sample_spans(store, 0, seed=0)
    assert [end - begin for begin, end in spans] == [2**13, 10, 2**13]
    assert spans[1] == (100_000, 100_010)
    assert spans != sample_spans(store, 0, seed=5)


def test_extrapolated_checkpoints_hardly_differ(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = write_run(
        tmp_path / "run", dtype="float32", motion="drift", density=1.0, steps=range(1, 41), seed=6
    )
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store
    weights = {}
    for pca in ("exact", "randomized"):
        extrapolate(
            store,
            [80],
            tmp_path / pca,
            output=Output(dtype="float32"),
            compute=Compute(pca=pca, components=4),
        )
        weights[pca] = load_file(tmp_path / pca / "step-80" / "model.safetensors")
    for name, exact in weights["exact"].items():
        moved = (exact - run.weights[0][name].float()).norm()
        assert (weights["randomized"][name] - exact).norm() <= 5e-3 * moved, name
