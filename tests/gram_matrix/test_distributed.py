"""Several processes against one; processes that fail and processes that die."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from runs import write_run
from stores import store_of

from relexkit import TrajectoryStore, gram, import_checkpoints
from relexkit.gram_matrix.compute.distributed import ALONE, Team, local_device
from relexkit.gram_matrix.matrices import ROUNDING_ERROR

STEPS = np.arange(1, 13)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(5)
    sizes = {
        "model.layers.0.up.weight": 300_000,
        "model.layers.1.up.weight": 90_001,
        "model.norm.weight": 7,
    }
    deltas = {n: random.standard_normal((12, size)).cumsum(axis=0) for n, size in sizes.items()}
    path = tmp_path_factory.mktemp("dense") / "run.zarr"
    store_of(path, deltas, STEPS, part_numel=200_000)
    return path


def start(command: list[str], size: int) -> list[subprocess.Popen[str]]:
    """``size`` processes of a command with the variables that torchrun sets, but nobody to end
    them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]


def outcomes(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        found.append((process.returncode, out, err))
    return found


def torchrun(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(size),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "relexkit",
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(
    "numels", [[0], [1], [2**16], [2**16 + 1], [10 * 2**16 + 5], [2**17, 0, 3, 9 * 2**16 + 1]]
)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_parts_once_and_divide_few(numels: list[int], size: int) -> None:
    shares = []
    for rank in range(size):
        team = Team()
        team.rank, team.size = rank, size
        shares.append(team.spans(*numels))
    for part, numel in enumerate(numels):
        covered = sorted(span for share in shares for span in share[part])
        assert sum(end - begin for begin, end in covered) == numel
        assert all(begin % 2**16 == 0 for begin, _ in covered)
        assert all(a[1] == b[0] for a, b in pairwise(covered))
    assert sum(len(spans) for share in shares for spans in share) <= len(numels) + size - 1
    columns = [sum(end - begin for spans in share for begin, end in spans) for share in shares]
    assert max(columns) - min(columns) <= (len(numels) + 1) * 2**16


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ALONE.sum(STEPS) is STEPS
    assert ALONE.share(lambda: 5) == 5
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == "cuda:3"
    assert local_device("cuda:1") == "cuda:1"
    assert local_device("cpu") == "cpu"


def assert_same_to_rounding(found: np.ndarray, expected: np.ndarray) -> None:
    """Pieces summed in float32 begin where a process's columns do: equal to what an exact pass
    states, 1e-6 of the trace.
    """
    assert (
        np.abs(found - expected).max(axis=(1, 2))
        <= ROUNDING_ERROR * np.trace(expected, axis1=1, axis2=2)
    ).all()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same(dense: Path, size: int, tmp_path: Path) -> None:
    alone, several = tmp_path / "alone.zarr", tmp_path / "several.zarr"
    for path in (alone, several):
        shutil.copytree(dense, path)
    expected = gram(TrajectoryStore(alone)).matrices
    done = torchrun(size, "spectrum", several, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # one process prints
    kept = gram(TrajectoryStore(several)).matrices
    assert Path(several, "gram").exists()
    assert_same_to_rounding(kept, expected)
    assert len(document["scopes"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_gram_extrapolate_and_a_sparse_log(size: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shapes = {"model.embed_tokens.weight": (700, 301), "model.norm.weight": (97,)}
    run = write_run(
        tmp_path, motion="drift", density=0.05, steps=(1, 2, 5, 6, 9), shapes=shapes, seed=3
    )
    paths = [
        import_checkpoints(run.source, tmp_path / f"{name}.zarr", base=run.base).store.path
        for name in ("one", "several")
    ]
    expected = gram(TrajectoryStore(paths[0]))
    for command in (["gram", "--pca", "randomized", "--components", "2"], ["gram"]):
        done = torchrun(size, command[0], paths[1], *command[1:])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Gram matrices of") == 1
    found = gram(TrajectoryStore(paths[1]))
    assert_same_to_rounding(found.matrices, expected.matrices)
    np.testing.assert_array_equal(found.moved, expected.moved)
    np.testing.assert_array_equal(found.unit_moves, expected.unit_moves)
    shutil.rmtree(Path(paths[1], "gram"))
    done = torchrun(size, "extrapolate", paths[1], "--to", 20, "-o", tmp_path / "several")
    assert done.returncode == 0, done.stderr
    from relexkit import extrapolate

    extrapolate(TrajectoryStore(paths[0]), [20], tmp_path / "one")
    pair = [
        load_file(tmp_path / name / "step-20" / "model.safetensors") for name in ("one", "several")
    ]
    for name, tensor in pair[0].items():
        assert (
            tensor != pair[1][name]
        ).sum() <= 1e-3 * tensor.numel()  # a last digit of a coefficient may turn a rounding


@pytest.mark.slow
def test_a_damaged_chunk_stops_all_with_one_message(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(dense, path)
    chunk = path / "deltas" / "0" / "c" / "4" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0x10
    chunk.write_bytes(bytes(data))
    found = outcomes(start([sys.executable, "-m", "relexkit", "spectrum", str(path)], 2))
    assert [status for status, _, _ in found] == [1, 1]
    assert [out for _, out, _ in found] == ["", ""]
    messages = [
        line for _, _, err in found for line in err.splitlines() if line.startswith("relexkit:")
    ]
    assert len(messages) == 1
    assert "step 5, tensor 'model.layers.0.up.weight': cannot be read" in messages[0]
    assert not Path(path, "gram", "0").exists()


def test_a_process_that_dies_stops_the_others(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(dense, path)
    dying = (
        "import os, sys\nfrom relexkit.gram_matrix.onepass import Pass\nfrom relexkit.cli import"
        " main\nreal = Pass.run\ndef run(self):\n    if os.environ['RANK'] == '1' and self.part =="
        " 1: os._exit(9)\n    return real(self)\nPass.run = run\nsys.exit(main(['spectrum',"
        f" {str(path)!r}]))"
    )
    (status, out, err), (died, _, _) = outcomes(start([sys.executable, "-c", dying], 2))
    assert died == 9
    assert (status, out) == (1, "")
    [message] = [line for line in err.splitlines() if line.startswith("relexkit:")]
    assert "process 0 of 2: another process ended or does not answer" in message
    # what was finished before is whole, the rest is absent; alone, the run then completes
    expected = gram(TrajectoryStore(dense)).matrices
    np.testing.assert_allclose(gram(TrajectoryStore(path)).matrices, expected, rtol=1e-12)
