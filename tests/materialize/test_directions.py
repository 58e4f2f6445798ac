"""Written directions against the right singular vectors of the deltas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from runs import HEAD, Run, write_run
from safetensors import safe_open
from safetensors.torch import load_file

from relexkit import (
    RelexkitError,
    StoreError,
    TrajectoryStore,
    extrapolate,
    gram,
    import_checkpoints,
)
from relexkit.materialize.directions import find_directions


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, TrajectoryStore]:
    folder = tmp_path_factory.mktemp("directions")
    run = write_run(
        folder,
        motion="drift",
        density=0.3,
        steps=(1, 2, 5, 6, 9),
        head="tied",
        seed=4,
        frozen=["model.norm.weight"],
    )
    return run, import_checkpoints(
        run.source, folder / "run.zarr", base=run.base, encoding="exact"
    ).store


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_files_hold_the_right_singular_vectors(
    made, scope: str, centered: bool, tmp_path: Path
) -> None:
    run, store = made
    paths = find_directions(store, gram(store), count=3, scope=scope, centered=centered).write(
        tmp_path / "out"
    )
    assert [p.name for p in paths] == [
        "direction-1.safetensors",
        "direction-2.safetensors",
        "direction-3.safetensors",
    ]
    files = [load_file(path) for path in paths]
    names = [n for n in run.weights[0] if n != HEAD]
    assert set(files[0]) == set(names) != set()
    for group in [[n] for n in names] if scope == "tensor" else [names]:
        deltas = np.hstack([np.stack([run.delta(s, n) for s in run.steps]) for n in group])
        about = deltas - deltas.mean(axis=0) if centered else deltas
        left, singular, right = np.linalg.svd(about, full_matrices=False)
        for k, file in enumerate(files):
            found = np.concatenate([file[n].reshape(-1).double().numpy() for n in group])
            expected = np.zeros_like(found)
            if k < len(singular) and singular[k] > 1e-7 * max(singular[0], 1e-300):
                expected = left[-1, k] * singular[k] * right[k]
            np.testing.assert_allclose(found, expected, atol=1e-5 * singular.max(initial=0.0))


def test_a_file_is_a_task_vector(made, tmp_path: Path) -> None:
    """All directions together move the base to the last step."""
    run, store = made
    paths = find_directions(store, gram(store), count=5, scope="global").write(tmp_path / "out")
    state = {n: t.float().clone() for n, t in run.weights[0].items() if n != HEAD}
    for path in paths:
        for name, value in load_file(path).items():
            assert value.shape == state[name].shape
            assert value.dtype == torch.float32
            state[name] += value
    for name, value in state.items():
        torch.testing.assert_close(value, run.weights[9][name].float(), atol=1e-6, rtol=1e-5)
    with safe_open(paths[0], "pt") as file:
        assert file.metadata()["kind"] == "principal update directions"
    told = json.loads((tmp_path / "out" / "relexkit.json").read_text())
    assert told["steps"] == run.steps
    assert len(told["groups"]["global"]["singular_values"]) == 5


def test_a_rerun_keeps_them_and_something_else_is_refused(made, tmp_path: Path) -> None:
    _, store = made
    first = find_directions(store, gram(store)).write(tmp_path / "out")
    times = [p.stat().st_mtime_ns for p in first]
    assert [
        p.stat().st_mtime_ns for p in find_directions(store, gram(store)).write(tmp_path / "out")
    ] == times
    with pytest.raises(
        RelexkitError, match=r"out: exists and holds something else; remove it or choose another -o"
    ):
        find_directions(store, gram(store), count=1).write(tmp_path / "out")
    with pytest.raises(RelexkitError, match="--components 6 of 5 recorded steps; expected 1 to 5"):
        find_directions(store, gram(store), count=6).write(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda s, out: find_directions(s, gram(s)).write(out),
        lambda s, out: extrapolate(s, [12], out),
    ],
)
def test_a_store_that_is_replaced_meanwhile_leaves_nothing(
    made, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, out = (
        TrajectoryStore(shutil.copytree(made[1].path, tmp_path / "run.zarr")),
        tmp_path / "out",
    )
    gram(store)
    real = TrajectoryStore.read_base

    def replaced(self: TrajectoryStore, *place: int) -> np.ndarray:
        group = zarr.open_group(store.path, mode="r+")
        group.attrs["relexkit"] = {**store.attributes, "source": "another run"}
        return real(self, *place)

    monkeypatch.setattr(TrajectoryStore, "read_base", replaced)
    with pytest.raises(
        StoreError, match=r"run\.zarr: other steps were recorded in place .* run the command again"
    ):
        write(store, out)
    assert [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and str(store.path) not in str(p) and p.suffix != ".lock"
    ] == []
