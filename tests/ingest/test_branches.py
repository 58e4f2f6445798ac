"""Steps that a store and a run share are the same, or nothing is added: branches never mix."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, same_bits, write_checkpoint, write_run
from safetensors.torch import load_file

from relexkit import TrajectoryStore, checkout, import_checkpoints
from relexkit.errors import CheckpointError

KINDS: dict[str, dict[str, Any]] = {
    "log": {"dtype": "bfloat16"},
    "dense": {"dtype": "float32", "density": 1.0},
    "float16": {"dtype": "float16"},
}
SHAPES = {"model.embed_tokens.weight": (300, 300), "model.norm.weight": (70_000,)}


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    made = write_run(tmp_path, shapes=SHAPES, steps=(100, 200, 300, 400), **KINDS[request.param])
    import_checkpoints(made.source, tmp_path / "s.zarr", base=made.base)
    return made


def add(run: Run, tmp_path: Path, **options: Any) -> Any:
    return import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base, **options)


def rewrite(run: Run, step: int, seed: int, share: float = 1.0) -> None:
    """Step ``step`` as another branch has it, different in a share of the elements."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in run.weights[300].items():
        moved = torch.rand(tensor.shape, generator=generator) < share
        weights[name] = torch.where(moved, tensor * 1.01, tensor)
    shutil.rmtree(run.source / f"checkpoint-{step}", ignore_errors=True)
    write_checkpoint(run.source / f"checkpoint-{step}", weights)


def test_a_step_that_was_written_anew_is_refused_wherever_it_lies(run: Run, tmp_path: Path) -> None:
    for step in (200, 400):
        before = shutil.copytree(run.source, tmp_path / "before")
        rewrite(run, step, 7)
        rewrite(run, 600, 8)
        with pytest.raises(
            CheckpointError,
            match=rf"step {step} of the run differs from the one recorded in .*though step"
            rf" {step - 100} is the same: .* give --rewind",
        ):
            add(run, tmp_path)
        assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == [100, 200, 300, 400]
        shutil.rmtree(run.source)
        before.rename(run.source)


def test_all_that_differ_are_named(run: Run, tmp_path: Path) -> None:
    for step in (200, 300):
        rewrite(run, step, step)
    with pytest.raises(CheckpointError, match=r"steps 200, 300 of the run differ from those"):
        add(run, tmp_path)
    for step in (100, 400):
        rewrite(run, step, step)
    with pytest.raises(CheckpointError, match=r"100, 200, 300, 400 .*this is another run; choose"):
        add(run, tmp_path, rewind=True)


def test_rewind_replaces_what_was_recorded_after_the_last_step_that_agrees(
    run: Run, tmp_path: Path
) -> None:
    rewrite(run, 400, 7)
    rewrite(run, 600, 8)
    result = add(run, tmp_path, rewind=True)
    assert result.added == [400, 600]
    assert any(
        "removed, to be recorded anew, what was recorded after step 300" in note
        for note in result.notes
    )
    result.store.verify()
    assert result.store.steps.tolist() == [100, 200, 300, 400, 600]
    if result.store.exact:
        ours = load_file(checkout(result.store, 400, tmp_path / "o") / "model.safetensors")
        theirs = load_file(run.source / "checkpoint-400/model.safetensors")
        assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_shares_no_step_is_another_one_unless_told_otherwise(
    run: Run, tmp_path: Path
) -> None:
    for step in (100, 200, 300, 400):
        shutil.rmtree(run.source / f"checkpoint-{step}")
    rewrite(run, 700, 1)
    with pytest.raises(CheckpointError, match=r"shares no step with .*give --continue"):
        add(run, tmp_path)
    assert add(run, tmp_path, continues=True).added == [700]


def test_recorded_steps_that_are_gone_are_said(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.source / "checkpoint-400")
    rewrite(run, 600, 1)
    result = add(run, tmp_path)
    assert result.added == [600]
    assert any("step 400, recorded before, is not in the run any more" in n for n in result.notes)


def test_earlier_steps_that_a_trainer_has_deleted_do_not_matter(run: Run, tmp_path: Path) -> None:
    for step in (100, 200, 300):
        shutil.rmtree(run.source / f"checkpoint-{step}")
    rewrite(run, 600, 1)
    result = add(run, tmp_path)
    assert result.added == [600]
    assert not any("not in the run any more" in note for note in result.notes)


def test_a_change_of_few_weights_is_seen_where_the_run_moves(tmp_path: Path) -> None:
    """Only the last tensor is trained: samples that are spread evenly could miss it."""
    shapes = {"a.weight": (40 * 65_536,), "b.weight": (1000,), "c.weight": (40 * 65_536,)}
    run = write_run(tmp_path, shapes=shapes, steps=(1, 2), frozen=["a.weight", "c.weight"])
    import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base)
    changed = {n: t.clone() for n, t in run.weights[1].items()}
    changed["b.weight"].view(torch.int16)[3] ^= 1
    write_checkpoint(run.folders[1], changed)
    with pytest.raises(CheckpointError, match="step 1 of the run differs"):
        add(run, tmp_path)


# -- the base --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_a_step_0_beside_a_base_is_said(same: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path, shapes={"w": (50,)}, steps=(1, 2), naming="step_{}")
    write_checkpoint(run.source / "step_0", run.weights[0 if same else 1])
    reason = add(run, tmp_path).left_out["step 0"]
    assert reason.startswith("is the base" if same else "differs from the base")
    assert same or "--step-map" in reason


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_all_equal_the_base_are_said(kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", shapes={"w": (50,)}, steps=(1, 2), **KINDS[kind])
    for step in (1, 2):
        write_checkpoint(run.folders[step], run.weights[0])
    notes = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).notes
    assert any("every step equals the base bit for bit" in note for note in notes)
    moved = write_run(tmp_path / "b", shapes={"w": (50,)}, steps=(1, 2), **KINDS[kind])
    write_checkpoint(moved.folders[2], moved.weights[0])
    notes = import_checkpoints(moved.source, tmp_path / "t.zarr", base=moved.base).notes
    assert not any("every step equals the base" in note for note in notes)
