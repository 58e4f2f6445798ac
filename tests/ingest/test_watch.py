"""Checkpoints that appear one after the other, are recorded, and are deleted if asked to."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Run, write_run

import relexkit.ingest.watch
from relexkit import CheckpointError, RelexkitError, StoreError, TrajectoryStore, import_checkpoints
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
    store = watch(folder, tmp_path / "s.zarr", base=run.base, say=said.append, **QUICK)
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


def test_a_step_that_reads_back_differently_deletes_nothing(
    saved: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = saved
    for step in run.steps:
        appear(run, folder, step)
    write = StoreWriter.append_update

    def wrong(
        self: StoreWriter, part: int, gaps: np.ndarray, differences: np.ndarray, counts: np.ndarray
    ) -> None:
        if self._step == 2:
            differences = differences.copy()
            differences[0] ^= 0x40
        write(self, part, gaps, differences, counts)

    monkeypatch.setattr(StoreWriter, "append_update", wrong)
    with pytest.raises(
        StoreError,
        match=(
            r"step 2 reads back differently from its checkpoint, near tensor '.*'; nothing was"
            r" deleted"
        ),
    ):
        watch(folder, tmp_path / "s.zarr", base=run.base, delete_after=True, **QUICK)
    assert len(list(folder.iterdir())) == 4


def test_adapters_are_watched_and_deleted_too(tmp_path: Path) -> None:
    from test_peft import VARIANTS, llama

    made = llama(tmp_path, **VARIANTS["plain"])
    store = watch(made.source, tmp_path / "s.zarr", base=made.base, delete_after=True, **QUICK)
    assert store.steps.tolist() == [1, 2, 3, 5, 8]
    assert [p.name for p in made.source.iterdir()] == ["checkpoint-8"]


def test_reading_back_goes_from_step_to_step(
    bfloat16_run: Run, bfloat16_store: TrajectoryStore
) -> None:
    from relexkit.checkpoints import open_checkpoint

    back = ReadBack(bfloat16_store, 0)
    with pytest.raises(AssertionError, match="one after the other"):
        back.check(2, open_checkpoint(bfloat16_run.folders[bfloat16_run.steps[2]]))


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
