"""Weight-sync deltas: both layouts, every encoding and checksum, chains with gaps, whole versions
and other bases, in every command that reads checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Run, same_bits, store_content, write_checkpoint, write_run
from safetensors.torch import load_file
from versions import CHECKSUMS, write_pull_version, write_skyrl_version, write_versions

from relexkit import TrajectoryStore, checkout, import_checkpoints
from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.checkpoints.chain import ChainedRun
from relexkit.cli import main
from relexkit.errors import CheckpointError
from relexkit.ingest.estimate import estimate_import
from relexkit.ingest.reading import Reading
from relexkit.ingest.watch import watch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A bfloat16 run of five steps with buffers, a scalar and an empty tensor."""
    return write_run(
        tmp_path_factory.mktemp("run"), steps=[1, 2, 3, 4, 5], buffers=True, head="own"
    )


def assert_holds(store: TrajectoryStore, run: Run, folder: Path) -> None:
    """Every recorded step comes back bit for bit."""
    for step in map(int, store.steps):
        written = checkout(store, step, folder / f"back-{step}")
        found = load_file(written / "model.safetensors")
        assert found.keys() == run.weights[step].keys()
        assert all(same_bits(found[n], t) for n, t in run.weights[step].items()), step


@pytest.fixture(scope="module")
def from_folders(run: Run, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """The store of the run's folders."""
    path = tmp_path_factory.mktemp("folders") / "f.zarr"
    return import_checkpoints(run.source, path, base=run.base).store


@pytest.mark.parametrize(
    ("encoding", "checksum"),
    [("xor", "xxh3-128"), ("overwrite", "blake3"), ("xor", "adler32"), ("overwrite", "sha256")],
)
def test_a_store_from_deltas_equals_the_one_from_folders(
    run: Run, from_folders: TrajectoryStore, tmp_path: Path, encoding: str, checksum: str
) -> None:
    source = write_versions(tmp_path / "sync", run, encoding=encoding, checksum=checksum)
    result = import_checkpoints(source, tmp_path / "s.zarr", base=run.base)
    assert result.store.steps.tolist() == run.steps
    assert not result.left_out
    contents = [store_content(Path(s.path)) for s in (result.store, from_folders)]
    layouts = [content.pop("attributes")["layout"] for content in contents]
    assert contents[0] == contents[1]
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize("older", [False, True], ids=["xxh3-128", "sha256"])
@pytest.mark.parametrize("below", ["", "deltas"])
def test_skyrl(run: Run, tmp_path: Path, older: bool, below: str) -> None:
    write_versions(tmp_path / "sync" / below, run, layout="skyrl", older=older)
    result = import_checkpoints(tmp_path / "sync", tmp_path / "s.zarr", base=run.base)
    assert "weight-sync deltas of SkyRL: 5 versions" in result.notes[0]
    assert_holds(result.store, run, tmp_path)


def test_whole_versions_begin_the_chain_anew(run: Run, tmp_path: Path) -> None:
    """Versions 1 and 2 were pruned; 3 is whole, 4 and 5 follow it."""
    sync = tmp_path / "sync"
    write_pull_version(sync, 3, None, run.weights[3])
    for number in (4, 5):
        write_pull_version(sync, number, run.weights[number - 1], run.weights[number])
    result = import_checkpoints(sync, tmp_path / "s.zarr", base=run.base)
    assert result.store.steps.tolist() == [3, 4, 5]
    assert_holds(result.store, run, tmp_path)


def test_whole_versions_in_between_are_read_and_a_whole_version_zero_is_the_base(
    run: Run, tmp_path: Path
) -> None:
    sync = tmp_path / "sync"
    write_pull_version(sync, 0, None, run.weights[0])
    for number in (1, 2, 4, 5):
        write_pull_version(sync, number, run.weights[number - 1], run.weights[number])
    write_pull_version(sync, 3, None, run.weights[3])
    result = import_checkpoints(sync, tmp_path / "s.zarr")
    assert "5 versions" not in result.notes[0]
    assert "6 versions, 2 of them whole" in result.notes[0]
    assert result.store.steps.tolist() == run.steps
    assert_holds(result.store, run, tmp_path)


def test_a_broken_chain_is_refused_from_the_gap_on(run: Run, tmp_path: Path) -> None:
    source = write_versions(tmp_path / "sync", run)
    shutil.rmtree(source / "weight_v000003")
    result = import_checkpoints(source, tmp_path / "s.zarr", base=run.base)
    assert result.store.steps.tolist() == [1, 2]
    assert result.left_out == {
        "version 4": "applies to version 3, which is not there: the chain is broken from here to"
        " the next whole version",
        "version 5": "applies to version 4, which was left out: the chain is broken from here to"
        " the next whole version",
    }
    write_pull_version(tmp_path / "pruned", 4, run.weights[3], run.weights[4])
    with pytest.raises(
        CheckpointError,
        match="holds no usable version; version 4: applies to version 3, which is not there",
    ):
        import_checkpoints(tmp_path / "pruned", tmp_path / "p.zarr", base=run.base)


def test_a_pruned_chain_goes_on_from_the_store(run: Run, tmp_path: Path) -> None:
    """What the store has recorded is the base of what follows, and is checked against the version's
    own checksums.
    """
    source = write_versions(tmp_path / "sync", run)
    first = tmp_path / "first"
    for number in (1, 2, 3):
        shutil.copytree(source / f"weight_v{number:06d}", first / f"weight_v{number:06d}")
    import_checkpoints(first, tmp_path / "s.zarr", base=run.base)
    for number in (1, 2, 3):
        shutil.rmtree(source / f"weight_v{number:06d}")
    result = import_checkpoints(source, tmp_path / "s.zarr", base=run.base)
    assert result.added == [4, 5]
    assert_holds(result.store, run, tmp_path)


def test_a_store_of_another_run_is_not_gone_on_with(run: Run, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", steps=[1, 2], buffers=True, head="own", seed=7)
    for step in (1, 2):  # the same base, other steps
        moved = {n: run.weights[0][n] for n in run.weights[0]} | {
            "model.norm.weight": other.weights[step]["model.norm.weight"]
        }
        other.weights[step] = moved
    other.weights[0] = run.weights[0]
    import_checkpoints(write_versions(tmp_path / "a", other), tmp_path / "s.zarr", base=run.base)
    source = write_versions(tmp_path / "b", run)
    with pytest.raises(CheckpointError, match=r"store does not have the checksum that version 2"):
        import_checkpoints(source, tmp_path / "s.zarr", base=run.base)


def test_another_base_is_refused_at_the_first_version(run: Run, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", steps=[1], buffers=True, head="own", seed=7)
    source = write_versions(tmp_path / "sync", run)
    with pytest.raises(
        CheckpointError,
        match=r"step 1: version 1: tensor '[^']+': its xxh3-128 checksum differs .* the base is not"
        " the one that the deltas were made for",
    ):
        import_checkpoints(source, tmp_path / "s.zarr", base=other.base)


def test_a_tensor_that_the_base_lacks_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    base = {n: t for n, t in run.weights[0].items() if n != "lm_head.weight"}
    write_checkpoint(tmp_path / "base", base)
    source = write_versions(tmp_path / "sync", run)
    with pytest.raises(CheckpointError, match=r"changes tensor 'lm_head\.weight', which the base"):
        import_checkpoints(source, tmp_path / "s.zarr", base=tmp_path / "base")


def test_step_map_and_strides(run: Run, tmp_path: Path) -> None:
    source = write_versions(tmp_path / "sync", run)
    result = import_checkpoints(source, tmp_path / "s.zarr", base=run.base, step_map="4")
    assert result.store.steps.tolist() == [4, 8, 12, 16, 20]
    assert result.store.metrics()["label"].tolist() == [1, 2, 3, 4, 5]
    (tmp_path / "map.json").write_text(json.dumps({"0": 0, "2": 10, "5": 30}))
    result = import_checkpoints(
        source, tmp_path / "m.zarr", base=run.base, step_map=str(tmp_path / "map.json")
    )
    assert result.store.steps.tolist() == [10, 30]
    found = load_file(checkout(result.store, 30, tmp_path / "thirty") / "model.safetensors")
    assert all(same_bits(found[n], t) for n, t in run.weights[5].items())
    strided = import_checkpoints(source, tmp_path / "t.zarr", base=run.base, steps="1::2").store
    assert strided.steps.tolist() == [1, 3, 5]
    assert_holds(strided, run, tmp_path)


def test_resuming_with_a_step_map_goes_on_from_the_store(run: Run, tmp_path: Path) -> None:
    source = write_versions(tmp_path / "sync", run)
    kept = source.rename(tmp_path / "kept")
    for number in (1, 2):
        shutil.copytree(kept / f"weight_v{number:06d}", source / f"weight_v{number:06d}")
    import_checkpoints(source, tmp_path / "s.zarr", base=run.base, step_map="10")
    shutil.rmtree(source)
    for number in (3, 4, 5):
        shutil.copytree(kept / f"weight_v{number:06d}", source / f"weight_v{number:06d}")
    result = import_checkpoints(source, tmp_path / "s.zarr", base=run.base, step_map="10")
    assert result.store.steps.tolist() == [10, 20, 30, 40, 50]
    found = load_file(checkout(result.store, 50, tmp_path / "last") / "model.safetensors")
    assert all(same_bits(found[n], t) for n, t in run.weights[5].items())


def test_a_version_without_changes_is_a_step_without_changes(run: Run, tmp_path: Path) -> None:
    sync = write_pull_version(tmp_path / "sync", 1, run.weights[0], run.weights[0]).parent
    write_pull_version(sync, 2, run.weights[0], run.weights[2])
    store = import_checkpoints(sync, tmp_path / "s.zarr", base=run.base).store
    assert store.steps.tolist() == [1, 2]
    found = load_file(checkout(store, 1, tmp_path / "one") / "model.safetensors")
    assert all(same_bits(found[n], t) for n, t in run.weights[0].items())


def test_float32_deltas_become_dense_rows(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, steps=[1, 2, 3], dtype="float32", motion="drift", density=1.0, base="folder"
    )
    source = write_versions(tmp_path / "sync", run)
    exact = import_checkpoints(source, tmp_path / "e.zarr", base=run.base, encoding="exact").store
    assert {p.encoding for p in exact.layout.parts} == {"exact"}
    assert_holds(exact, run, tmp_path)
    rounded = import_checkpoints(source, tmp_path / "r.zarr", base=run.base).store
    folders = import_checkpoints(run.source, tmp_path / "f.zarr", base=run.base).store
    assert np.array_equal(rounded.checksums(), folders.checksums())


def test_steps_may_be_opened_in_any_order_and_any_number_of_times(run: Run, tmp_path: Path) -> None:
    source = write_versions(tmp_path / "sync", run)
    assert run.base is not None
    chained = ChainedRun(open_run(source), open_checkpoint(run.base))  # type: ignore[arg-type]
    opened = {step: chained.checkpoint(step) for step in (3, 1, 5, 2)}
    for step in (1, 5, 2, 3, 1):
        out = np.empty(53 * 8, np.uint16)
        opened[step].read_into("model.embed_tokens.weight", 0, out)
        expected = run.weights[step]["model.embed_tokens.weight"].view(torch.int16).numpy()
        assert np.array_equal(out, expected.reshape(-1).view(np.uint16)), step


def test_what_changed_is_known_across_versions(run: Run, tmp_path: Path) -> None:
    source = write_versions(tmp_path / "sync", run)
    assert run.base is not None
    chained = ChainedRun(open_run(source), open_checkpoint(run.base))  # type: ignore[arg-type]
    chained.checkpoint(1).close()
    later = chained.checkpoint(4)
    assert later.since == 1
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.scale"):
        pair = [
            run.weights[s][name].reshape(-1).view(torch.int16).numpy().view(np.uint16)
            for s in (1, 4)
        ]
        elements, before, after = later.changed(name)
        expected = np.flatnonzero(pair[0] != pair[1])
        assert np.array_equal(elements, expected)
        assert np.array_equal(before, pair[0][expected])
        assert np.array_equal(after, pair[1][expected])


def test_info_and_dry_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_versions(tmp_path / "sync", run)
    assert main(["info", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "5 steps from 1 to 5" in shown
    assert "xor deltas with xxh3-128 checksums" in shown
    assert "compressed" in shown
    assert main(["info", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_elements"] is None
    found = estimate_import(source, reading=Reading(base=run.base))
    assert (found.steps, found.encodings) == (run.steps, ["sparse"])
    assert found.seconds is not None
    assert found.checkpoint_bytes == 5 * sum(
        t.numel() * t.element_size() for t in run.weights[0].values()
    )
    assert main(["import", str(source), "--base", str(run.base), "-o", "x.zarr", "--dry-run"]) == 0
    assert not Path("x.zarr").exists()
    assert main(["info", str(source / "weight_v000002")]) == 1
    assert "mean nothing without the versions before" in capsys.readouterr().err


def test_watch_follows_a_chain_and_may_delete_it(run: Run, tmp_path: Path) -> None:
    kept = write_versions(tmp_path / "kept", run)
    source = tmp_path / "sync"
    quick = {"poll_seconds": 0.02, "idle_seconds": 0.1}
    for numbers in ((1, 2), (3,), (4, 5)):
        for number in numbers:
            shutil.copytree(kept / f"weight_v{number:06d}", source / f"weight_v{number:06d}")
        store = watch(source, tmp_path / "s.zarr", base=run.base, delete_after=True, **quick)
    assert store.steps.tolist() == run.steps
    assert sorted(p.name for p in source.iterdir())[-1] == "weight_v000005"
    assert len(list(source.iterdir())) < 5
    assert_holds(store, run, tmp_path)


def test_object_storage(run: Run, from_folders: TrajectoryStore, tmp_path: Path) -> None:
    """The file system in memory of fsspec; ``tests/store/test_remote.py`` has S3."""
    fsspec = pytest.importorskip("fsspec")
    source = write_versions(tmp_path / "sync", run)
    shutil.rmtree(source / "weight_v000003")
    write_pull_version(source, 3, None, run.weights[3])
    fsspec.filesystem("memory").put(str(source), "/bucket/sync", recursive=True)
    url = "memory://bucket/sync"
    assert estimate_import(url, reading=Reading(base=run.base)).steps == run.steps
    result = import_checkpoints(url, tmp_path / "s.zarr", base=run.base)
    assert np.array_equal(result.store.checksums(), from_folders.checksums())
    store = watch(url, tmp_path / "w.zarr", base=run.base, poll_seconds=0.02, idle_seconds=0.1)
    assert np.array_equal(store.checksums(), from_folders.checksums())
    assert not list(tmp_path.glob(".relexkit-*")), "downloads are deleted"
    with pytest.raises(CheckpointError, match="where nothing is deleted; leave --delete-after"):
        watch(url, tmp_path / "d.zarr", base=run.base, delete_after=True, poll_seconds=0.02)
    with pytest.raises(CheckpointError, match="holds no versions"):
        open_run("memory://bucket/other")


def test_two_layouts_or_two_folders_for_one_version_are_refused(run: Run, tmp_path: Path) -> None:
    sync = write_pull_version(tmp_path / "sync", 1, run.weights[0], run.weights[1]).parent
    shutil.copytree(sync / "weight_v000001", sync / "weight_v1")
    with pytest.raises(CheckpointError, match=r"version 1 occurs twice in .*remove one"):
        open_run(sync)
    shutil.rmtree(sync / "weight_v1")
    write_skyrl_version(sync, 2, run.weights[1], run.weights[2])
    with pytest.raises(CheckpointError, match="expected those of one run: move them apart"):
        open_run(sync)


def test_the_checksums_of_the_tests_are_those_of_the_reference_vectors() -> None:
    """So that reader and writer of the tests are not wrong together: vectors of the algorithms."""
    assert CHECKSUMS["adler32"](b"Wikipedia") == "11e60398"
    assert CHECKSUMS["xxh3-128"](b"") == "99aa06d3014798d86001c324468d497f"
    assert CHECKSUMS["blake3"](b"").startswith("af1349b9f5f9a1a6a0404dea36dcc949")
    assert CHECKSUMS["sha256"](b"").startswith("e3b0c44298fc1c149afbf4c8996fb924")


@pytest.mark.parametrize("writer", ["skyrl", "slime-xor-xxh3-128", "slime-overwrite-blake3"])
def test_files_that_the_trainers_own_code_wrote(tmp_path: Path, writer: str) -> None:
    """``tests/data/weight_sync``: two versions by SkyRL's ``DeltaCheckpointPublisher`` (a956457)
    and slime's ``UpdateWeightFromDiskDelta`` (624b824), and the weights that they were given.
    """
    data = Path(__file__).parents[1] / "data" / "weight_sync"
    store = import_checkpoints(data / writer, tmp_path / "s.zarr", base=data / "base").store
    expected = load_file(data / "expected.safetensors")
    assert store.steps.tolist() == [1, 2]
    for step in (1, 2):
        found = load_file(checkout(store, step, tmp_path / f"{step}") / "model.safetensors")
        assert len(found) * 2 == len(expected)
        assert all(same_bits(t, expected[f"{step}/{n}"]) for n, t in found.items())
