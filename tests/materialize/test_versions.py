"""Predictions and recorded steps as weight-sync versions, applied by a receiver that was written
from the format's description (``versions.pull``).
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import Run, raw_bits, write_run
from safetensors.torch import load_file, save_file
from versions import pull, raw, write_pull_version

from relexkit import (
    Output,
    Prediction,
    TrajectoryStore,
    WeightSync,
    checkout,
    extrapolate,
    import_checkpoints,
)
from relexkit.cli import main
from relexkit.errors import CheckpointError, RelexkitError


def assert_pulls(out: Path, base: Path, version: int, folder: Path) -> None:
    """What a receiver has at a version are the weights of ``folder``, bit for bit."""
    received, expected = pull(out, base, version), load_file(folder / "model.safetensors")
    assert received
    for name, content in received.items():
        assert (content == raw(expected[name])).all(), name


def engine_model(run: Run, tmp_path: Path) -> Path:
    """The model that an engine was started with: as Hugging Face writes it, without a tied head."""
    folder = tmp_path / "engine"
    shutil.copytree(run.base, folder)  # type: ignore[arg-type]
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_recorded_step_is_pulled(
    bfloat16_run: Run, bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    base = engine_model(bfloat16_run, tmp_path)
    folder = checkout(bfloat16_store, 3, tmp_path / "sync", sync=WeightSync(base))
    assert folder == tmp_path / "sync/weight_v000001"
    assert_pulls(folder.parent, base, 1, checkout(bfloat16_store, 3, tmp_path / "three"))
    changed = {n for p in folder.glob("*.safetensors") for n in load_file(p)}
    assert "model.empty" not in changed
    assert "model.position_ids" not in changed
    again = checkout(bfloat16_store, 3, tmp_path / "sync", sync=WeightSync(base))
    assert again == folder
    assert [p.name for p in folder.parent.iterdir()] == ["weight_v000001"], "nothing is left beside"


def test_predictions_are_pulled_one_after_the_other(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=[1, 2, 3], motion="drift", density=0.05)
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    folders = extrapolate(store, [6, 12], tmp_path / "folders", Prediction(method="two-point"))
    sync = WeightSync(3, version=42)
    written = extrapolate(
        store, [6, 12], tmp_path / "sync", Prediction(method="two-point"), output=Output(sync=sync)
    )
    assert [p.folder.name for p in written] == ["weight_v000042", "weight_v000043"]
    write_pull_version(tmp_path / "sync", 41, None, run.weights[3])
    for number, prediction in zip((42, 43), folders, strict=True):
        assert_pulls(tmp_path / "sync", tmp_path, number, prediction.folder)
    again = extrapolate(
        store, [6, 12], tmp_path / "sync", Prediction(method="two-point"), output=Output(sync=sync)
    )
    assert [p.already for p in again] == [True, True]


def test_what_we_write_we_read(
    bfloat16_run: Run, bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    """Versions 1 to 3 are recorded steps; imported again they give the same bits."""
    steps, out = [0, 1, 2, 3], tmp_path / "sync"
    for earlier, step in pairwise(steps):
        checkout(bfloat16_store, step, out, sync=WeightSync(earlier))
    store = import_checkpoints(out, tmp_path / "s.zarr", base=bfloat16_run.base).store
    assert store.steps.tolist() == [1, 2, 3]
    for step in (1, 2, 3):
        found = load_file(checkout(store, step, tmp_path / f"{step}") / "model.safetensors")
        for name, tensor in bfloat16_run.weights[step].items():
            assert (raw_bits(found[name]) == raw_bits(tensor)).all()


def test_float32_predictions_fit_a_bfloat16_engine_with_dtype_only(
    float32_run: Run, float32_store: TrajectoryStore, tmp_path: Path
) -> None:
    base = tmp_path / "engine"
    base.mkdir()
    tensors = load_file(float32_run.base / "model.safetensors")  # type: ignore[operator]
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, base / "model.safetensors")
    hold, sync = Prediction(method="hold"), WeightSync(base)
    with pytest.raises(CheckpointError, match=r"has dtype float32; expected bfloat16"):
        extrapolate(float32_store, [20], tmp_path / "sync", hold, output=Output(sync=sync))
    assert not list((tmp_path / "sync").iterdir())
    output = Output(dtype="bfloat16", sync=sync)
    written = extrapolate(float32_store, [20], tmp_path / "sync", hold, output=output)
    folders = extrapolate(
        float32_store,
        [20],
        tmp_path / "f",
        Prediction(method="hold"),
        output=Output(dtype="bfloat16"),
    )
    assert_pulls(tmp_path / "sync", base, 1, folders[0].folder)
    assert written[0].folder.name == "weight_v000001"


def test_commands(
    bfloat16_store: TrajectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [bfloat16_store.path, "-o", str(tmp_path / "sync")]
    sync = ["--as", "weight-sync"]
    assert main(["checkout", *run, "--step", "2", *sync, "--against", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"].endswith("sync/weight_v000001")
    hold = ["extrapolate", *run, "--to", "12", "--method", "hold"]
    assert main([*hold, *sync, "--against", "2"]) == 0
    assert "weight_v000002" in capsys.readouterr().out
    for extra, message in (
        (sync, "needs --against"),
        (["--against", "2"], "belong to --as weight-sync"),
        ([*sync, "--against", "nothing"], "neither a folder nor a step"),
        ([*sync, "--against", "2", "--version", "0"], "--version 0 is too small"),
        ([*sync, "--against", "1", "--version", "2"], "exists and holds something else"),
    ):
        assert main([*hold, *extra]) == 1
        assert message in capsys.readouterr().err


def test_a_base_without_a_tensor_of_the_store_is_refused(
    bfloat16_run: Run, bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    tensors = load_file(bfloat16_run.base / "model.safetensors")  # type: ignore[operator]
    del tensors["model.norm.weight"]
    tensors["other"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RelexkitError, match=r"the unexpected tensor 'model\.norm\.weight'"):
        checkout(bfloat16_store, 1, tmp_path / "sync", sync=WeightSync(tmp_path))
