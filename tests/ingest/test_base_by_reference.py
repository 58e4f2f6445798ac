"""A base by reference: every answer is that of a store which holds its base, or one line says what
is wrong with the base.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import EMBEDDING, HEAD, Run, store_content, write_checkpoint, write_run
from safetensors.torch import load_file, save_file
from test_importer import check_lossless
from versions import write_versions

from relexkit import (
    CheckpointError,
    Prediction,
    StoreError,
    TrajectoryStore,
    checkout,
    extrapolate,
    gram,
    import_checkpoints,
    linearity,
    verify,
    watch,
)
from relexkit.cli import main
from relexkit.ingest.estimate import estimate_import
from relexkit.ingest.reading import Reading
from relexkit.store.codecs import BASE_CHUNK
from relexkit.store.reference import VARIABLE

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16", "head": "tied", "buffers": True, "metrics": True},
    "own head": {"dtype": "bfloat16", "head": "own", "density": 1.0},
    "float32": {"dtype": "float32", "density": 1.0},
    "widened": {"dtype": "float32", "base_dtype": "bfloat16"},
    "sharded": {"dtype": "float16", "layout": "sharded"},
    "pickled": {"dtype": "bfloat16", "layout": "sharded-bin", "head": "tied"},
}


def both(folder: Path, **options: Any) -> tuple[Run, TrajectoryStore, TrajectoryStore]:
    """A run, its store, and its store with the base by reference."""
    run = write_run(folder, **options)
    whole = import_checkpoints(run.source, folder / "whole.zarr", base=run.base).store
    lean = import_checkpoints(
        run.source, folder / "lean.zarr", base=run.base, base_by_reference=True
    ).store
    return run, whole, lean


def same_files(first: Path, second: Path) -> None:
    files = sorted(p.name for p in first.iterdir())
    assert sorted(p.name for p in second.iterdir()) == files
    for name in files:
        if name.endswith(".safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_that_of_a_store_with_its_base(tmp_path: Path, kind: str) -> None:
    run, whole, lean = both(tmp_path, motion="drift", steps=[1, 2, 5], **KINDS[kind])
    assert whole.attributes["format_version"] == 1
    assert lean.attributes["format_version"] == 3
    assert lean.reference is not None
    assert lean.reference.place == str(run.base)
    assert "base" not in lean.num_bytes()
    kept = ("format_version", "base_reference", "checksum")
    about = [{k: v for k, v in s.attributes.items() if k not in kept} for s in (whole, lean)]
    assert about[0] == about[1]
    verify(lean)
    if lean.exact:
        check_lossless(lean, run)
    for part, spec in enumerate(whole.layout.parts):
        for begin, end in [(0, spec.numel), (min(5, spec.numel), min(6, spec.numel))]:
            bits = lean.read_base(part, begin, end)
            np.testing.assert_array_equal(bits, whole.read_base(part, begin, end))
            assert bits.flags.writeable
    np.testing.assert_array_equal(gram(lean).matrices, gram(whole).matrices)
    assert linearity(lean).to_frame().equals(linearity(whole).to_frame())
    for store in (whole, lean):
        out = Path(f"{store.path}.out")
        for step in (0, run.steps[-1]):
            checkout(store, step, out / str(step))
        extrapolate(store, [20], out / "predicted", Prediction(method="average"))
    for written in ("0", str(run.steps[-1]), "predicted/step-20"):
        same_files(tmp_path / "whole.zarr.out" / written, tmp_path / "lean.zarr.out" / written)


def test_blocks_of_several_parts_are_compared_with_their_own_checksums(tmp_path: Path) -> None:
    """Tensors across the borders of blocks, in parts of two dtypes."""
    shapes = {"a": (BASE_CHUNK + 7,), "b": (BASE_CHUNK, 2), "c": (3,), "d": (BASE_CHUNK // 2 + 1,)}
    options = {"shapes": shapes, "dtypes": {"b": "float32"}, "steps": [1], "density": 1e-5}
    _, whole, lean = both(tmp_path, extras=False, **options)
    assert len(whole.layout.parts) == 2
    for part, spec in enumerate(whole.layout.parts):
        for begin, end in [(0, spec.numel), (BASE_CHUNK - 2, BASE_CHUNK + 2), (3, 3)]:
            np.testing.assert_array_equal(
                lean.read_base(part, begin, end), whole.read_base(part, begin, end)
            )
    verify(lean)
    assert sum(lean.num_bytes().values()) < 200_000 < sum(whole.num_bytes().values())


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_bit, r"differs at .*/base, in or near tensor '.*'; expected the base with sha256"),
        (lambda t: t.pop("model.norm.weight"), "has no tensor at .*/base that is 'model.norm.wei"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7, dtype=torch.bfloat16)}),
            "has no tensor at .*/base that is 'model.norm.weight'",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int16)}),
            "has int16 at .*/base for 'model.norm.weight'",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float32)}),
            r"cannot be read at .*/base \(cannot widen float32 to bfloat16",
        ),
    ],
)
def test_a_base_that_differs_is_refused_by_every_read(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    run, _, lean = both(tmp_path, dtype="bfloat16")
    spoil(run.base, change)
    fresh = TrajectoryStore(lean.path)  # opens, since nothing of the base is read
    asks: list[Callable[[], object]] = [
        lambda: fresh.read_base(0, 0, fresh.layout.parts[0].numel),
        lambda: verify(fresh),
        lambda: checkout(fresh, 1, tmp_path / "out"),
        lambda: extrapolate(fresh, [20], tmp_path / "out", Prediction(method="average")),
    ]
    for ask in asks:
        with pytest.raises(StoreError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert f"set {VARIABLE} to where it is now" in str(caught.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_base_that_moved_is_found_by_the_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, lean = both(tmp_path, dtype="bfloat16")
    run.base.rename(tmp_path / "elsewhere")
    assert main(["verify", lean.path]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"cannot be read at {run.base} ({run.base}: no such folder" in line
    assert f"set {VARIABLE} to where it is now" in line
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert main(["verify", lean.path]) == 0
    check_lossless(TrajectoryStore(lean.path), run)
    monkeypatch.setenv(VARIABLE, str(run.folders[9]))
    with pytest.raises(StoreError, match=f"differs at {run.folders[9]}, in or near tensor"):
        verify(lean.path)


def test_a_base_that_changes_while_a_store_is_open_is_refused(tmp_path: Path) -> None:
    run, whole, lean = both(tmp_path, dtype="bfloat16")
    lean.read_base(0, 0, 10)
    path = run.base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    with pytest.raises(StoreError, match="differs at"):
        lean.read_base(0, 0, whole.layout.parts[0].numel)
    os.truncate(path, 3000)
    with pytest.raises(StoreError, match="ends inside tensor"):
        lean.read_base(0, 0, whole.layout.parts[0].numel)


def test_damage_to_the_checksums_is_no_change_of_the_base(tmp_path: Path) -> None:
    _, _, lean = both(tmp_path, dtype="bfloat16")
    [chunk] = (Path(lean.path) / "base-checksums" / "c").iterdir()
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match="checksums of the base: cannot be read"):
        verify(lean.path)
    chunk.unlink()
    with pytest.raises(StoreError, match=r"checksums of the base: cannot be read \(a chunk is mis"):
        verify(lean.path)
    shutil.rmtree(Path(lean.path) / "base-checksums")
    with pytest.raises(StoreError, match=r"description of base-checksums .* is damaged"):
        verify(lean.path)


def test_an_import_goes_on_and_starts_over(tmp_path: Path) -> None:
    run = write_run(tmp_path, dtype="bfloat16", head="tied")
    options = {"base": run.base, "base_by_reference": True}
    whole = import_checkpoints(run.source, tmp_path / "whole.zarr", **options).store
    parts = tmp_path / "parts.zarr"
    import_checkpoints(run.source, parts, steps=":2", **options)
    document = json.loads((parts / "zarr.json").read_text())
    document["attributes"]["relexkit"]["state"] = "creating"  # as a kill leaves it
    (parts / "zarr.json").write_text(json.dumps(document))
    import_checkpoints(run.source, parts, steps=":2", **options)
    result = import_checkpoints(run.source, parts, base=run.base)  # as it was begun
    assert (result.added, result.already) == ([3, 5, 9], [1, 2])
    check_lossless(result.store, run)
    assert store_content(parts) == store_content(Path(whole.path))


def test_what_cannot_be_a_reference_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, dtype="bfloat16")
    import_checkpoints(run.source, tmp_path / "whole.zarr", base=run.base)
    with pytest.raises(CheckpointError, match="holds its base; leave --base-by-reference out"):
        import_checkpoints(
            run.source, tmp_path / "whole.zarr", base=run.base, base_by_reference=True
        )
    inside = write_run(tmp_path / "inside", dtype="bfloat16", base="step0")
    for refused in (
        lambda: import_checkpoints(inside.source, tmp_path / "s.zarr", base_by_reference=True),
        lambda: estimate_import(inside.source, reading=Reading(base_by_reference=True)),
    ):
        with pytest.raises(CheckpointError, match="its step 0 is the base, and --base-by-refer"):
            refused()
    assert not (tmp_path / "s.zarr").exists()
    options = {"base": inside.folders[0], "base_by_reference": True}
    check_lossless(import_checkpoints(inside.source, tmp_path / "s.zarr", **options).store, inside)


def test_an_older_release_says_that_the_version_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, lean = both(tmp_path, dtype="bfloat16")
    monkeypatch.setattr("relexkit.store.opening.FORMAT_VERSION", 2)
    with pytest.raises(StoreError, match="has format version 3; this relexkit reads versions"):
        TrajectoryStore(lean.path)


def test_the_command_and_info_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, dtype="bfloat16", head="tied")
    out, base = tmp_path / "s.zarr", str(run.base)
    given = ["import", str(run.source), "-o", str(out), "--base", base, "--base-by-reference"]
    assert main([*given, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base_bytes"] == 0
    assert main(given) == 0
    size = sum(t.nbytes for n, t in run.weights[0].items() if n != HEAD)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"base by reference, {size / 1000:.3g} kB not held" in shown
    assert "checked by its checksums" in shown
    assert main(["info", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["base_reference"], document["base_bytes"]) == (base, size)
    assert "base" not in document["bytes"]


def test_deltas_and_a_watched_folder_may_refer_to_their_base(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=[1, 2, 3], dtype="bfloat16", extras=False)
    options = {"base": run.base, "base_by_reference": True}
    sync = write_versions(tmp_path / "sync", run)
    stores = [
        import_checkpoints(sync, tmp_path / "sync.zarr", **options).store,
        watch(
            shutil.copytree(run.source, tmp_path / "watched"),
            tmp_path / "watched.zarr",
            delete_after=True,
            poll_seconds=0.01,
            idle_seconds=0.2,
            **options,
        ),
    ]
    for store in stores:
        assert store.reference is not None
        assert store.steps.tolist() == run.steps
        check_lossless(TrajectoryStore(store.path), run)
    assert len(list((tmp_path / "watched").iterdir())) == 1


def test_names_and_slices_of_another_base_are_kept(tmp_path: Path) -> None:
    """A base without the head and without the prefix of the steps' names."""
    run = write_run(tmp_path, dtype="bfloat16", head="tied")
    bare = {n.removeprefix("model."): t for n, t in run.weights[0].items() if n != HEAD}
    shutil.rmtree(run.base)
    write_checkpoint(run.base, bare)
    store = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, base_by_reference=True
    ).store
    assert store.reference is not None
    assert store.reference.tensors[EMBEDDING] == (EMBEDDING.removeprefix("model."), 0)
    check_lossless(TrajectoryStore(store.path), run)
