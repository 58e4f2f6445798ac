"""Stores behind URLs, on an S3-compatible server that the tests start."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import Run, write_run
from safetensors.torch import load_file
from versions import write_versions

from relexkit import (
    CheckpointError,
    StoreError,
    TrajectoryStore,
    checkout,
    extrapolate,
    gram,
    import_checkpoints,
)
from relexkit.cli import main
from relexkit.gram_matrix.lowrank.randomized import randomized_gram
from relexkit.store import StoreWriter
from relexkit.store.lease import Lease

pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """``s3://`` URL of an empty bucket."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("runs")
        yield "s3://runs"
    server.stop()


@pytest.fixture(scope="module")
def pair(
    bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, TrajectoryStore, TrajectoryStore]:
    """One run, its local store and its remote one, written in two goes. Dense rows; the sparse log
    comes below.
    """
    folder = tmp_path_factory.mktemp("remote")
    run = write_run(
        folder,
        dtype="float32",
        motion="drift",
        density=1.0,
        steps=(1, 2, 5, 6),
        seed=3,
        head="tied",
        metrics=True,
    )
    local = import_checkpoints(
        run.source, folder / "run.zarr", base=run.base, encoding="exact"
    ).store
    url = f"{bucket}/pair/run.zarr"
    import_checkpoints(run.source, url, base=run.base, encoding="exact", steps=":2")
    remote = import_checkpoints(run.source, url, base=run.base, encoding="exact").store
    return run, local, remote


def test_a_remote_store_is_the_local_one(pair) -> None:
    _, local, remote = pair
    remote.verify()
    assert remote.steps.tolist() == local.steps.tolist()
    assert remote.attributes["base"] == local.attributes["base"]
    np.testing.assert_array_equal(remote.checksums(), local.checksums())
    np.testing.assert_array_equal(remote.metrics()["reward"], local.metrics()["reward"])
    assert remote.files() == local.files()
    sizes = remote.num_bytes()
    assert {"base", "deltas", "steps", "metrics"} <= set(sizes)
    assert sizes["deltas"] == local.num_bytes()["deltas"]


def test_a_base_by_reference_is_read_here_and_compared_with_checksums_there(
    pair, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, local, _ = pair
    options = {"encoding": "exact", "steps": ":2", "base_by_reference": True}
    url = f"{bucket}/reference.zarr"
    with pytest.raises(CheckpointError, match="a base is read from a folder or from the hub; copy"):
        import_checkpoints(run.source, url, base=f"{bucket}/base", **options)
    store = import_checkpoints(run.source, url, base=run.base, **options).store
    assert {"base-checksums", "deltas"} <= set(store.num_bytes())
    assert "base" not in store.num_bytes()
    store.verify()
    for part, spec in enumerate(local.layout.parts):
        expected = local.read_base(part, 0, spec.numel)
        np.testing.assert_array_equal(store.read_base(part, 0, spec.numel), expected)
    monkeypatch.setenv("RELEXKIT_BASE", str(run.folders[1]))
    with pytest.raises(StoreError, match="differs at"):
        TrajectoryStore(url).verify()


def test_gram_matrices_come_from_it_and_are_kept_in_it(pair) -> None:
    _, local, remote = pair
    expected = gram(local)
    np.testing.assert_array_equal(gram(remote).matrices, expected.matrices)
    assert "gram" in TrajectoryStore(remote.path).num_bytes()
    np.testing.assert_array_equal(gram(TrajectoryStore(remote.path)).matrices, expected.matrices)
    np.testing.assert_allclose(
        randomized_gram(remote).matrices, randomized_gram(local).matrices, rtol=1e-12
    )


def test_checkpoints_are_written_from_it(pair, tmp_path: Path) -> None:
    run, _, remote = pair
    folder = checkout(remote, 5, tmp_path / "step")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert (tensor == run.weights[5][name]).all()
    [predicted] = extrapolate(remote, [9], tmp_path / "out")
    assert (predicted.folder / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_write_one_and_predict_from_it(pair, bucket: str, tmp_path: Path) -> None:
    run, local, _ = pair
    url = f"{bucket}/team/run.zarr"

    def torchrun(*words: object) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "relexkit"]
        done = subprocess.run(
            [*command, *meet, *map(str, words)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = ("import", run.source, "-o", url, "--base", run.base, "--encoding", "exact")
    torchrun(*first, "--steps", ":2")
    assert torchrun(*first).count(url) >= 1
    written = TrajectoryStore(url)
    written.verify()
    assert written.steps.tolist() == local.steps.tolist()
    np.testing.assert_array_equal(written.checksums(), local.checksums())
    np.testing.assert_allclose(gram(written).matrices, gram(local).matrices, rtol=1e-6)
    torchrun("extrapolate", url, "--to", 9, "-o", tmp_path / "several")
    extrapolate(local, [9], tmp_path / "one")
    one, several = (
        {
            name: tensor
            for file in (tmp_path / folder / "step-9").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in ("one", "several")
    )
    assert several.keys() == one.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(several[name], tensor, rtol=1e-4, atol=1e-6)


def test_commands_take_urls(pair, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, remote = pair
    for words in (
        ["info", remote.path],
        ["verify", remote.path],
        ["spectrum", remote.path, "--scope", "global"],
    ):
        assert main(words) == 0
    assert "every chunk of 4 steps" in capsys.readouterr().out


def test_what_is_there_is_not_overwritten(pair, bucket: str, tmp_path: Path) -> None:
    run, _, remote = pair
    from relexkit.store import About, create_store

    with pytest.raises(StoreError, match=r"run\.zarr: a store exists there; choose another -o"):
        create_store(
            remote.path,
            remote.layout,
            remote.read_base,
            About(source="", base=""),
        )
    import zarr

    zarr.create_group(f"{bucket}/other.zarr", attributes={"mine": 1})
    with pytest.raises(StoreError, match=r"other\.zarr: exists and is not a trajectory store"):
        import_checkpoints(run.source, f"{bucket}/other.zarr", base=run.base)
    with pytest.raises(StoreError, match=r"absent\.zarr: is not a trajectory store"):
        TrajectoryStore(f"{bucket}/absent.zarr")


def test_a_creation_that_was_killed_starts_over(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, density=0.05, steps=(1, 2), seed=4)
    url = f"{bucket}/killed.zarr"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("relexkit.store.create.create_step_arrays", killed)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoints(run.source, url, base=run.base)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="its creation was interrupted"):
        TrajectoryStore(url)
    store = import_checkpoints(run.source, url, base=run.base).store
    store.verify()
    assert store.steps.tolist() == [1, 2]


def test_a_step_that_was_not_committed_does_not_exist(bucket: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, density=0.05, steps=(1, 2, 3), seed=5)
    url = f"{bucket}/half.zarr"
    import_checkpoints(run.source, url, base=run.base, steps=":2")
    with StoreWriter(url) as writer:
        writer.begin(3)
        writer.write_sparse(0, np.array([1, 5], np.int32), np.array([1, 1], np.int16), 0)
    assert TrajectoryStore(url).steps.tolist() == [1, 2]
    store = import_checkpoints(run.source, url, base=run.base).store
    store.verify()
    assert store.steps.tolist() == [1, 2, 3]


def test_a_missing_object_is_named(pair, bucket: str) -> None:
    import fsspec

    _, _, remote = pair
    files = fsspec.filesystem("s3")
    copy = f"{bucket}/damaged.zarr"
    files.copy(remote.path, copy, recursive=True)
    [part] = [p for p, spec in enumerate(remote.layout.parts) if spec.encoding == "exact"][:1]
    files.rm(f"{copy}/deltas/{part}/c/2/0")
    files.rm(f"{copy}/gram", recursive=True)
    with pytest.raises(
        StoreError, match=r"step 5, tensor .*: cannot be read \(a chunk is missing\)"
    ):
        gram(TrajectoryStore(copy))


def test_weight_sync_versions_in_a_bucket_are_read_and_followed(
    bucket: str, tmp_path: Path
) -> None:
    """As SkyRL writes them to S3: a version is downloaded, applied and deleted."""
    import fsspec

    run = write_run(tmp_path, steps=[1, 2, 3])
    local = write_versions(tmp_path / "sync", run, layout="skyrl")
    files = fsspec.filesystem("s3")
    url = f"{bucket}/sync"
    for number in (1, 2):
        name = f"delta-{number:08d}"
        files.put(str(local / name), f"{url}/{name}", recursive=True)
    expected = import_checkpoints(run.source, tmp_path / "f.zarr", base=run.base).store.checksums()
    first = import_checkpoints(url, tmp_path / "s.zarr", base=run.base)
    assert np.array_equal(first.store.checksums(), expected[:2])
    assert main(["info", url]) == 0
    files.put(str(local / "delta-00000003"), f"{url}/delta-00000003", recursive=True)
    files.rm(f"{url}/delta-00000001", recursive=True)
    second = import_checkpoints(url, tmp_path / "s.zarr", base=run.base)
    assert second.added == [3]
    assert np.array_equal(second.store.checksums(), expected)
    assert not list(tmp_path.glob(".relexkit-*"))


def test_a_second_writer_is_refused_and_names_the_first(pair, bucket: str, tmp_path: Path) -> None:
    run, _, _ = pair
    url = f"{bucket}/two.zarr"
    import_checkpoints(run.source, url, base=run.base, steps=":1")
    with StoreWriter(url):
        with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on"):
            StoreWriter(url)
        with pytest.raises(StoreError, match="is being written by"):
            import_checkpoints(run.source, url, base=run.base)
    assert import_checkpoints(run.source, url, base=run.base).added == [2, 5, 6]
    import fsspec

    assert not fsspec.filesystem("s3").exists(f"{url}.lock")


def test_a_lease_that_was_left_over_is_taken_by_one_and_lost_by_its_owner(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "_keep", lambda self: None)  # as that of a killed process
    url = f"{bucket}/left.zarr"
    left = Lease(url, seconds=3600)
    with pytest.raises(StoreError, match="is being written"):
        Lease(url, seconds=3600)
    taken = Lease(url, seconds=-1)  # whatever its age is
    assert left._put(IfMatch=left._tag) is None
    with pytest.raises(StoreError, match="is being written"):
        Lease(url, seconds=3600)
    left.close()  # leaves the other's lease alone
    with pytest.raises(StoreError, match="is being written"):
        Lease(url, seconds=3600)
    taken.close()
    Lease(url).close()


def test_a_writer_whose_lease_is_lost_commits_nothing(pair, bucket: str) -> None:
    run, _, _ = pair
    url = f"{bucket}/lost.zarr"
    import_checkpoints(run.source, url, base=run.base, steps=":1")
    with StoreWriter(url) as writer:
        writer.begin(2)
        for part, spec in enumerate(writer.store.layout.parts):
            if spec.encoding == "sparse":
                writer.write_sparse(part, np.empty(0, np.int32), np.empty(0, np.int16), 0)
            elif spec.encoding != "fixed":
                writer.write_row(part, np.zeros(spec.numel, np.float32), 0)
        assert writer._lock is not None
        lease = writer._lock._lease
        assert lease is not None
        lease._lost = True
        with pytest.raises(StoreError, match="may not be the only writer any more"):
            writer.commit()
    assert TrajectoryStore(url).steps.tolist() == [1]
