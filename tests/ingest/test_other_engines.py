"""Import, Gram matrices and predictions by an engine that is not torchrun: here threads that meet
at a barrier.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import store_content, write_run
from safetensors.torch import load_file

from relexkit import TrajectoryStore, checkout, extrapolate, gram, import_checkpoints
from relexkit.errors import StoreError
from relexkit.gram_matrix.compute.distributed import FailedTogether, Team
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.store import StoreWriter

SIZE = 3
SHAPES = {
    "model.embed_tokens.weight": (700, 301),
    "model.layers.0.mlp.up_proj.weight": (40, 30),
    "model.norm.weight": (97,),
}


class Threads(Team):
    """A member of a team of threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]):
        self.rank, self.size = rank, barrier.parties
        self._barrier, self._board = barrier, board

    def exchange(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(60)
        values = list(self._board)
        self._barrier.wait(60)  # nobody writes again before all have read
        return values


def together(work: Callable[[Team], Any]) -> list[Any]:
    """What ``work`` gives or raises in every thread."""
    barrier, board = threading.Barrier(SIZE), [None] * SIZE

    def outcome(rank: int) -> Any:
        try:
            return work(Threads(rank, barrier, board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(outcome, range(SIZE)))


def recorded(path: str | Path) -> dict[str, Any]:
    """All of a store but the Gram matrices."""
    return {k: v for k, v in store_content(Path(path)).items() if not k.startswith("gram")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of three formats, and its store by one process."""
    folder = tmp_path_factory.mktemp("engines")
    run = write_run(
        folder,
        steps=(1, 2, 5, 9),
        motion="drift",
        shapes=SHAPES,
        dtypes={"model.norm.weight": "float32", "model.layers.0.mlp.up_proj.weight": "float16"},
        buffers=True,
        metrics=True,
    )
    return run, import_checkpoints(run.source, folder / "one.zarr", base=run.base).store


def test_any_engine_imports_and_predicts(made: Any, tmp_path: Path) -> None:
    run, one = made
    path = tmp_path / "run.zarr"
    steps = [":2", None]  # begun, and continued
    for some in steps:
        found = together(
            lambda team, some=some: import_checkpoints(
                run.source, path, base=run.base, steps=some, team=team, gram=True
            )
        )
        assert len({tuple(result.added) for result in found}) == 1
    assert found[0].added == [5, 9]
    assert recorded(path) == recorded(one.path)
    TrajectoryStore(path).verify()
    matrices = gram(TrajectoryStore(path)).matrices
    np.testing.assert_allclose(matrices, gram(one).matrices, rtol=1e-5)

    def predict(team: Team) -> Any:
        store = TrajectoryStore(path)
        checkout(store, 5, tmp_path / "recorded", team=team)
        return extrapolate(store, [12, 20], tmp_path / "out", compute=Compute(team=team))

    [first, *others] = together(predict)
    assert others == [first] * (SIZE - 1)
    extrapolate(TrajectoryStore(path), [12, 20], tmp_path / "alone")
    checkout(one, 5, tmp_path / "alone" / "recorded")
    for name in ("out/step-12", "out/step-20", "recorded"):
        whole = load_file(tmp_path / "alone" / Path(name).name / "model.safetensors")
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert len(files) >= SIZE - 1  # a shard has whole tensors, and one is most of the model
        pieces = [load_file(file) for file in files]
        assert sorted(n for piece in pieces for n in piece) == sorted(whole)
        assert all((whole[n] == tensor).all() for piece in pieces for n, tensor in piece.items())


def test_a_store_behind_a_url(made: Any) -> None:
    run, one = made
    for steps in (":2", None):
        found = together(
            lambda team, steps=steps: import_checkpoints(
                run.source, "memory://team.zarr", base=run.base, steps=steps, team=team
            )
        )
        assert [type(error) for error in found if isinstance(error, Exception)] == []
    store = TrajectoryStore("memory://team.zarr")
    store.verify()
    np.testing.assert_array_equal(store.steps, one.steps)
    np.testing.assert_array_equal(store.checksums(), one.checksums())


def test_an_error_in_one_is_that_of_all(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, one = made
    path, real = tmp_path / "run.zarr", StoreWriter.finish

    def finish(writer: StoreWriter, part: int, checksum: int) -> None:
        if writer._member and writer._step == 5:
            raise StoreError("no more")
        real(writer, part, checksum)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", finish)
        found = together(
            lambda team: import_checkpoints(run.source, path, base=run.base, team=team)
        )
    assert [type(error) for error in found] == [FailedTogether] * SIZE
    assert {str(error) for error in found} == {"no more"}
    assert [error.said_elsewhere for error in found] == [False, True, True]
    store = TrajectoryStore(path)
    store.verify()
    assert store.steps.tolist() == [1, 2]
    import_checkpoints(run.source, path, base=run.base)
    assert recorded(path) == recorded(one.path)
