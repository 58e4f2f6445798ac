"""The power goes at any moment: no step that was reported is lost, and no original is deleted whose
copy is not on the disk.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from disk import Disk, Power, copy, same_files, watched, without_flushes
from scenarios import SCENARIOS, Undisturbed, recorded

from relexkit.errors import StoreError
from relexkit.store import StoreWriter

CUTS = int(os.environ.get("RELEXKIT_CUTS", "3"))
"""Of every scenario."""

SCENARIOS_OF_CUTS = (
    "import, sparse",
    "import, float",
    "append, sparse",
    "record, bfloat16",
    "record, float32",
    "watch, sparse",
    "watch, float",
)


class Reported:
    """When which step was reported: the length of the log at that moment."""

    def __init__(self, disk: Disk, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[tuple[int, int]] = []
        commit = StoreWriter.commit

        def committed(writer: StoreWriter, *arguments: object, **options: object) -> None:
            commit(writer, *arguments, **options)  # type: ignore[arg-type]
            self.steps.append((len(disk.log), int(writer.store.steps[-1])))

        monkeypatch.setattr(StoreWriter, "commit", committed)

    def until(self, moment: int) -> list[int]:
        return [step for at, step in self.steps if at <= moment]


def cut_everywhere(name: str, place: Path, cuts: int, patch: pytest.MonkeyPatch) -> int:
    known = Undisturbed.of(SCENARIOS[name], place)
    disk = Disk(known.fresh())
    with patch.context() as reporting:
        reported = Reported(disk, reporting)
        with watched(disk):
            assert known.scenario.run(known.work).status == 0
    power = Power(known.before, disk.log)
    power.go_on(len(disk.log))
    power.running(place / "replayed")  # the log leaves nothing out
    assert not same_files(place / "replayed", known.work)

    chance = random.Random(name)
    moments = sorted(chance.randint(0, len(disk.log)) for _ in range(cuts))
    power = Power(known.before, disk.log)
    for number, moment in enumerate(moments):
        power.go_on(moment)
        shutil.rmtree(known.work)
        power.after_cut(known.work, chance if number % 3 else None)
        try:
            check_cut(known, reported.until(moment))
        except BaseException as problem:
            last = disk.log[moment - 1] if moment else None
            kind = f"{last.kind} {last.target or last.path}" if last else "nothing"
            problem.add_note(f"{name}: power cut after {moment} of {len(disk.log)}, {kind}")
            raise
    return len(moments)


def check_cut(known: Undisturbed, reported: list[int]) -> None:
    assert known.scenario.store is not None
    steps = known.check_whole()
    begun = recorded(known.before / known.scenario.store) or []
    assert {*begun, *reported} <= {*steps}, f"reported {reported}, found {steps}"
    known.check_completed()


@pytest.mark.parametrize("name", SCENARIOS_OF_CUTS)
def test_after_a_power_cut_nothing_that_was_reported_is_lost(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_everywhere(name, tmp_path, CUTS, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS_OF_CUTS)
def test_many_power_cuts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"{name}: {cut_everywhere(name, tmp_path, 40, monkeypatch)} cuts")


def test_a_disk_without_flushes_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test can fail: with every flush left out, steps are lost."""
    with without_flushes(), pytest.raises((AssertionError, StoreError)):
        cut_everywhere("import, sparse", tmp_path, 20, monkeypatch)


def test_what_was_not_flushed_is_lost_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/old").write_bytes(b"old")
    copy(tmp_path / "root", tmp_path / "before")
    disk = Disk(tmp_path / "root")
    with watched(disk):
        (disk.root / "folder").mkdir()
        for name in ("old", "folder/kept", "folder/lost"):
            with open(disk.root / name, "wb") as file:
                file.write(b"new")
                file.flush()
                if name == "folder/kept":
                    os.fsync(file.fileno())
                    file.write(b" and more")
        for path in ("folder", "."):
            fd = os.open(disk.root / path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        (disk.root / "folder/lost").unlink()
    power = Power(tmp_path / "before", disk.log)
    power.go_on(len(disk.log))
    power.after_cut(tmp_path / "after", None)
    found = {p.name: p.read_bytes() for p in (tmp_path / "after").rglob("*") if p.is_file()}
    assert found == {"old": b"old", "kept": b"new", "lost": b""}
