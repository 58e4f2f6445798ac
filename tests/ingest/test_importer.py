"""Import: every bit of every step comes back, every bad input is refused by name, and nothing
half-written stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from runs import (
    BUFFER,
    EMBEDDING,
    HEAD,
    LLAMA_SHAPES,
    SCALAR,
    Run,
    Weights,
    raw_bits,
    store_content,
    write_checkpoint,
    write_run,
)

from relexkit import TrajectoryStore, import_checkpoints
from relexkit.errors import CheckpointError, RelexkitError, StoreError
from relexkit.ingest.importer import select_steps
from relexkit.store import WriterLock, durable
from relexkit.store.encodings.table import ENCODINGS
from relexkit.weights.dtypes import to_float32

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def tensor_bits(store: TrajectoryStore, name: str, row: int) -> np.ndarray:
    """Bits of a tensor at a recorded row (-1: the base), read from the store by whole parts."""
    spec = next(t for t in store.layout.tensors if t.name == name)
    if spec.tied_to is not None:
        return tensor_bits(store, spec.tied_to, row)
    pieces = [
        store.read_state(s.part, row, 0, store.layout.parts[s.part].numel)[
            s.offset : s.offset + s.numel
        ]
        for s in store.layout.segments_of(spec)
    ]
    return (
        np.concatenate(pieces)
        if pieces
        else raw_bits(torch.empty(0, dtype=getattr(torch, spec.dtype)))
    )


def check_lossless(store: TrajectoryStore, run: Run, steps: list[int] | None = None) -> None:
    recorded = run.steps if steps is None else steps
    np.testing.assert_array_equal(store.steps, recorded)
    assert store.exact
    names = [t.name for t in store.layout.tensors]
    assert sorted(names) == sorted(run.weights[0])
    for row, step in enumerate([0, *recorded], -1):
        for name, tensor in run.weights[step].items():
            np.testing.assert_array_equal(
                tensor_bits(store, name, row), raw_bits(tensor), err_msg=f"step {step} {name}"
            )
    store.verify()


def assert_same_content(first: Path, second: Path) -> None:
    one, two = store_content(first), store_content(second)
    assert set(one) == set(two)
    for name in one:
        assert one[name] == two[name], name


# -- lossless --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.6, 1.0])
def test_every_bit_of_every_step_comes_back(tmp_path: Path, dtype: str, density: float) -> None:
    run = write_run(tmp_path, dtype=dtype, density=density, buffers=True, head="own", seed=3)
    store = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, encoding="exact"
    ).store
    expected = "sparse" if density < 1 / 8 else "exact"
    assert {p.encoding for p in store.layout.parts} == {"fixed", expected}
    shutil.rmtree(run.source)
    shutil.rmtree(run.base)  # type: ignore[arg-type]
    check_lossless(TrajectoryStore(tmp_path / "s.zarr"), run)


def test_the_runs_of_these_tests_hold_signs_zeros_subnormals_and_jumps(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        run = write_run(tmp_path / dtype, dtype=dtype, density=0.6, seed=3)
        last, base = run.weights[9][EMBEDDING], run.weights[0][EMBEDDING]
        info = torch.finfo(last.dtype)
        assert bool(((last == 0) & torch.signbit(last)).any())
        assert bool(((last != 0) & (last.abs() < info.smallest_normal)).any())
        assert bool((last.abs() > info.max / 4).any())
        assert bool((torch.signbit(last) != torch.signbit(base)).any())


@pytest.mark.parametrize("layout", ["sharded", "bin", "sharded-bin"])
def test_every_layout_of_files_imports_alike(tmp_path: Path, layout: str) -> None:
    run = write_run(tmp_path, layout=layout, buffers=True, head="tied", seed=5)
    check_lossless(import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store, run)


def test_mixed_dtypes_have_their_own_encodings(tmp_path: Path) -> None:
    dtypes = {"model.norm.weight": "float32", SCALAR: "float32", Q_PROJ: "float16"}
    run = write_run(tmp_path, dtypes=dtypes, density=0.05, seed=6, buffers=True)
    store = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, encoding="exact"
    ).store
    check_lossless(store, run)
    for spec in store.layout.tensors:
        assert spec.dtype == str(run.weights[0][spec.name].dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("column", "numel"),
    [
        (2**16 - 1, 2**16),
        (2**16 - 1, 2**16 + 9),
        (2**17 - 1, 2**17 + 1),
        (0, 2**16),
        (2**16, 2**16 + 1),
    ],
)
def test_a_single_change_at_a_block_boundary_comes_back(
    tmp_path: Path, column: int, numel: int
) -> None:
    base = {"w": torch.zeros(numel, dtype=torch.bfloat16)}
    steps = {}
    for step in (1, 2, 3):
        steps[step] = {"w": base["w"].clone()}
        steps[step]["w"][column] = step
    run = write_tensors(tmp_path, {0: base, **steps})
    check_lossless(import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store, run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("units", [-1, 1])
def test_every_weight_moving_by_one_unit_comes_back(
    tmp_path: Path, dtype: torch.dtype, units: int
) -> None:
    """A dense row of -1 equals what an unwritten row reads as: it must not be taken for one."""
    base = torch.linspace(1, 2, 1000).to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    weights = {s: {"w": (base.view(integer) + units * s).view(dtype)} for s in range(4)}
    run = write_tensors(tmp_path, weights)
    store = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, encoding="exact"
    ).store
    assert store.layout.parts[0].encoding == "exact"
    check_lossless(store, run)


def write_tensors(folder: Path, weights: dict[int, Weights]) -> Run:
    folders = {
        step: folder / "run" / f"step_{step}" if step else folder / "base" for step in weights
    }
    for step, tensors in weights.items():
        write_checkpoint(folders[step], tensors)
    return Run(folder / "run", folder / "base", weights, folders)


@pytest.mark.parametrize("mantissa_bits", [None, 3, 23])
def test_float_deltas_keep_the_stated_mantissa_bits(
    tmp_path: Path, mantissa_bits: int | None
) -> None:
    run = write_run(tmp_path, dtype="float32", motion="drift", density=1.0, seed=7)
    store = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, mantissa_bits=mantissa_bits
    ).store
    assert not store.exact
    assert store.mantissa_bits == (mantissa_bits or 10)
    store.verify()
    for row, step in enumerate(run.steps):
        for spec in store.layout.moving_tensors:
            pair = [run.weights[s][spec.name].reshape(-1).numpy() for s in (step, 0)]
            delta = (pair[0] - pair[1]).astype(np.longdouble)  # in float32, as stored
            found = [
                store.read_row(s.part, row, s.offset, s.offset + s.numel)
                for s in store.layout.segments_of(spec)
            ]
            stored = np.concatenate([*found, np.empty(0, np.float32)]).astype(np.longdouble)
            assert (
                np.abs(stored - delta) <= np.abs(delta) * 2.0 ** -(store.mantissa_bits + 1)
            ).all()
            state = to_float32(tensor_bits(store, spec.name, row), "float32").astype(np.longdouble)
            # one more rounding, of the sum, to float32
            bound = np.abs(delta) * 2.0 ** -(store.mantissa_bits + 1) + np.abs(state) * 2.0**-24
            assert (np.abs(state - pair[0]) <= bound + 1e-45).all()


@pytest.mark.parametrize(
    ("dtype", "density", "encoding", "expected"),
    [
        ("bfloat16", 0.02, "auto", "sparse"),
        ("bfloat16", 0.5, "auto", "exact"),
        ("bfloat16", 0.02, "float", "float"),
        ("float16", 0.02, "exact", "sparse"),
        ("float32", 0.02, "auto", "sparse"),
        ("float32", 0.5, "auto", "float"),
        ("float32", 0.5, "exact", "exact"),
        ("float32", 0.02, "float", "float"),
    ],
)
def test_the_encoding_follows_the_density_and_the_wish(
    tmp_path: Path, dtype: str, density: float, encoding: Any, expected: str
) -> None:
    run = write_run(tmp_path, dtype=dtype, density=density, seed=8)
    store = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, encoding=encoding
    ).store
    assert {p.encoding for p in store.layout.parts} == {expected}
    store.verify()


# -- bases, selections, ties -----------------------------------------------------------------------


def test_step_0_is_the_base_when_none_is_given(tmp_path: Path) -> None:
    run = write_run(tmp_path, base="step0")
    check_lossless(import_checkpoints(run.source, tmp_path / "s.zarr").store, run)


@pytest.mark.parametrize("encoding", ["exact", "float"])
def test_a_bfloat16_base_serves_float32_steps(tmp_path: Path, encoding: Any) -> None:
    run = write_run(tmp_path, dtype="float32", base_dtype="bfloat16", motion="drift", density=1.0)
    store = import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, encoding=encoding
    ).store
    assert {t.dtype for t in store.layout.tensors} == {"float32"}
    for name, tensor in run.weights[0].items():
        np.testing.assert_array_equal(tensor_bits(store, name, -1), raw_bits(tensor))
    if encoding == "exact":
        check_lossless(store, run)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [3, 4, 6, 9, 12]),
        ("4:9", [4, 6, 9]),
        (":", [3, 4, 6, 9, 12]),
        ("3::3", [3, 6, 9, 12]),
        (":4", [3, 4]),
        ("9:", [9, 12]),
        ("2:100:2", [4, 6, 12]),
        ("-5:3", [3]),
    ],
)
def test_selections_of_steps(selection: str | None, expected: list[int]) -> None:
    assert select_steps([3, 4, 6, 9, 12], selection) == expected


@pytest.mark.parametrize(
    "selection", ["", "3", "a:b", "1:2:0", "1:2:-1", "1:2:3:4", "1.5:2", "1:2:x"]
)
def test_a_selection_that_is_no_range_is_refused(selection: str) -> None:
    with pytest.raises(
        RelexkitError, match=rf"--steps '{selection}' is not a range; expected A:B or A:B:C"
    ):
        select_steps([1, 2], selection)


def test_a_selection_of_nothing_says_what_there_is() -> None:
    with pytest.raises(
        RelexkitError, match="--steps 5:9 selects no step; the run holds 2 steps from 1 to 2"
    ):
        select_steps([1, 2], "5:9")


def test_selected_steps_are_imported_exactly(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=range(1, 9))
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, steps="2:7:3").store
    check_lossless(store, run, [2, 5])


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, head="tied")
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    specs = {t.name: t for t in store.layout.tensors}
    ties = {(t.name, t.tied_to) for t in specs.values() if t.tied_to}
    assert ties == {(HEAD, EMBEDDING)}
    assert store.layout.num_parameters == sum(
        t.numel() for n, t in run.weights[0].items() if n != HEAD
    )
    check_lossless(store, run)


@pytest.mark.parametrize("step", [0, 3, 9])
def test_a_head_that_differs_anywhere_is_not_tied(tmp_path: Path, step: int) -> None:
    run = write_run(tmp_path, head="tied")
    run.weights[step][HEAD][5, 5] += 1
    write_checkpoint(run.folders[step], run.weights[step])
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    assert not [t.name for t in store.layout.tensors if t.tied_to]
    check_lossless(store, run)


def test_a_tie_that_breaks_while_appending_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, head="tied")
    run.weights[9][HEAD][5, 5] += 1
    write_checkpoint(run.folders[9], run.weights[9])
    import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, steps=":5")
    with pytest.raises(
        CheckpointError,
        match=rf"step 9: tensors '{HEAD}' and '{EMBEDDING}' differ but were tied so far",
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    check_lossless(TrajectoryStore(tmp_path / "s.zarr"), run, [1, 2, 3, 5])


def test_files_and_metrics_of_the_run_are_in_the_store(
    bfloat16_run: Run, bfloat16_store: TrajectoryStore
) -> None:
    assert bfloat16_store.files() == {
        "config.json": (bfloat16_run.folders[1] / "config.json").read_bytes()
    }
    metrics = bfloat16_store.metrics()
    assert set(metrics) == {"reward"}
    np.testing.assert_array_equal(metrics["reward"], np.array(bfloat16_run.steps) / 10)


def test_metrics_that_appear_late_and_have_odd_names_are_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path, shapes={"w": (5,)}, steps=(1, 2, 4))
    for step, entry in {
        2: {"rewards/my task/mean": 0.5},
        4: {"kl": 0.25, "rewards/my task/mean": 1.5},
    }.items():
        state = {"global_step": step, "log_history": [{"step": step, **entry}]}
        (run.folders[step] / "trainer_state.json").write_text(json.dumps(state))
    metrics = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store.metrics()
    np.testing.assert_array_equal(metrics["rewards/my task/mean"], [np.nan, 0.5, 1.5])
    np.testing.assert_array_equal(metrics["kl"], [np.nan, np.nan, 0.25])


def test_names_of_metrics_are_kept_exactly(tmp_path: Path) -> None:
    names = [
        "pass@1",
        "pass_1",
        "pass 1",
        "PASS@1",
        "奖励",
        "长度",
        "zarr.json",
        "",
        ".",
        "..",
        "c",
    ]
    names += [
        "rewards/a/mean",
        "rewards.a.mean",
        "../up",
        "__x",
        "_0",
        "a\\b",
        "n" * 300,
        "é",
        "e\u0301",
    ]
    run = write_run(tmp_path, shapes={"w": (5,)}, steps=(1, 2))
    logged = {step: {n: step + i / 100 for i, n in enumerate(names)} for step in (1, 2)}
    for step, entry in logged.items():
        state = {"global_step": step, "log_history": [{"step": step, **entry}]}
        (run.folders[step] / "trainer_state.json").write_text(json.dumps(state))
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    store.verify()
    assert {n: list(v) for n, v in store.metrics().items()} == {
        n: [logged[1][n], logged[2][n]] for n in names
    }
    assert {p.name for p in (tmp_path / "s.zarr").iterdir()} == {
        *("zarr.json", "base", "checksums", "files", "metrics", "recent-metrics", "steps"),
        "updates",
    }


def test_a_list_of_metrics_as_it_was_before_names_could_be_anything_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path, shapes={"w": (5,)}, steps=(1, 2), metrics=True)
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    described = json.loads((tmp_path / "s.zarr/metrics/zarr.json").read_text())["attributes"]
    assert described.keys() == {"names", "checksum"}
    assert store.metric_names() == ["reward"]


def test_one_step_no_motion_and_frozen_tensors_work(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", steps=[7], density=0.0)
    check_lossless(import_checkpoints(run.source, tmp_path / "one.zarr", base=run.base).store, run)
    run = write_run(tmp_path / "frozen", density=0.1, frozen=list(LLAMA_SHAPES)[:9])
    check_lossless(
        import_checkpoints(run.source, tmp_path / "frozen.zarr", base=run.base).store, run
    )


# -- appending -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "density"), [("bfloat16", 0.03), ("bfloat16", 0.6), ("float32", 0.6)]
)
def test_appending_gives_the_same_store_as_one_import(
    tmp_path: Path, dtype: str, density: float
) -> None:
    run = write_run(tmp_path, dtype=dtype, density=density, metrics=True, buffers=True, head="tied")
    import_checkpoints(run.source, tmp_path / "once.zarr", base=run.base)
    for selection, added in [(":2", [1, 2]), (":2", []), (":3", [3]), (None, [5, 9]), (None, [])]:
        result = import_checkpoints(
            run.source, tmp_path / "often.zarr", base=run.base, steps=selection
        )
        assert result.added == added
        assert sorted(result.added + result.already) == [
            s for s in run.steps if selection is None or s <= int(selection[1:])
        ]
    assert_same_content(tmp_path / "once.zarr", tmp_path / "often.zarr")


def test_the_same_command_again_changes_no_file(tmp_path: Path) -> None:
    run = write_run(tmp_path, metrics=True)
    import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for p in (tmp_path / "s.zarr").rglob("*")
        if p.is_file()
    }
    result = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    assert (result.added, result.already) == ([], run.steps)
    after = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for p in (tmp_path / "s.zarr").rglob("*")
        if p.is_file()
    }
    assert after == before


@pytest.mark.parametrize(
    ("dtype", "density", "memory_budget_bytes"),
    [
        ("bfloat16", 0.03, 0),
        ("bfloat16", 0.6, 1500),
        ("float32", 0.03, 1500),
        ("float32", 1.0, 0),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (
                ("bfloat16", 0.03, 1500),
                ("bfloat16", 0.6, 0),
                ("float32", 0.03, 0),
                ("float32", 1.0, 1500),
            )
        ),
    ],
)
def test_small_parts_and_small_budgets_change_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    density: float,
    memory_budget_bytes: int,
) -> None:
    run = write_run(tmp_path, steps=(1, 3, 4), dtype=dtype, density=density, buffers=True)
    for kind in ENCODINGS.values():
        monkeypatch.setattr(kind, "part_numel", 190)
    arguments: dict[str, Any] = {"base": run.base, "encoding": "exact"}
    import_checkpoints(run.source, tmp_path / "whole.zarr", **arguments)
    import_checkpoints(
        run.source,
        tmp_path / "s.zarr",
        steps=":3",
        memory_budget_bytes=memory_budget_bytes,
        **arguments,
    )
    import_checkpoints(
        run.source, tmp_path / "s.zarr", memory_budget_bytes=memory_budget_bytes, **arguments
    )
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert len(store.layout.parts) > 7
    assert any(len(list(store.layout.segments_of(t))) > 2 for t in store.layout.moving_tensors)
    check_lossless(store, run)
    assert_same_content(tmp_path / "s.zarr", tmp_path / "whole.zarr")


def test_more_steps_than_the_arrays_were_made_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=range(1, 135), shapes={"w": (40,)}, density=0.3, metrics=True)
    import_checkpoints(
        run.source, tmp_path / "s.zarr", base=run.base, steps=":70", encoding="exact"
    )
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    check_lossless(store, run)
    np.testing.assert_array_equal(store.metrics()["reward"], np.arange(1, 135) / 10)


# -- bad input -------------------------------------------------------------------------------------


def set_value(name: str, index: int, value: float) -> Callable[[Weights], None]:
    def damage(tensors: Weights) -> None:
        tensors[name].reshape(-1)[index] = value

    return damage


def remove(name: str) -> Callable[[Weights], None]:
    def damage(tensors: Weights) -> None:
        del tensors[name]

    return damage


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], None]:
    def damage(tensors: Weights) -> None:
        tensors[name] = make(tensors[name])

    return damage


def add(name: str) -> Callable[[Weights], None]:
    def damage(tensors: Weights) -> None:
        tensors[name] = torch.zeros(2)

    return damage


BAD_STEPS: dict[str, tuple[Callable[[Weights], None], str]] = {
    "nan": (
        set_value(Q_PROJ, 13, float("nan")),
        rf": tensor '{Q_PROJ}' is NaN or infinite at element 13; expected finite",
    ),
    "infinity": (
        set_value(SCALAR, 0, float("inf")),
        rf": tensor '{SCALAR}' is NaN or infinite at element 0",
    ),
    "minus infinity": (
        set_value(EMBEDDING, 423, float("-inf")),
        rf": tensor '{EMBEDDING}' is NaN or infinite at element 423",
    ),
    "missing": (remove(Q_PROJ), rf" lacks tensor '{Q_PROJ}'"),
    "extra": (add("model.new"), r" has the unexpected tensor 'model.new'"),
    "reshaped": (
        replace(Q_PROJ, lambda t: t.reshape(4, 16)),
        rf": tensor '{Q_PROJ}' has shape \[4, 16\]; expected \[8, 8\]",
    ),
    "retyped": (
        replace(Q_PROJ, lambda t: t.to(torch.float16)),
        rf": tensor '{Q_PROJ}' has dtype float16; expected bfloat16",
    ),
    "integers": (
        replace(Q_PROJ, lambda t: t.to(torch.int64)),
        rf": tensor '{Q_PROJ}' has dtype int64; expected bfloat16",
    ),
    "changed buffer": (
        set_value(BUFFER, 3, 99),
        rf": tensor '{BUFFER}' is not float and differs from the base",
    ),
}
"""What may be wrong with a checkpoint, and the message after the words for the checkpoint."""


def damaged_run(folder: Path, step: int, damage: Callable[[Weights], None], **options: Any) -> Run:
    run = write_run(folder, buffers=True, **options)
    tensors = {n: t.clone() for n, t in run.weights[step].items()}
    damage(tensors)
    write_checkpoint(run.folders[step], tensors)
    return run


def assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error)


def assert_nothing_but_whole_steps(path: Path, run: Run, steps: list[int]) -> None:
    """The store holds exactly these steps, whole, or does not exist if there are none."""
    assert not Path(f"{path}.lock").exists()
    if steps:
        check_lossless(TrajectoryStore(path), run, steps)
        return
    if path.exists():  # an import that created the store and then failed at its first step
        store = TrajectoryStore(path)
        assert not len(store.steps)
        store.verify()


@pytest.mark.parametrize("case", BAD_STEPS)
@pytest.mark.parametrize("density", [0.02, 0.6])
def test_a_bad_step_is_named_and_the_steps_before_it_stay(
    tmp_path: Path, case: str, density: float
) -> None:
    damage, message = BAD_STEPS[case]
    run = damaged_run(tmp_path, 5, damage, density=density)
    with pytest.raises(CheckpointError, match="step 5" + message) as caught:
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    assert_one_line(caught.value)
    assert_nothing_but_whole_steps(tmp_path / "s.zarr", run, [1, 2, 3])
    write_checkpoint(run.folders[5], run.weights[5])  # repaired, the same command completes it
    check_lossless(import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store, run)


@pytest.mark.parametrize("layout", ["hf", "bin"])
@pytest.mark.parametrize("step", [2, 5, 9])
@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("head", [None, "tied"])
def test_a_tensor_that_shrank_or_grew_is_named(
    tmp_path: Path, layout: str, step: int, rows: int, head: str | None
) -> None:
    """Sampling the density and comparing tied weights read ahead: they must not read beyond a
    shorter tensor.
    """
    run = write_run(tmp_path, layout=layout, head=head)
    tensors = run.weights[step] | {EMBEDDING: torch.ones(rows, 8, dtype=torch.bfloat16)}
    write_checkpoint(run.folders[step], tensors, layout=layout)
    with pytest.raises(
        CheckpointError,
        match=rf"step {step}: tensor '{EMBEDDING}' has shape \[{rows}, 8\]; expected \[53, 8\]",
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_bad_last_step_is_named(tmp_path: Path, case: str) -> None:
    """The last step is also the one from which the density is sampled."""
    damage, message = BAD_STEPS[case]
    run = damaged_run(tmp_path, 9, damage)
    with pytest.raises(CheckpointError, match="step 9" + message):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    assert_nothing_but_whole_steps(tmp_path / "s.zarr", run, [1, 2, 3, 5])


@pytest.mark.parametrize("case", ["nan", "infinity", "minus infinity"])
@pytest.mark.parametrize("encoding", ["auto", "float"])
def test_a_base_that_is_not_finite_is_named_and_leaves_no_store(
    tmp_path: Path, case: str, encoding: Any
) -> None:
    damage, message = BAD_STEPS[case]
    run = damaged_run(tmp_path, 0, damage)
    with pytest.raises(CheckpointError, match="the base" + message):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, encoding=encoding)
    with pytest.raises(StoreError):
        TrajectoryStore(tmp_path / "s.zarr")
    assert not Path(f"{tmp_path}/s.zarr.lock").exists()
    write_checkpoint(run.folders[0], run.weights[0])
    check_lossless(import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store, run)


@pytest.mark.parametrize("encoding", ["exact", "float"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_float32_step_that_is_not_finite_is_named(
    tmp_path: Path, encoding: Any, value: float
) -> None:
    run = damaged_run(
        tmp_path, 3, set_value(Q_PROJ, 13, value), dtype="float32", motion="drift", density=1.0
    )
    with pytest.raises(
        CheckpointError, match=rf"step 3: tensor '{Q_PROJ}' is NaN or infinite at element 13"
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, encoding=encoding)
    assert list(TrajectoryStore(tmp_path / "s.zarr").steps) == [1, 2]


def test_a_delta_that_overflows_float32_is_refused_not_stored_as_damage(tmp_path: Path) -> None:
    """Both weights are finite, their difference is not: what is stored must still be readable."""
    big = torch.finfo(torch.float32).max
    base = {"w": torch.tensor([-big, 1.0, 2.0])}
    run = write_tensors(tmp_path, {0: base, 1: {"w": torch.tensor([big, 1.1, 2.1])}})
    with pytest.raises(CheckpointError, match=r"step 1: tensor 'w'"):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, encoding="float")
    assert not len(TrajectoryStore(tmp_path / "s.zarr").steps)


@pytest.mark.parametrize("step", [2, 9])
def test_a_truncated_step_is_left_out_and_reported(tmp_path: Path, step: int) -> None:
    run = write_run(tmp_path)
    path = run.folders[step] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    assert list(result.left_out) == [f"step {step}"]
    assert "model.safetensors: is truncated" in result.left_out[f"step {step}"]
    check_lossless(result.store, run, [s for s in run.steps if s != step])


def test_a_truncated_base_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    path = run.folders[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated") as caught:
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    assert_one_line(caught.value)
    assert not (tmp_path / "s.zarr").exists()


def test_a_folder_without_steps_and_a_run_without_base_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match="empty: holds no steps; expected sub-folders named checkpoint-N"
    ):
        import_checkpoints(tmp_path / "empty", tmp_path / "s.zarr")
    run = write_run(tmp_path)
    with pytest.raises(
        CheckpointError, match="has no step 0, so the base is unknown; give the base model with"
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr")
    with pytest.raises(CheckpointError, match="nowhere: no such folder; expected one with weights"):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=tmp_path / "nowhere")
    shutil.copytree(run.folders[3], run.source / "step_3")
    with pytest.raises(CheckpointError, match="step 3 occurs twice"):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    assert not (tmp_path / "s.zarr").exists()
    assert not (tmp_path / "s.zarr.lock").exists()


def test_a_run_that_is_only_its_base_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=[], base="step0")
    with pytest.raises(
        CheckpointError,
        match="holds no step after the base; expected at least one step from 1 upwards",
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr")


def test_a_step_before_the_last_recorded_one_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, steps="2:5")
    with pytest.raises(
        CheckpointError,
        match=r"step 1 of .* lies before step 5, the last one recorded .*import into a new store",
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    check_lossless(TrajectoryStore(tmp_path / "s.zarr"), run, [2, 3, 5])


def test_another_base_or_other_options_are_refused_for_an_existing_store(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", dtype="float32", motion="drift", density=1.0)
    other = write_run(tmp_path / "b", dtype="float32", motion="drift", density=1.0, seed=99)
    out = tmp_path / "s.zarr"
    import_checkpoints(run.source, out, base=run.base, steps=":3")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"base": other.base},
            "the base differs from the one in .*give the same --base, or another -o",
        ),
        ({"base": run.base, "mantissa_bits": 7}, "holds deltas with 10 mantissa bits, not 7"),
        ({"base": run.base, "encoding": "exact"}, "is encoded as float; leave --encoding out"),
    ]
    for arguments, message in cases:
        with pytest.raises(CheckpointError, match=message):
            import_checkpoints(run.source, out, **arguments)
    assert list(TrajectoryStore(out).steps) == [1, 2, 3]


@pytest.mark.parametrize("mantissa_bits", [0, -1, 24])
def test_mantissa_bits_out_of_range_are_refused(tmp_path: Path, mantissa_bits: int) -> None:
    with pytest.raises(
        RelexkitError, match=f"--mantissa-bits {mantissa_bits} is out of range; expected 1 to 23"
    ):
        import_checkpoints(tmp_path, tmp_path / "s.zarr", mantissa_bits=mantissa_bits)


def test_a_float64_tensor_is_refused_with_what_to_do(tmp_path: Path) -> None:
    weights = {s: {"w": torch.ones(3, dtype=torch.float64) * s} for s in range(3)}
    run = write_tensors(tmp_path, weights)
    with pytest.raises(
        CheckpointError,
        match="tensor 'w' has dtype float64; expected float32, bfloat16 or float16: convert",
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)


def test_a_float32_base_of_bfloat16_steps_says_how_to_round_it(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_checkpoint(run.folders[0], {n: t.to(torch.float32) for n, t in run.weights[0].items()})
    with pytest.raises(
        CheckpointError, match="round the base first with `relexkit round BASE --dtype bfloat16"
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)


# -- the place of the store ------------------------------------------------------------------------


def test_what_is_no_store_is_neither_overwritten_nor_deleted(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    zarr.create_group(str(tmp_path / "group.zarr"), attributes={"mine": 1})
    for name, message in [
        ("file", "file: exists and is not a folder; choose another -o"),
        ("folder", "folder: exists and is not a trajectory store; choose another -o"),
        ("group.zarr", "group.zarr: exists and is not a trajectory store; choose another -o"),
    ]:
        with pytest.raises(StoreError, match=message):
            import_checkpoints(run.source, tmp_path / name, base=run.base)
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "folder" / "notes.txt").read_text() == "precious"
    assert dict(zarr.open_group(str(tmp_path / "group.zarr"), mode="r").attrs) == {"mine": 1}


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_a_store_of_another_format_version_is_refused_and_kept(
    tmp_path: Path, version: Any
) -> None:
    run = write_run(tmp_path)
    out = tmp_path / "s.zarr"
    import_checkpoints(run.source, out, base=run.base, steps=":2")
    document = json.loads((out / "zarr.json").read_text())
    document["attributes"]["relexkit"]["format_version"] = version
    (out / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(
        StoreError,
        match=r"has format version .*; this relexkit reads versions 1, 2 and 3: install the rel",
    ):
        TrajectoryStore(out)
    before = sorted(p for p in out.rglob("*"))
    with pytest.raises(StoreError):
        import_checkpoints(run.source, out, base=run.base)
    assert sorted(p for p in out.rglob("*")) == before


def test_an_empty_folder_becomes_the_store(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (tmp_path / "s.zarr").mkdir()
    check_lossless(import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store, run)


def test_a_store_that_is_being_written_is_refused_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with WriterLock(str(tmp_path / "s.zarr")):
        with pytest.raises(
            StoreError,
            match=f"s.zarr: is being written by process {os.getpid()} of .*; wait until it ends",
        ):
            import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
        assert not (tmp_path / "s.zarr").exists()
    import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, steps=":3")
    with (
        WriterLock(str(tmp_path / "s.zarr")),
        pytest.raises(StoreError, match="is being written by process"),
    ):
        import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    check_lossless(import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store, run)


# -- disk full -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 2_000, 8_000, 20_000, 40_000])
def test_a_file_size_limit_is_a_stated_error_and_leaves_whole_steps(
    tmp_path: Path, limit: int
) -> None:
    """The kernel refuses to let a file grow past RLIMIT_FSIZE (EFBIG), as it refuses on a full
    disk.
    """
    run = write_run(tmp_path, shapes={"w": (30_000,), "v": (300, 9)}, density=0.6, steps=(1, 2, 3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "s.zarr"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot be written \(File too large\)") as caught:
            import_checkpoints(run.source, out, base=run.base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(caught.value)
    assert not Path(f"{out}.lock").exists()
    check_lossless(import_checkpoints(run.source, out, base=run.base).store, run)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_at_any_write_leaves_whole_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, alone: bool
) -> None:
    """The k-th file of the store cannot be made, and none after it or only that one, for growing k
    until an import gets through.
    """
    run = write_run(
        tmp_path, shapes={"w": (40,), "v": (9,)}, steps=(1, 4), metrics=True, density=0.1
    )
    import_checkpoints(run.source, tmp_path / "whole.zarr", base=run.base)
    real, calls = durable.create, 0

    def create(path: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls == fail_from or (calls > fail_from and not alone):
            raise OSError(28, "No space left on device", str(path))
        return real(path)

    monkeypatch.setattr(durable, "create", create)
    for fail_from in range(1, 400, every):
        calls, out = 0, tmp_path / f"{fail_from}.zarr"
        message = None
        try:
            import_checkpoints(run.source, out, base=run.base)
        except StoreError as error:
            message = str(error)
        if message is None:
            break
        assert "cannot be written (No space left on device)" in message
        assert "\n" not in message
        calls = -(10**9)
        recorded: list[int] = []
        with contextlib.suppress(StoreError):  # there may be no store yet
            recorded = [int(s) for s in TrajectoryStore(out).steps]
        assert recorded == run.steps[: len(recorded)]
        if recorded:
            check_lossless(TrajectoryStore(out), run, recorded)
        import_checkpoints(run.source, out, base=run.base)
        assert_same_content(out, tmp_path / "whole.zarr")
        shutil.rmtree(out)
    assert 20 < fail_from < 390  # it failed in creation and in every step, and got through at last


def test_the_list_of_metrics_is_replaced_in_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a name and the checksum of the names, a store would be lost."""
    real, written = durable.rename, []

    def rename(source: Path, target: Path) -> None:
        written.append("/".join(target.parts[-2:]))
        real(source, target)

    monkeypatch.setattr(durable, "rename", rename)
    run = write_run(tmp_path, shapes={"w": (40,)}, steps=(1, 4), metrics=True)
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    assert store.metric_names() == ["reward"]
    assert written.count("metrics/zarr.json") == 2  # at creation, and with the first metric


def test_another_run_with_the_same_base_is_refused(tmp_path: Path) -> None:
    """Two seeds of one experiment differ in nothing but their weights."""
    first = write_run(tmp_path / "a", steps=(1, 2), seed=3)
    second = write_run(tmp_path / "b", steps=(1, 2, 3), seed=3)
    other = {n: t.clone() for n, t in second.weights[2].items()}
    other[Q_PROJ].view(torch.int16)[0, 0] += 1
    write_checkpoint(second.folders[2], other)
    import_checkpoints(first.source, tmp_path / "s.zarr", base=first.base)
    with pytest.raises(
        CheckpointError, match=r"step 2 of the run differs from .*, though step 1 is the same"
    ):
        import_checkpoints(second.source, tmp_path / "s.zarr", base=second.base)
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == [1, 2]


@pytest.mark.slow
def test_a_step_in_which_every_weight_changes_takes_less_than_a_gibibyte(tmp_path: Path) -> None:
    """A hundred million 16-bit weights into a log that was chosen for sparse steps."""
    random, shape = np.random.default_rng(0), (10_000, 10_000)
    bits = random.integers(0x3C00, 0x3E00, shape, np.int16)
    for folder, change in (("base", 0), ("run/checkpoint-1", 0), ("run/checkpoint-2", 1)):
        if folder == "run/checkpoint-1":
            bits[0] += 1
        bits += np.int16(change)
        weights = {"model.embed_tokens.weight": torch.from_numpy(bits).view(torch.bfloat16)}
        write_checkpoint(tmp_path / folder, weights)
    del bits, weights
    program = (
        "import resource, sys; from relexkit import import_checkpoints\n"
        "import_checkpoints('run', 's.zarr', base='base', steps=':1')\n"
        "store = import_checkpoints('run', 's.zarr', base='base').store\n"
        "assert [p.encoding for p in store.layout.parts] == ['sparse']\n"
        "assert store.entries(0, 2).sum() == 100_010_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 2**20  # KiB
