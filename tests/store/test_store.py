"""The store: damage of any file is noticed, readers see whole steps only, one writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from runs import Run, write_run
from stores import store_of

from relexkit import TrajectoryStore, import_checkpoints
from relexkit.errors import StoreError
from relexkit.store import StoreWriter, blocks, column_windows, describe_steps
from relexkit.store.encodings.bits import BLOCK

KINDS: dict[str, dict[str, Any]] = {
    "sparse": {"dtype": "bfloat16", "density": 0.1, "steps": (1, 4)},
    "exact": {"dtype": "bfloat16", "density": 0.7, "steps": (1, 4)},
    "float": {"dtype": "float32", "density": 1.0, "motion": "drift", "steps": (1, 4)},
}
SHAPES = {"model.embed_tokens.weight": (23, 7), "model.layers.0.mlp.up_proj.weight": (9, 7)}


@pytest.fixture(params=KINDS)
def small_store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    run = write_run(
        tmp_path, shapes=SHAPES, metrics=True, buffers=True, extras=False, **KINDS[request.param]
    )
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    assert {p.encoding for p in store.layout.parts} == {"fixed", request.param}
    return tmp_path / "s.zarr"


# -- damage ----------------------------------------------------------------------------------------


def observe(path: Path) -> dict[str, Any]:
    """Everything that a user can learn from a store, after ``verify``."""
    store = TrajectoryStore(path)
    store.verify()
    state = {
        f"{part} at {row}": store.read_state(part, row, 0, spec.numel).tobytes()
        for part, spec in enumerate(store.layout.parts)
        for row in range(-1, len(store.steps))
    }
    metrics = {name: values.tobytes() for name, values in store.metrics().items()}
    return {
        "steps": store.steps.tolist(),
        "layout": store.layout,
        "state": state,
        "metrics": metrics,
        "files": store.files(),
        "attributes": store.attributes,
        "exact": store.exact,
    }


def verdict(path: Path, intact: dict[str, Any]) -> str | None:
    """What went wrong with a damaged store; None if it was refused in one line or is provably
    unaffected.
    """
    try:
        seen = observe(path)
    except StoreError as error:
        return (
            None
            if str(path) in str(error) and "\n" not in str(error)
            else f"unclear message: {error}"
        )
    except Exception as error:
        return f"{type(error).__name__} instead of StoreError: {error}"
    different = [key for key in intact if seen[key] != intact[key]]
    return f"silently wrong: {', '.join(different)}" if different else None


def files_of(store: Path) -> list[Path]:
    found = sorted(p for p in store.rglob("*") if p.is_file())
    assert len(found) > 20
    return found


@contextlib.contextmanager
def put_back(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    yield content
    path.write_bytes(content)


def positions(place: int, path: Path, length: int, *, thorough: bool) -> list[int]:
    """Where the file with this number is damaged."""
    if thorough and path.name == "zarr.json":
        return list(range(length))
    random = np.random.default_rng(len(str(path)))
    ends = [0, length // 2, length - 1]
    chosen = random.integers(0, length, 10 if thorough else 1).tolist()
    return sorted({*(ends if thorough else [ends[place % 3]]), *chosen})


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_any_file_is_refused_or_changes_nothing(
    small_store: Path, thorough: bool
) -> None:
    intact, problems = observe(small_store), []
    for place, path in enumerate(files_of(small_store)):
        with put_back(path) as content:
            for position in positions(place, path, len(content), thorough=thorough):
                flipped = bytearray(content)
                flipped[position] ^= 1 << (position % 7)
                path.write_bytes(flipped)
                problem = verdict(small_store, intact)
                if problem:
                    problems.append(f"{path.relative_to(small_store)}[{position}]: {problem}")
    assert not problems, "\n".join(problems)


def test_a_deleted_file_is_refused_or_changes_nothing(small_store: Path) -> None:
    """A deleted chunk reads as a fill value in Zarr: a step must not turn into zeros."""
    intact, problems = observe(small_store), []
    for path in files_of(small_store):
        with put_back(path):
            path.unlink()
            problem = verdict(small_store, intact)
        if problem:
            problems.append(f"{path.relative_to(small_store)} deleted: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_truncated_file_is_refused_or_changes_nothing(small_store: Path, thorough: bool) -> None:
    intact, problems = observe(small_store), []
    for place, path in enumerate(files_of(small_store)):
        with put_back(path) as content:
            lengths = (0, len(content) // 2, len(content) - 1)
            for length in lengths if thorough else (lengths[place % 3],):
                path.write_bytes(content[:length])
                problem = verdict(small_store, intact)
                if problem:
                    problems.append(
                        f"{path.relative_to(small_store)} cut to {length} bytes: {problem}"
                    )
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("kind", "array"),
    [("sparse", "updates/{}/data"), ("exact", "deltas/{}"), ("float", "deltas/{}")],
)
def test_a_damaged_chunk_names_step_and_tensor_and_other_steps_stay_readable(
    tmp_path: Path, kind: str, array: str
) -> None:
    run = write_run(tmp_path, shapes=SHAPES, extras=False, **KINDS[kind])
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    folder = tmp_path / "s.zarr" / array.format(0) / "c" / "1"
    path = folder / "0"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    numel = store.layout.parts[0].numel
    store = TrajectoryStore(tmp_path / "s.zarr")
    store.read_state(0, 0, 0, numel)
    for read in (store.verify, lambda: store.read_state(0, 1, 0, numel)):
        with pytest.raises(
            StoreError, match=r"s\.zarr: step 4, tensor 'model\..*'.*restore the store from a copy"
        ):
            read()
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match=r"s\.zarr: step 4, tensor 'model\..*'"):
        TrajectoryStore(tmp_path / "s.zarr").read_state(0, 1, 0, numel)


def test_chunks_of_two_steps_that_were_swapped_are_noticed(small_store: Path) -> None:
    """Every chunk is intact, only its place is wrong: the checksum of the content must tell."""
    arrays = [p for p in small_store.rglob("c") if (p / "0").is_dir() and (p / "1").is_dir()]
    swapped = 0
    for array in arrays:
        pair = [sorted((p.name, p.read_bytes()) for p in (array / row).iterdir()) for row in "01"]
        if pair[0] == pair[1]:
            continue  # as many changes in both steps: the same index
        swapped += 1
        for source, target in (("0", "x"), ("1", "0"), ("x", "1")):
            (array / source).rename(array / target)
        with pytest.raises(StoreError):
            TrajectoryStore(small_store).verify()
        for source, target in (("0", "x"), ("1", "0"), ("x", "1")):
            (array / source).rename(array / target)
    assert swapped
    TrajectoryStore(small_store).verify()


# -- opening ---------------------------------------------------------------------------------------


def test_what_is_no_store_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    zarr.create_group(str(tmp_path / "group"))
    zarr.create_array(str(tmp_path / "array"), shape=(3,), dtype="int8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{")
    for name, message in [
        ("nothing", "no such store; expected a folder written by `relexkit import`"),
        ("file", "no such store"),
        ("folder", "is not a trajectory store"),
        ("group", "is a Zarr group but not a trajectory store"),
        ("array", "array: is not a"),
        ("broken", "is not a readable Zarr group .*restore the store from a copy"),
    ]:
        with pytest.raises(StoreError, match=f"{name}: .*{message}|{message}"):
            TrajectoryStore(tmp_path / name)


def test_an_interrupted_creation_is_refused_and_the_same_import_completes_it(
    bfloat16_run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "s.zarr"
    import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base, steps=":2")
    document = json.loads((out / "zarr.json").read_text())
    document["attributes"]["relexkit"]["state"] = "creating"
    (out / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(
        StoreError, match="its creation was interrupted; run the same `relexkit import` again"
    ):
        TrajectoryStore(out)
    store = import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base).store
    assert store.steps.tolist() == bfloat16_run.steps
    store.verify()


def test_a_step_that_is_not_recorded_is_refused(bfloat16_store: TrajectoryStore) -> None:
    assert [bfloat16_store.row_of(s) for s in (1, 2, 3, 5, 9)] == [0, 1, 2, 3, 4]
    with pytest.raises(
        StoreError, match=r"step 4 is not recorded in .*; it holds 5 steps from 1 to 9"
    ):
        bfloat16_store.row_of(4)


def count_opened_files(path: Path) -> int:
    """Files below ``path`` that opening a store opens, counted by the interpreter's audit events in
    a new process.
    """
    script = (
        "import sys\nfrom relexkit import TrajectoryStore\nopened = []\ndef hook(event,"
        " arguments):\n    if event == 'open' and str(arguments[0]).startswith(sys.argv[1]):"
        " opened.append(arguments[0])\nsys.addaudithook(hook)\nstore ="
        " TrajectoryStore(sys.argv[1])\nprint(len(store.steps), len(opened))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    return int(result.stdout.split()[1])


def test_opening_a_store_of_a_thousand_steps_reads_as_few_files_as_one_of_five(
    bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    shutil.copytree(bfloat16_store.path, tmp_path / "long.zarr")
    steps = zarr.open_group(str(tmp_path / "long.zarr"), mode="r+")["steps"]
    assert isinstance(steps, zarr.Array)
    steps.resize((1024,))
    steps[:1000] = np.arange(1, 1001)
    assert len(TrajectoryStore(tmp_path / "long.zarr").steps) == 1000
    few = count_opened_files(Path(bfloat16_store.path))
    assert 0 < few <= 10
    assert count_opened_files(tmp_path / "long.zarr") == few


# -- writing ---------------------------------------------------------------------------------------


def test_readers_see_committed_steps_only(bfloat16_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    early = import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base, steps=":1").store
    part = next(i for i, p in enumerate(early.layout.parts) if p.encoding == "sparse")
    numel = early.layout.parts[part].numel
    before = early.read_state(part, 0, 0, numel)
    with StoreWriter(out) as writer:
        writer.begin(7)
        writer.write_sparse(part, np.array([3, numel - 1]), np.array([1, -5], np.int16), 0)
        assert TrajectoryStore(out).steps.tolist() == [1]
        writer.commit({"reward": 2.0})
        assert early.steps.tolist() == [1]
        np.testing.assert_array_equal(early.read_state(part, 0, 0, numel), before)
        late = TrajectoryStore(out)
        assert late.steps.tolist() == [1, 7]
        early.refresh()
        assert early.steps.tolist() == [1, 7]
        expected = before.copy()
        expected[3] += 1
        expected[numel - 1] -= 5
        np.testing.assert_array_equal(late.read_state(part, 1, 0, numel), expected)
        for step in (7, 6, 0, -1):
            with pytest.raises(
                StoreError, match=f"step {step} cannot be recorded after step 7: steps go upwards"
            ):
                writer.begin(step)


def test_an_uncommitted_step_leaves_nothing_in_the_next_one(
    bfloat16_run: Run, tmp_path: Path
) -> None:
    """A longer update than the final one, left by a crash in the same row, must not show
    through.
    """
    out = tmp_path / "s.zarr"
    store = import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base, steps=":2").store
    part = next(i for i, p in enumerate(store.layout.parts) if p.encoding == "sparse")
    numel = store.layout.parts[part].numel
    with StoreWriter(out) as writer:
        writer.begin(8)
        writer.write_sparse(part, np.arange(numel), np.full(numel, 9, np.int16), 1)
    store = import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base).store
    assert store.steps.tolist() == bfloat16_run.steps
    store.verify()


HOLD_LOCK = (
    "import sys\nfrom relexkit.store import WriterLock\nlock = WriterLock(sys.argv[1])\n"
    "print('locked', flush=True)\nsys.stdin.read()\n"
)


def test_another_process_that_writes_is_named_and_its_death_frees_the_store(
    bfloat16_run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "s.zarr"
    import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base, steps=":2")
    command = [sys.executable, "-c", HOLD_LOCK, str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(
            StoreError,
            match=(
                rf"s\.zarr: is being written by process {owner.pid} of .* on .*; wait until it ends"
            ),
        ):
            import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base)
        assert TrajectoryStore(out).steps.tolist() == [1, 2]  # readers do not care
        os.kill(owner.pid, signal.SIGKILL)
    assert import_checkpoints(bfloat16_run.source, out, base=bfloat16_run.base).added == [3, 5, 9]


# -- helpers ---------------------------------------------------------------------------------------


def test_blocks_cover_every_column_once() -> None:
    for numel in (0, 1, BLOCK, BLOCK + 1, 5 * BLOCK - 1):
        spans = list(blocks(numel, 2 * BLOCK))
        assert [c for a, b in spans for c in (a, b)][1:-1] == [
            c for a, _ in spans[1:] for c in (a, a)
        ]
        assert sum(b - a for a, b in spans) == numel


@pytest.mark.parametrize("seed", range(20))
def test_windows_cover_every_column_once_within_their_bounds(seed: int) -> None:
    random = np.random.default_rng(seed)
    numel = int(random.integers(0, 9 * BLOCK))
    entries = random.integers(0, 50, -(-numel // BLOCK))
    most_entries, most_columns = int(random.integers(0, 120)), int(random.integers(1, 5)) * BLOCK
    windows = list(column_windows(entries, numel, most_entries, most_columns))
    covered = [c for begin, end in windows for c in range(begin // BLOCK, -(-end // BLOCK))]
    assert covered == list(range(len(entries)))
    assert sum(end - begin for begin, end in windows) == numel
    for begin, end in windows:
        inside = entries[begin // BLOCK : -(-end // BLOCK)]
        assert len(inside) == 1 or (inside.sum() <= most_entries and end - begin <= most_columns)


@pytest.mark.parametrize(
    ("steps", "words"), [([], "no steps"), ([4], "only step 4"), ([1, 2, 9], "3 steps from 1 to 9")]
)
def test_steps_in_words(steps: list[int], words: str) -> None:
    assert describe_steps(np.array(steps, np.int64)) == words


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "model.safetensors", "relexkit.json", "pytorch_model.bin", ""]
)
def test_a_store_cannot_write_files_of_its_own_choice(
    name: str, bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    """What a store calls a file becomes a path when a checkpoint is written."""
    store = TrajectoryStore(shutil.copytree(bfloat16_store.path, tmp_path / "s.zarr"))
    store.attributes["files"] = [name]
    with pytest.raises(StoreError, match="holds a file named"):
        store.files()


def test_a_step_with_a_part_missing_is_not_committed(
    bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    path = shutil.copytree(bfloat16_store.path, tmp_path / "s.zarr")
    with StoreWriter(path) as writer:
        writer.begin(100)
        with pytest.raises(StoreError, match="step 100 lacks parts"):
            writer.commit()
    assert 100 not in TrajectoryStore(path).steps


def test_a_member_that_outlives_its_leader_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    store_of(path, {"w": np.ones((1, 3))}, np.array([1]))
    with StoreWriter(path) as leader, StoreWriter(path, member=True) as member:
        leader.close()  # as its death would
        with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} of"):
            StoreWriter(path)
        member.close()
        StoreWriter(path).close()
    (tmp_path / "s.zarr.member-0.lock").touch()  # of one that was killed
    StoreWriter(path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]
