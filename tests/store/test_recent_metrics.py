"""Metrics of the latest steps: one file a step, and the same numbers for a reader at any moment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from relexkit import StoreError, TrajectoryStore
from relexkit.store import About, StoreWriter, build_layout, create_store, durable
from relexkit.store.encodings.bits import block_checksums, content_checksum
from relexkit.store.recent_metrics import MOST, NAME, NUM_RECENT

NAMES = ("reward", "rewards/math/mean")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    layout = build_layout([("w", (4,), "float32")], {"float32": "float"})
    create_store(
        tmp_path / "run.zarr",
        layout,
        lambda part, begin, end: np.zeros(end - begin, np.uint32),
        About(source="test", base="zeros", mantissa_bits=23),
    )
    return tmp_path / "run.zarr"


def record(writer: StoreWriter, step: int, metrics: Mapping[str, float]) -> None:
    writer.begin(step)
    values = np.full(4, step, np.float32)
    writer.write_row(0, values, content_checksum(block_checksums(values)))
    writer.commit(metrics)


def logged(step: int, offset: float = 0.0) -> dict[str, float]:
    """What is logged at a step: the second metric at every third one, from the seventh on."""
    found = {NAMES[0]: step + offset}
    return found | ({NAMES[1]: -step - offset} if step > 6 and step % 3 == 0 else {})


def assert_has(store: TrajectoryStore, expected: list[dict[str, float]]) -> None:
    found = store.metrics()
    for name in {name for metrics in expected for name in metrics}:
        column = [metrics.get(name, np.nan) for metrics in expected]
        np.testing.assert_array_equal(found[name], column)


def test_every_step_reads_back_while_written_and_after_a_kill(path, tmp_path):
    expected = []
    with StoreWriter(path) as writer:
        for step in range(1, 2 * MOST + 20):
            record(writer, step, logged(step))
            expected.append(logged(step))
            assert_has(TrajectoryStore(path), expected)
            assert_has(writer.store, expected)  # room for rows 65 and 129 is made meanwhile
            np.testing.assert_array_equal(
                writer.store.read_delta(0, step - 1, 0, 4, np.empty(0, np.uint16)), np.full(4, step)
            )
            assert len(writer.store.checksums()) == step
            if step in (5, MOST, MOST + 1, 2 * MOST + 3):  # the writer is killed here
                killed = shutil.copytree(path, tmp_path / f"killed-{step}")
                shutil.rmtree(f"{killed}.lock", ignore_errors=True)
                with StoreWriter(killed) as another:
                    record(another, step + 1, {"late": 0.5})
                assert_has(TrajectoryStore(killed), [*expected, {"late": 0.5}])
                TrajectoryStore(killed).verify()
    assert_has(TrajectoryStore(path), expected)
    TrajectoryStore(path).verify()


def test_a_closed_store_has_them_where_earlier_releases_look(path):
    with StoreWriter(path) as writer:
        for step in range(1, 10):
            record(writer, step, logged(step))
    shutil.rmtree(path / NAME)
    assert_has(TrajectoryStore(path), [logged(step) for step in range(1, 10)])
    TrajectoryStore(path).verify()
    with StoreWriter(path) as writer:  # a store of an earlier release is continued as it is
        record(writer, 10, logged(10))
        assert_has(TrajectoryStore(path), [logged(step) for step in range(1, 11)])
    assert not (path / NAME).exists()


@pytest.mark.parametrize("before", [10, MOST + 5])
def test_steps_that_were_taken_back_leave_nothing(path, before):
    with StoreWriter(path) as writer:
        for step in range(1, before + 1):
            record(writer, step, logged(step))
        writer.truncate(before - 4)
        record(writer, before - 3, logged(before - 3, 0.5))
    expected = [logged(step) for step in range(1, before - 3)] + [logged(before - 3, 0.5)]
    assert_has(TrajectoryStore(path), expected)
    with StoreWriter(path) as writer:
        record(writer, before - 2, {})
        assert_has(TrajectoryStore(path), [*expected, {}])
    assert_has(TrajectoryStore(path), [*expected, {}])


def test_more_metrics_than_it_holds(path):
    many = {f"m/{number}": number + 0.5 for number in range(NUM_RECENT + 3)}
    with StoreWriter(path) as writer:
        for step in (1, 2):
            record(writer, step, {name: step * value for name, value in many.items()})
        found = TrajectoryStore(path).metrics()
    for kept in (found, TrajectoryStore(path).metrics()):
        assert {name: list(values) for name, values in kept.items()} == {
            name: [value, 2 * value] for name, value in many.items()
        }


def test_a_step_writes_one_file_of_metrics(path, monkeypatch):
    renamed: list[Path] = []
    rename = durable.rename

    def noted(source: Path, target: Path) -> None:
        renamed.append(target)
        rename(source, target)

    monkeypatch.setattr(durable, "rename", noted)
    metrics = {f"m{number}": 1.0 for number in range(40)}
    with StoreWriter(path) as writer:
        record(writer, 1, metrics)
        renamed.clear()
        record(writer, 2, metrics)
        names = [str(target.relative_to(path)) for target in renamed]
    assert [name for name in names if "metrics" in name] == [f"{NAME}/c/0"]


def test_damage_is_refused(path):
    with StoreWriter(path) as writer:
        record(writer, 1, logged(1))
        file = path / NAME / "c" / "0"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(StoreError, match="the metrics of the latest steps: cannot be read"):
            TrajectoryStore(path).metrics()
        file.unlink()
        with pytest.raises(StoreError, match="a chunk is missing"):
            TrajectoryStore(path).metrics()
