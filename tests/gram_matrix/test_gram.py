"""Gram matrices of stores against ``M M^T`` in float64 from the tensors that were written."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from runs import EMBEDDING, HEAD, Run, Weights, raw_bits, write_checkpoint, write_run

from relexkit import Gram, RelexkitError, StoreError, TrajectoryStore, gram, import_checkpoints
from relexkit.geometry.shape import update_cosines
from relexkit.gram_matrix.exact import _OuterProducts, gram_of_columns
from relexkit.store import WriterLock, blocks, kept
from relexkit.store.encodings.table import ENCODINGS
from relexkit.weights.dtypes import round_to_mantissa_bits

TOLERANCE = 1e-6
"""Products of at most 8192 columns are added in float32, the sums in float64: about 1e-7 of the
norms.
"""

BIG = {
    EMBEDDING: (700, 301),
    "model.layers.0.mlp.up_proj.weight": (3, 5),
    "model.norm.weight": (97,),
}
"""210,700 elements: four blocks of the log, so that a small budget really cuts the work."""


def imported(run: Run, path: Path, **options: Any) -> TrajectoryStore:
    return import_checkpoints(run.source, path, base=run.base, **options).store


def encodings(store: TrajectoryStore) -> set[str]:
    return {part.encoding for part in store.layout.parts if part.encoding != "fixed"}


def deltas_of(run: Run, name: str, mantissa_bits: int | None = None) -> np.ndarray:
    """``M`` float64 ``[T, D]`` from the raw tensors; rounded to the mantissa bits of a float store
    if given.
    """
    rows = np.stack([run.delta(step, name) for step in run.steps])
    if mantissa_bits is not None:
        flat = np.ascontiguousarray(rows.astype(np.float32).reshape(-1))
        rows = round_to_mantissa_bits(flat, mantissa_bits).astype(np.float64).reshape(rows.shape)
    return rows


def assert_equal_to_direct(found: Gram, run: Run, mantissa_bits: int | None = None) -> None:
    assert found.steps.tolist() == run.steps
    moving = [n for n, t in run.weights[0].items() if t.is_floating_point()]
    for row, name in enumerate(found.names):
        deltas = deltas_of(run, name, mantissa_bits)
        norms = np.linalg.norm(deltas, axis=1)
        error = np.abs(found.matrices[row] - deltas @ deltas.T)
        assert (error <= TOLERANCE * np.outer(norms, norms)).all(), name
        assert found.num_parameters[row] == run.weights[0][name].numel()
        moving.remove(name)
    assert set(moving) <= {HEAD}
    np.testing.assert_array_equal(found.matrices, found.matrices.transpose(0, 2, 1))


def assert_counts_are_direct(found: Gram, run: Run, *, bitwise: bool) -> None:
    for row, name in enumerate(found.names):
        tensors = [run.weights[s][name] for s in [0, *run.steps]]
        if bitwise:
            table = np.stack([raw_bits(t).astype(np.int64) for t in tensors])
            unit = (np.abs(np.diff(table, axis=0)) == 1).sum(axis=1)
        else:
            table = np.stack([t.reshape(-1).double().numpy() for t in tensors])
            unit = np.full(len(run.steps), -1)
        np.testing.assert_array_equal(found.changed[row], (np.diff(table, axis=0) != 0).sum(axis=1))
        np.testing.assert_array_equal(found.moved[row], (table[1:] != table[0]).sum(axis=1))
        np.testing.assert_array_equal(found.unit_moves[row], unit)


def oscillating_run(folder: Path) -> Run:
    """Bfloat16 weights that go to and fro, revert exactly, and rest for a step."""
    random = np.random.default_rng(4)
    base = {
        n: torch.from_numpy(random.standard_normal(s)).to(torch.bfloat16) for n, s in BIG.items()
    }
    weights: dict[int, Weights] = {0: base}
    jump = torch.tensor(2.0**-6, dtype=torch.bfloat16)
    chosen = {n: torch.from_numpy(random.random(t.shape) < 0.01) for n, t in base.items()}
    other = {n: torch.where(chosen[n], t + jump, t) for n, t in base.items()}
    for step, state in {3: other, 4: base, 10: other, 11: other, 30: base, 31: other}.items():
        weights[step] = {n: t.clone() for n, t in state.items()}
        weights[step]["model.norm.weight"][step % 7] += (
            0.25  # another weight at each step, back to the base at the next
        )
    return written(folder, weights)


def written(folder: Path, weights: Mapping[int, Weights]) -> Run:
    folders = {step: folder / ("base" if step == 0 else f"run/step_{step}") for step in weights}
    for step, tensors in weights.items():
        write_checkpoint(folders[step], tensors)
    return Run(folder / "run", folder / "base", dict(weights), folders)


def test_sparse_log(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        motion="drift",
        density=0.05,
        steps=(2, 3, 7, 8, 40),
        head="tied",
        buffers=True,
        seed=3,
    )
    store = imported(run, tmp_path / "run.zarr")
    assert encodings(store) == {"sparse"}
    found = gram(store)
    assert HEAD not in found.names
    assert_equal_to_direct(found, run)
    assert_counts_are_direct(found, run, bitwise=True)


def test_sparse_counts_of_sign_flips_and_subnormals(
    bfloat16_run: Run, bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    shutil.copytree(bfloat16_store.path, tmp_path / "copy.zarr")
    found = gram(TrajectoryStore(tmp_path / "copy.zarr"))
    assert_counts_are_direct(found, bfloat16_run, bitwise=True)


def test_deltas_beyond_the_root_of_the_float32_range(tmp_path: Path) -> None:
    """A finite weight that jumps by 1e30 squares to 1e60: large for float32, nothing for
    float64.
    """
    base = {
        "a.weight": torch.zeros(40, dtype=torch.bfloat16),
        "b.weight": torch.zeros(40, dtype=torch.float32),
    }
    weights: dict[int, Weights] = {0: base}
    for step in (1, 2):
        weights[step] = {n: t.clone() for n, t in base.items()}
        weights[step]["a.weight"][step] = 1e30
        weights[step]["b.weight"][:] = 1e-30 * step
    run = written(tmp_path, weights)
    assert_equal_to_direct(gram(imported(run, tmp_path / "run.zarr", encoding="exact")), run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exact_rows(dtype: str, tmp_path: Path) -> None:
    run = write_run(
        tmp_path, dtype=dtype, motion="drift", density=1.0, steps=(1, 4, 5, 60), head="own", seed=5
    )
    store = imported(run, tmp_path / "run.zarr", encoding="exact")
    assert encodings(store) == {"exact"}
    found = gram(store)
    assert_equal_to_direct(found, run)
    assert_counts_are_direct(found, run, bitwise=False)


@pytest.mark.parametrize(
    ("encoding", "shape"),
    [
        ("dense", (160,)),
        ("sparse", (300, 400)),
        pytest.param("dense", (300, 400), marks=pytest.mark.slow),
        pytest.param("sparse", (160,), marks=pytest.mark.slow),
    ],
)
def test_updates_of_a_long_line_keep_their_products(
    encoding: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    # the square of an update is about 1/11000 of that of the last delta
    rng = np.random.default_rng(0)
    base, line = rng.normal(size=shape), rng.normal(size=shape)
    bits = {"dense": torch.float32, "sparse": torch.bfloat16}[encoding]
    weights, path = {}, base.copy()
    for step in range(151):
        weights[step] = {HEAD: torch.from_numpy(path).to(bits)}
        path = path + 1e-4 * (line + rng.normal(size=shape))
    run = written(tmp_path, weights)
    store = imported(run, tmp_path / "run.zarr")
    found = gram(store)
    deltas = deltas_of(run, HEAD, store.mantissa_bits if encoding == "dense" else None)
    updates = np.diff(deltas, axis=0, prepend=0)
    norms = np.linalg.norm(updates, axis=1)
    expected = (updates[1:] * updates[:-1]).sum(axis=1) / (norms[1:] * norms[:-1])
    assert np.abs(update_cosines(found.matrices[0]) - expected).max() < 1e-5


@pytest.mark.parametrize("mantissa_bits", [4, 10, 23])
def test_float_rows_equal_the_gram_of_the_rounded_deltas(
    mantissa_bits: int, tmp_path: Path
) -> None:
    run = write_run(
        tmp_path, dtype="float32", motion="drift", density=1.0, steps=(1, 4, 5, 60), seed=6
    )
    store = imported(run, tmp_path / "run.zarr", encoding="float", mantissa_bits=mantissa_bits)
    assert encodings(store) == {"float"}
    assert_equal_to_direct(gram(store), run, mantissa_bits)


def test_mixed_dtypes_frozen_tensors_and_a_tensor_without_elements(tmp_path: Path) -> None:
    still, other = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    run = write_run(
        tmp_path,
        motion="drift",
        density=0.05,
        dtypes={other: "float32", still: "float16"},
        frozen=[still],
        seed=7,
    )
    store = imported(run, tmp_path / "run.zarr")
    found = gram(store)
    assert_equal_to_direct(found, run, None)
    row = found.names.index(still)
    assert not found.matrices[row].any()
    assert not found.changed[row].any()
    assert found.num_parameters.sum() == store.layout.num_parameters


@pytest.mark.parametrize("encoding", ["auto", "float"])
def test_one_step_and_steps_that_change_nothing(encoding: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", motion="drift", density=0.05, steps=(9,), seed=8)
    found = gram(imported(run, tmp_path / "one.zarr", encoding=encoding))
    assert found.matrices.shape[1:] == (1, 1)
    assert_equal_to_direct(found, run, 10 if encoding == "float" else None)

    run = write_run(tmp_path / "zero", density=0.0, steps=(1, 5))
    found = gram(imported(run, tmp_path / "zero.zarr", encoding=encoding))
    assert not found.matrices.any()
    assert not found.changed.any()
    assert not found.moved.any()


def test_changes_that_revert(tmp_path: Path) -> None:
    run = oscillating_run(tmp_path)
    store = imported(run, tmp_path / "run.zarr")
    assert encodings(store) == {"sparse"}
    found = gram(store)
    assert_equal_to_direct(found, run)
    assert_counts_are_direct(found, run, bitwise=True)
    assert found.moved[0, 1] == 0
    assert found.moved[0, 0] > 0


@pytest.mark.parametrize("encoding", ["sparse", "exact", "float"])
def test_parts_that_cut_tensors_and_budgets_that_cut_parts(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, asked = {
        "sparse": ("bfloat16", "auto"),
        "exact": ("float32", "exact"),
        "float": ("float32", "float"),
    }[encoding]
    density = 0.03 if encoding == "sparse" else 1.0
    run = write_run(
        tmp_path,
        dtype=dtype,
        motion="drift",
        density=density,
        shapes=BIG,
        steps=(1, 2, 30, 31),
        seed=9,
    )
    whole = imported(run, tmp_path / "whole.zarr", encoding=asked)
    for kind in ENCODINGS.values():
        monkeypatch.setattr(kind, "part_numel", 70_001)
    cut = imported(run, tmp_path / "cut.zarr", encoding=asked)
    assert encodings(whole) == encodings(cut) == {encoding}
    assert len(whole.layout.parts) == 1
    assert len(cut.layout.parts) == 4
    bits = 10 if encoding == "float" else None
    for store in (whole, cut):
        for budget in (1, 2**18, 2**28):
            shutil.rmtree(Path(store.path, "gram"), ignore_errors=True)
            found = gram(TrajectoryStore(store.path), memory_budget_bytes=budget)
            assert_equal_to_direct(found, run, bits)
            if encoding != "float":  # rounding the deltas can make two steps equal
                assert_counts_are_direct(found, run, bitwise=encoding == "sparse")


@pytest.mark.parametrize("encoding", ["sparse", "exact", "float"])
@pytest.mark.parametrize("first", [1, 3])
def test_appended_steps_give_what_a_pass_from_scratch_gives(
    encoding: str, first: int, tmp_path: Path
) -> None:
    dtype, asked = {
        "sparse": ("bfloat16", "auto"),
        "exact": ("float32", "exact"),
        "float": ("float32", "float"),
    }[encoding]
    run = write_run(
        tmp_path,
        dtype=dtype,
        motion="drift",
        density=0.05 if encoding == "sparse" else 1.0,
        steps=(1, 2, 5, 6, 9, 30),
        seed=10,
    )
    some = run.steps[first - 1]
    growing = imported(run, tmp_path / "growing.zarr", encoding=asked, steps=f":{some}")
    assert gram(growing).steps.tolist() == run.steps[:first]
    growing = imported(run, tmp_path / "growing.zarr", encoding=asked, steps=":9")
    gram(growing)
    growing = imported(run, tmp_path / "growing.zarr", encoding=asked)
    found = gram(growing)
    scratch = gram(imported(run, tmp_path / "scratch.zarr", encoding=asked))
    assert_equal_to_direct(found, run, 10 if encoding == "float" else None)
    scale = np.sqrt(np.einsum("nii,njj->nij", scratch.matrices, scratch.matrices))
    assert (np.abs(found.matrices - scratch.matrices) <= TOLERANCE * scale).all()
    for name in ("changed", "moved", "unit_moves", "num_parameters"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scratch, name))


@pytest.mark.parametrize("encoding", ["auto", "exact", "float"])
def test_a_kept_result_is_used_without_reading_weights(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(
        tmp_path,
        motion="drift",
        density=0.05 if encoding == "auto" else 1.0,
        steps=(2, 3, 7),
        seed=11,
    )
    path = imported(run, tmp_path / "run.zarr", encoding=encoding).path
    first = gram(TrajectoryStore(path))

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    for name in ("read_update", "read_row", "read_base", "read_state"):
        monkeypatch.setattr(TrajectoryStore, name, refuse)
    again = gram(TrajectoryStore(path))
    for name in ("matrices", "changed", "moved", "unit_moves", "steps"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("encoding", ["auto", "float"])
def test_an_import_that_computes_the_matrices_leaves_nothing_to_read(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    density = 0.05 if encoding == "auto" else 1.0
    run = write_run(tmp_path, motion="drift", density=density, steps=(2, 3, 7), seed=11)
    expected = gram(imported(run, tmp_path / "plain.zarr", encoding=encoding))
    for steps in (":2", None):  # the second import adds to what the first has kept
        imported(run, tmp_path / "run.zarr", encoding=encoding, gram=True, steps=steps)

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    for name in ("read_update", "read_row", "read_base", "read_state"):
        monkeypatch.setattr(TrajectoryStore, name, refuse)
    found = gram(TrajectoryStore(tmp_path / "run.zarr"))
    scale = np.abs(expected.matrices).max()
    np.testing.assert_allclose(found.matrices, expected.matrices, rtol=0, atol=TOLERANCE * scale)
    for name in ("changed", "moved", "unit_moves", "steps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("encoding", ["auto", "float"])
def test_columns_computed_by_another_engine_add_up(encoding: str, tmp_path: Path) -> None:
    """As docs/performance.md shows it, on the threads of dask."""
    dask = pytest.importorskip("dask")
    density = 0.05 if encoding == "auto" else 1.0
    run = write_run(tmp_path, shapes=BIG, density=density, steps=(2, 3, 7), seed=11)
    store = imported(run, tmp_path / "run.zarr", encoding=encoding)

    @dask.delayed
    def of(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return gram_of_columns(TrajectoryStore(store.path), 0, span)

    spans = list(blocks(store.layout.parts[0].numel, 2**16))
    assert len(spans) > 2
    found = dask.compute(*map(of, spans), scheduler="threads")
    expected = gram(store)
    names = [s.tensor.name for s in store.layout.segments_in(0)]
    rows = [expected.names.index(name) for name in names]
    scale = np.abs(expected.matrices).max()
    np.testing.assert_allclose(
        sum(m for m, _ in found), expected.matrices[rows], rtol=0, atol=TOLERANCE * scale
    )
    np.testing.assert_array_equal(sum(c for _, c in found)[:, 0], expected.changed[rows])
    np.testing.assert_array_equal(sum(c for _, c in found)[:, 1], expected.moved[rows])


def test_matrices_of_many_tensors_lie_in_few_files_and_in_those_of_earlier_stores(
    fresh: tuple[Run, TrajectoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = fresh
    expected = gram(store)
    folder = Path(store.path) / "gram" / "0" / "matrices"
    assert len([p for p in (folder / "c").rglob("*") if p.is_file()]) == 1
    assert zarr.open_array(folder, mode="r").chunks[0] > 1
    store.verify()
    shutil.rmtree(Path(store.path) / "gram")
    monkeypatch.setattr(kept, "_grid", kept._grid_before)
    gram(store)
    monkeypatch.undo()
    assert zarr.open_array(folder, mode="r").chunks[0] == 1
    store.verify()
    np.testing.assert_array_equal(gram(TrajectoryStore(store.path)).matrices, expected.matrices)


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[Run, TrajectoryStore]:
    run = write_run(tmp_path, motion="drift", density=0.05, steps=(2, 3, 7), seed=11)
    return run, imported(run, tmp_path / "run.zarr")


def damage_attributes(path: Path) -> None:
    (path / "zarr.json").write_text("{")


def remove_attributes(path: Path) -> None:
    zarr.open_group(path, mode="r+").attrs.clear()


def flip_a_byte(path: Path) -> None:
    [chunk] = [p for p in (path / "matrices" / "c").rglob("*") if p.is_file()]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 0x10
    chunk.write_bytes(bytes(data))


def remove_chunk(path: Path) -> None:
    shutil.rmtree(path / "counts" / "c")


def other_version(path: Path) -> None:
    zarr.open_group(path, mode="r+").attrs["format_version"] = 99


def other_steps(path: Path) -> None:
    zarr.open_group(path, mode="r+").attrs["steps"] = [2, 3, 8]


@pytest.mark.parametrize(
    "damage",
    [damage_attributes, remove_attributes, flip_a_byte, remove_chunk, other_version, other_steps],
)
def test_a_damaged_or_stale_result_is_computed_again(
    fresh: tuple[Run, TrajectoryStore], damage: Any
) -> None:
    run, store = fresh
    gram(store)
    damage(Path(store.path, "gram", "0"))
    assert_equal_to_direct(gram(TrajectoryStore(store.path)), run)
    assert_equal_to_direct(gram(TrajectoryStore(store.path)), run)


def test_a_pass_killed_while_its_result_is_kept(
    fresh: tuple[Run, TrajectoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = fresh
    real = zarr.Group.create_array

    def killed(self: zarr.Group, name: str, **options: Any) -> Any:
        if name == "counts":
            raise KeyboardInterrupt
        return real(self, name, **options)

    monkeypatch.setattr(zarr.Group, "create_array", killed)
    with pytest.raises(KeyboardInterrupt):
        gram(store)
    monkeypatch.undo()
    assert TrajectoryStore(store.path).steps.tolist() == run.steps
    assert_equal_to_direct(gram(TrajectoryStore(store.path)), run)


def test_another_process_keeping_its_result_does_not_disturb(
    fresh: tuple[Run, TrajectoryStore],
) -> None:
    run, store = fresh
    with WriterLock(f"{store.path}.gram"):
        assert_equal_to_direct(gram(store), run)
        assert not Path(store.path, "gram").exists()
    with WriterLock(store.path):  # recording goes on meanwhile
        gram(store)
    assert Path(store.path, "gram", "0").exists()


def test_a_store_that_cannot_be_written_gives_the_result(
    fresh: tuple[Run, TrajectoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = fresh

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Group, "create_array", full)
    assert_equal_to_direct(gram(store), run)


def test_a_store_without_steps_says_so(fresh: tuple[Run, TrajectoryStore]) -> None:
    _, store = fresh
    store.steps = store.steps[:0]
    with pytest.raises(StoreError, match="holds no steps; import or record some first"):
        gram(store)


def test_scoped_sums_and_prefixes(fresh: tuple[Run, TrajectoryStore]) -> None:
    run, store = fresh
    whole = gram(store)
    everything = np.hstack([deltas_of(run, n) for n in whole.names])
    total = whole.scoped("global")
    np.testing.assert_allclose(total.matrices[0], everything @ everything.T, rtol=1e-5)
    assert total.num_parameters.tolist() == [everything.shape[1]]
    np.testing.assert_array_equal(total.moved[0], whole.moved.sum(axis=0))
    layers = whole.scoped("layer")
    assert sorted(layers.names) == ["embed_tokens", "empty", "layer 0", "layer 1", "norm", "scale"]
    inside = [n for n in whole.names if ".layers.1." in n]
    one = np.hstack([deltas_of(run, n) for n in inside])
    np.testing.assert_allclose(
        layers.matrices[layers.names.index("layer 1")], one @ one.T, rtol=1e-5
    )
    assert whole.groups("module").count("self_attn.q_proj") == 2
    assert whole.scoped("tensor") is whole

    short = whole.until(6)
    assert short.steps.tolist() == [2, 3]
    np.testing.assert_array_equal(short.matrices, whole.matrices[:, :2, :2])
    assert short.changed.shape == (len(whole.names), 2)
    assert whole.until(None) is whole
    assert whole.until(10**9).steps.tolist() == run.steps
    with pytest.raises(
        RelexkitError, match=r"--until 1 keeps no step; the store holds 3 steps from 2 to 7"
    ):
        whole.until(1)


def test_a_prefix_of_the_whole_is_the_whole_of_the_prefix(
    fresh: tuple[Run, TrajectoryStore],
) -> None:
    """Whichever is asked for first."""
    known = gram(fresh[1])
    step = int(known.steps[1])
    expected = known.matrices[:, :2, :2].sum(axis=0)
    np.testing.assert_array_equal(known.until(step).whole, expected)
    np.testing.assert_array_equal(known.whole[:2, :2], expected)
    np.testing.assert_array_equal(known.until(step).whole, expected)
    np.testing.assert_array_equal(known.until(step).scoped("global").matrices[0], expected)


def test_unit_moves_of_a_scope_are_unknown_if_one_member_is_unknown() -> None:
    counts = np.array([[3], [4], [5]])
    names = ("layers.0.a.weight", "layers.0.b.weight", "layers.1.a.weight")
    whole = Gram(
        np.array([1]),
        names,
        np.array([9, 9, 9]),
        np.ones((3, 1, 1)),
        counts,
        counts,
        np.array([[1], [-1], [2]]),
    )
    assert whole.scoped("layer").unit_moves.tolist() == [[-1], [2]]
    assert whole.scoped("layer").changed.tolist() == [[7], [5]]


@pytest.mark.parametrize("encoding", ["sparse", "float"])
def test_memory_does_not_grow_with_the_number_of_steps(encoding: str, tmp_path: Path) -> None:
    """With 2 MiB to work in, 20 steps need what 5 steps need (8.4 MB of float32 deltas against 34
    MB).
    """
    shapes = {EMBEDDING: (1000, 419)}
    dtype = "bfloat16" if encoding == "sparse" else "float32"
    peaks = []
    for count in (5, 20):
        steps = range(1, count + 1)
        run = write_run(
            tmp_path / str(count),
            dtype=dtype,
            motion="drift",
            density=0.1 if encoding == "sparse" else 1.0,
            shapes=shapes,
            steps=steps,
            extras=False,
        )
        store = imported(
            run, tmp_path / f"{count}.zarr", encoding="float" if encoding == "float" else "auto"
        )
        assert encodings(store) == {encoding}
        tracemalloc.start()
        gram(store, memory_budget_bytes=2**21)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 8 * 2**20


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_matrix_is_symmetric_though_a_product_and_its_transpose_round_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """As where another kernel computes the one than the other; whole and after an append."""
    product = _OuterProducts.product

    def uneven(self: _OuterProducts, rows: np.ndarray) -> list[np.ndarray]:
        [found] = product(self, rows)
        above = np.arange(found.shape[1]) > np.arange(self.old, len(rows))[:, None]
        return [np.where(above, np.nextafter(found, np.float32(np.inf)), found)]

    monkeypatch.setattr(_OuterProducts, "product", uneven)
    run = write_run(tmp_path, dtype=dtype, density=0.5, steps=range(1, 10))
    for first in (9, 4):
        out = tmp_path / f"{first}.zarr"
        gram(import_checkpoints(run.source, out, base=run.base, steps=f":{first}").store)
        found = gram(import_checkpoints(run.source, out, base=run.base).store).matrices
        np.testing.assert_array_equal(found, found.transpose(0, 2, 1))
