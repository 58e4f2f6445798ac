"""Checkpoints that appear one after the other, are recorded, and are deleted if asked to."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import BUFFER, Run, write_run
from safetensors.torch import load_file, save_file

import relexkit.ingest.watch
from relexkit import CheckpointError, RelexkitError, StoreError, TrajectoryStore, import_checkpoints
from relexkit.checkpoints import open_checkpoint
from relexkit.cli import main
from relexkit.ingest.readback import ReadBack
from relexkit.ingest.watch import watch
from relexkit.store import StoreWriter

QUICK = {"poll_seconds": 0.02, "idle_seconds": 0.3}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, Path]:
    """A run, and the empty folder that the watcher looks at."""
    run = write_run(tmp_path / "made", dtype="bfloat16", head="tied", steps=[1, 2, 3, 5])
    (tmp_path / "run").mkdir()
    return run, tmp_path / "run"


def appear(run: Run, folder: Path, step: int) -> Path:
    return Path(shutil.copytree(run.folders[step], folder / f"step_{step}"))


def test_steps_are_recorded_as_they_appear(saved: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = saved
    said: list[str] = []

    def save() -> None:
        for step in run.steps:
            appear(run, folder, step)
            while f"step {step} recorded" not in said:
                time.sleep(0.01)
            shutil.rmtree(folder / f"step_{step}")  # a folder that rotates

    trainer = threading.Thread(target=save)
    trainer.start()
    store = watch(
        folder,
        tmp_path / "s.zarr",
        base=run.base,
        say=said.append,
        poll_seconds=0.02,
        idle_seconds=3,
    )
    trainer.join()
    whole = import_checkpoints(run.source, tmp_path / "i.zarr", base=run.base).store
    assert store.steps.tolist() == run.steps
    assert np.array_equal(store.checksums(), whole.checksums())


def test_a_checkpoint_that_is_being_written_is_not_taken(
    saved: tuple[Run, Path], tmp_path: Path
) -> None:
    run, folder = saved
    appear(run, folder, 1)
    partial = appear(run, folder, 2) / "model.safetensors"
    content = partial.read_bytes()
    partial.write_bytes(content[:-100])
    store = watch(folder, tmp_path / "s.zarr", base=run.base, **QUICK)
    assert store.steps.tolist() == [1]
    partial.write_bytes(content)
    assert watch(folder, tmp_path / "s.zarr", base=run.base, **QUICK).steps.tolist() == [1, 2]


def test_a_folder_that_still_grows_waits_for_the_next_look_unless_it_is_marked(
    saved: tuple[Run, Path], tmp_path: Path
) -> None:
    run, folder = saved
    marked, growing = appear(run, folder, 1), appear(run, folder, 2)
    (marked / "STABLE").touch()
    said: list[str] = []
    stop = threading.Event()

    def grow() -> None:
        while not stop.is_set():
            with (growing / "log.txt").open("a") as file:
                file.write("more\n")
            time.sleep(0.002)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        assert watch(
            folder, tmp_path / "s.zarr", base=run.base, say=said.append, **QUICK
        ).steps.tolist() == [1]
    finally:
        stop.set()
        writer.join()
    assert watch(folder, tmp_path / "s.zarr", base=run.base, **QUICK).steps.tolist() == [1, 2]


@pytest.mark.parametrize("part", ["the folder", "its weights"])
def test_a_step_that_rotates_away_while_it_is_read_is_left_out(
    saved: tuple[Run, Path], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = saved
    for step in run.steps:
        appear(run, folder, step)
    real = relexkit.ingest.watch.import_checkpoints

    def rotated(*arguments: Any, steps: str, **options: Any) -> Any:
        if steps == "2:2":
            if part == "the folder":
                shutil.rmtree(folder / "step_2", ignore_errors=True)
            else:
                (folder / "step_2/model.safetensors").unlink(missing_ok=True)
        return real(*arguments, steps=steps, **options)

    monkeypatch.setattr(relexkit.ingest.watch, "import_checkpoints", rotated)
    said: list[str] = []
    patient = {**QUICK, "idle_seconds": 3.0}
    store = watch(folder, tmp_path / "s.zarr", base=run.base, say=said.append, **patient)
    assert store.steps.tolist() == [1, 3, 5]
    assert said[1] == "step 2 was changed or deleted while it was read; it is not recorded yet"


def test_an_error_of_a_step_that_stays_is_raised(saved: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = saved
    for step in run.steps:
        appear(run, folder, step)
    other = write_run(tmp_path / "other", dtype="float32", steps=[1])
    with pytest.raises(CheckpointError, match="expected"):
        watch(folder, tmp_path / "s.zarr", base=other.base, **QUICK)


def test_only_every_nth_step_is_recorded(saved: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = saved
    for step in run.steps:
        appear(run, folder, step)
    store = watch(folder, tmp_path / "s.zarr", base=run.base, every=5, delete_after=True, **QUICK)
    assert store.steps.tolist() == [5]
    assert len(list(folder.iterdir())) == 4


def test_a_step_that_comes_too_late_is_reported(saved: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = saved
    appear(run, folder, 2)
    watch(folder, tmp_path / "s.zarr", base=run.base, **QUICK)
    appear(run, folder, 1)
    said: list[str] = []
    assert watch(
        folder, tmp_path / "s.zarr", base=run.base, say=said.append, **QUICK
    ).steps.tolist() == [2]
    assert said == ["step 1 came after step 2 was recorded; steps are recorded in order: left out"]


@pytest.mark.parametrize(
    ("dtype", "encoding", "motion"),
    [("bfloat16", "auto", "bits"), ("float32", "exact", "drift"), ("float32", "float", "drift")],
)
def test_checkpoints_are_deleted_once_they_read_back_equal_but_the_newest(
    dtype: str, encoding: str, motion: str, tmp_path: Path
) -> None:
    density = 1.0 if dtype == "float32" else 0.02
    run = write_run(
        tmp_path / "made", dtype=dtype, motion=motion, density=density, steps=[1, 2, 3, 5]
    )
    (tmp_path / "run").mkdir()
    for step in run.steps:
        appear(run, tmp_path / "run", step)
    other = tmp_path / "run/notes"
    other.mkdir()
    store = watch(
        tmp_path / "run",
        tmp_path / "s.zarr",
        base=run.base,
        encoding=encoding,
        delete_after=True,
        **QUICK,
    )
    assert store.steps.tolist() == run.steps
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["notes", "step_5"]


def test_rounded_deltas_delete_nothing_unless_they_are_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "made", dtype="float32", motion="drift", density=1.0, steps=[1, 2])
    with pytest.raises(
        RelexkitError,
        match=r"holds deltas rounded to 10 mantissa bits, so nothing was deleted; expected --encod",
    ):
        watch(run.source, tmp_path / "s.zarr", base=run.base, delete_after=True, **QUICK)
    assert all(folder.is_dir() for folder in run.folders.values())


def test_a_step_that_was_stored_wrongly_is_not_deleted(
    saved: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = saved
    for step in run.steps:
        appear(run, folder, step)
    write = StoreWriter.append

    def wrong(
        self: StoreWriter, part: int, gaps: np.ndarray, differences: np.ndarray, counts: np.ndarray
    ) -> None:
        if self._step == 2:
            differences = differences.copy()
            differences[0] ^= 0x40
        write(self, part, gaps, differences, counts)

    import_checkpoints(folder, tmp_path / "s.zarr", base=run.base, steps="1:1")
    monkeypatch.setattr(StoreWriter, "append", wrong)
    import_checkpoints(folder, tmp_path / "s.zarr", base=run.base)
    with pytest.raises(StoreError, match=r"step 2"):
        watch(folder, tmp_path / "s.zarr", base=run.base, delete_after=True, **QUICK)
    assert names(folder) == ["step_2", "step_3", "step_5"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tensor of more columns than one block of the log."""
    return write_run(
        tmp_path_factory.mktemp("wide"),
        shapes={"model.embed_tokens.weight": (300, 300)},
        steps=[1, 2, 3],
        extras=False,
        buffers=True,
    )


@pytest.mark.parametrize("encoding", ["auto", "exact", "float"])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", BUFFER])
def test_a_step_that_was_written_again_after_it_was_recorded_stays_and_is_reported(
    wide: Run, tensor: str, encoding: str, tmp_path: Path
) -> None:
    folder, said = tmp_path / "run", list[str]()
    for step in wide.steps:
        appear(wide, folder, step)

    def say(message: str) -> None:
        said.append(message)
        if message == "step 2 recorded":  # and step 1 is owed
            path = folder / "step_1/model.safetensors"
            tensors = load_file(path)
            tensors[tensor].view(-1)[-1] += 1
            save_file(tensors, path, metadata={"format": "pt"})

    options: dict[str, Any] = {"encoding": encoding, "delete_after": True, **QUICK}
    watch(folder, tmp_path / "s.zarr", base=wide.base, say=say, **options)
    assert names(folder) == ["step_1", "step_3"]
    told = [message for message in said if "step_1" in message]
    assert len(told) == 1
    assert f"differs from the recorded step 1, near tensor {tensor!r}" in told[0]
    assert "it is not deleted" in told[0]
    shutil.rmtree(folder / "step_1")
    appear(wide, folder, 1)  # as it was recorded
    watch(folder, tmp_path / "s.zarr", base=wide.base, **options)
    assert names(folder) == ["step_3"]


def test_a_store_that_was_damaged_meanwhile_deletes_nothing(wide: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in wide.steps:
        appear(wide, folder, step)

    def say(message: str) -> None:
        if message == "step 2 recorded":
            chunk = next((tmp_path / "s.zarr/updates").glob("*/data/c/0/0"))
            content = bytearray(chunk.read_bytes())
            content[20] ^= 1
            chunk.write_bytes(content)

    with pytest.raises(StoreError, match="step 1"):
        watch(folder, tmp_path / "s.zarr", base=wide.base, delete_after=True, say=say, **QUICK)
    assert names(folder) == ["step_1", "step_2", "step_3"]


def test_what_a_killed_watcher_owes_is_deleted_by_the_next(wide: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in wide.steps:
        appear(wide, folder, step)
    import_checkpoints(folder, tmp_path / "s.zarr", base=wide.base)
    (folder / "step_1").rename(folder / ".step_1.relexkit-deletes")  # killed while it deleted
    said: list[str] = []
    watch(folder, tmp_path / "s.zarr", base=wide.base, delete_after=True, say=said.append, **QUICK)
    assert names(folder) == ["step_3"]
    assert said == ["step_2 deleted"]


def test_places_inside_each_other_are_refused(wide: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in wide.steps:
        appear(wide, folder, step)
    assert wide.base is not None
    shutil.copytree(wide.base, folder / "step_2/base")
    (tmp_path / "base").symlink_to(folder / "step_2/base")
    (tmp_path / "link").symlink_to(folder / "step_1")
    before = sorted(folder.rglob("*"))
    for out, base, words in (
        (folder / "step_1/s.zarr", wide.base, "the store and the checkpoint .*step_1 lie inside"),
        (tmp_path / "link/s.zarr", wide.base, "the store and the checkpoint .*step_1 lie inside"),
        (tmp_path, wide.base, "lies inside the store"),
        (folder, wide.base, "lies inside the store"),
        (tmp_path / "s.zarr", folder / "step_2/base", "the base and the checkpoint .*step_2 lie"),
        (tmp_path / "s.zarr", tmp_path / "base", "the base and the checkpoint .*step_2 lie inside"),
    ):
        with pytest.raises(RelexkitError, match=words):
            watch(folder, out, base=base, delete_after=True, **QUICK)
        assert sorted(folder.rglob("*")) == before
        assert not (tmp_path / "s.zarr").exists()


def test_links_and_what_is_linked_to_stay_in_one_line_each(wide: Run, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (2, 3):
        appear(wide, folder, step)
    elsewhere.mkdir()
    appear(wide, elsewhere, 1)
    (folder / "step_1").symlink_to(elsewhere / "step_1")
    (folder / "step_3/tokenizer.json").symlink_to(folder / "step_2/config.json")
    said: list[str] = []
    watch(folder, tmp_path / "s.zarr", base=wide.base, delete_after=True, say=said.append, **QUICK)
    assert names(folder) == ["step_1", "step_2", "step_3"]
    assert (elsewhere / "step_1/model.safetensors").is_file()
    assert [message for message in said if "recorded" not in message] == [
        "step_1 is a link; it is not deleted",
        "step_2 holds files that step_3 links to; it is not deleted",
    ]


def test_adapters_are_watched_and_deleted_too(tmp_path: Path) -> None:
    from test_peft import VARIANTS, llama

    made = llama(tmp_path, **VARIANTS["plain"])
    store = watch(made.source, tmp_path / "s.zarr", base=made.base, delete_after=True, **QUICK)
    assert store.steps.tolist() == [1, 2, 3, 5, 8]
    assert [p.name for p in made.source.iterdir()] == ["checkpoint-8"]


def test_reading_back_goes_from_step_to_step(
    bfloat16_run: Run, bfloat16_store: TrajectoryStore
) -> None:
    back, steps = ReadBack(bfloat16_store), bfloat16_run.steps
    assert back.difference(0, open_checkpoint(bfloat16_run.folders[steps[0]])) is None
    assert back.difference(2, open_checkpoint(bfloat16_run.folders[steps[2]])) is None
    assert back.difference(3, open_checkpoint(bfloat16_run.folders[steps[2]])) is not None
    with pytest.raises(AssertionError, match="in order"):
        back.difference(1, open_checkpoint(bfloat16_run.folders[steps[1]]))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"nothing: no such folder; expected the one that the trainer saves into",
    ):
        watch(tmp_path / "nothing", tmp_path / "s.zarr", **QUICK)
    with pytest.raises(
        RelexkitError, match=r"every 0 and poll 5 s; expected at least 1 step and more than 0 s"
    ):
        watch(tmp_path, tmp_path / "s.zarr", every=0)


def test_the_command_reports_at_the_end(
    saved: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = saved
    appear(run, folder, 1)
    options = [
        "-o",
        str(tmp_path / "s.zarr"),
        "--base",
        str(run.base),
        "--poll",
        "0.02",
        "--idle",
        "0.1",
    ]
    assert main(["watch", str(folder), *options, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == [1]
    assert captured.err == "step 1 recorded\n"
    assert main(["watch", str(folder), *options]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 's.zarr'}: only step 1\n"
