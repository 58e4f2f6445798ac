"""Agreement with the released RELEX scripts on consecutive steps.

The pipeline is derived again here from its description: weights cast to float16, differences in
float16, Gram matrix in float32, one direction per tensor, a line against row numbers. Set
RELEXKIT_REFERENCE to a clone of the released scripts (weizhepei/RELEX) and they are run as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    EMBEDDING,
    HEAD,
    LLAMA_CONFIG,
    LLAMA_SHAPES,
    Run,
    Weights,
    write_checkpoint,
    write_run,
)
from safetensors.torch import load_file

from relexkit import Options, Output, Prediction, extrapolate, import_checkpoints

REFERENCE = os.environ.get("RELEXKIT_REFERENCE", "")


def released_delta(run: Run, name: str, until: int, target: int, rank: int) -> np.ndarray:
    """The delta that the released pipeline predicts for one tensor, float32 ``[D]``."""
    steps = [s for s in run.steps if s <= until]
    half = {s: run.weights[s][name].reshape(-1).to(torch.float16) for s in [0, *steps]}
    rows = np.stack([(half[s] - half[0]).numpy() for s in steps]).astype(np.float32)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    left, singular = vectors[:, ::-1][:, :rank], np.sqrt(np.maximum(values[::-1][:rank], 0))
    if singular[0] == 0:
        return np.zeros(rows.shape[1], np.float32)
    kept = singular > 1e-6 * singular[0]  # the scripts zero the other directions
    basis = (rows.T @ left) * np.where(kept, 1 / np.where(kept, singular, 1), 0)
    x = np.arange(len(steps))
    at = len(steps) - 1 + (target - steps[-1])
    predicted = [np.polyval(np.polyfit(x, c, 1), at) for c in (rows @ basis).T]
    return basis @ np.array(predicted, np.float32)


def predict(run: Run, folder: Path, until: int, target: int, rank: int, dtype: str) -> Weights:
    store = import_checkpoints(run.source, folder / "run.zarr", base=run.base).store
    [written] = extrapolate(
        store,
        [target],
        folder / "predicted",
        Prediction(until=until, options=Options(rank=rank, axis="row")),
        output=Output(dtype=dtype, rounding="nearest"),
    )
    return load_file(written.folder / "model.safetensors")


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("until", [12, 30])
def test_deltas_agree_with_the_released_pipeline(until: int, rank: int, tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        motion="drift",
        density=0.1,
        steps=range(1, 31),
        head="tied",
        extras=False,
        seed=21,
    )
    found, errors, norms = predict(run, tmp_path, until, 100, rank, "float32"), 0.0, 0.0
    for name in found:
        expected = released_delta(run, name, until, 100, rank).astype(np.float64)
        delta = (
            found[name].reshape(-1).double().numpy()
            - run.weights[0][name].reshape(-1).double().numpy()
        )
        errors, norms = errors + ((delta - expected) ** 2).sum(), norms + (expected**2).sum()
    # float16 keeps eleven bits of a difference: 2.8e-4 at most, less after averaging over the steps
    assert np.sqrt(errors / norms) < 1e-3


def test_row_and_step_axes_agree_on_consecutive_steps(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, motion="drift", density=0.1, steps=range(1, 13), extras=False, seed=22
    )
    by_row = predict(run, tmp_path, 12, 40, 1, "float32")
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store
    [written] = extrapolate(
        store, [40], tmp_path / "by step", output=Output(dtype="float32", rounding="nearest")
    )
    for name, tensor in load_file(written.folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, by_row[name], rtol=1e-6, atol=1e-7)


def grid_run(folder: Path) -> Run:
    """Bfloat16 weights on a grid of 2^-9, so that float16 holds every weight and every difference
    exactly.
    """
    random = np.random.default_rng(23)
    shapes = LLAMA_SHAPES
    line = {n: random.standard_normal(s) for n, s in shapes.items()}
    start = {n: random.integers(-40, 41, s) for n, s in shapes.items()}
    walk = {n: np.zeros(s) for n, s in shapes.items()}
    weights: dict[int, Weights] = {}
    for step in range(13):
        weights[step] = {}
        for name in shapes:
            if step:
                walk[name] += random.standard_normal(shapes[name])
            units = np.clip(np.rint(start[name] + step * line[name] + walk[name]), -127, 127)
            weights[step][name] = torch.from_numpy(units * 2.0**-9).to(torch.bfloat16)
        weights[step][HEAD] = weights[step][EMBEDDING].clone()
    config = LLAMA_CONFIG | {"tie_word_embeddings": True, "dtype": "bfloat16"}
    folders = {s: folder / ("base" if s == 0 else f"run/global_step_{s}") for s in weights}
    for step, tensors in weights.items():
        write_checkpoint(folders[step], tensors, config=config)
    return Run(folder / "run", folder / "base", weights, folders)


def agreement_with_the_released_scripts(rank: int, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    run = grid_run(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(53)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(
        tmp_path / "base"
    )

    def script(name: str, **options: object) -> None:
        arguments = [str(a) for key, value in options.items() for a in (f"--{key}", value)]
        command = [sys.executable, str(Path(REFERENCE, "scripts", name)), *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr

    script(
        "precompute_deltas.py",
        base_model=run.base,
        checkpoint_dir=run.source,
        output_dir=tmp_path / "deltas",
        max_checkpoints=100,
        num_workers=1,
    )
    script(
        "svd_extrapolation.py",
        delta_dir=tmp_path / "deltas",
        base_model=run.base,
        output_dir=tmp_path / "released",
        svd_cache_dir=tmp_path / "svd",
        history_steps=9,
        rank=rank,
        target_steps="40",
        mode="extrapolate",
    )
    released = load_file(tmp_path / "released" / "step40" / "model.safetensors")
    exact = predict(run, tmp_path, 9, 40, rank, "float32")
    errors = norms = 0.0
    for name, tensor in exact.items():
        if name == HEAD:
            continue
        base = run.weights[0][name].reshape(-1).double().numpy()
        [cache] = list((tmp_path / "svd").rglob(f"*{name.replace('.', '_')}*.npz"))
        kept = np.load(cache)
        line = [np.polyval(np.polyfit(np.arange(9), c, 1), 8 + 31) for c in kept["C"].T]
        delta = tensor.reshape(-1).double().numpy() - base
        errors += ((delta - kept["V_r"] @ line) ** 2).sum()
        norms += (delta**2).sum()
    # two float32 computations, and the float32 sum with the base
    assert np.sqrt(errors / norms) < 1e-5
    rounded = predict(run, tmp_path / "again", 9, 40, rank, "bfloat16")
    equal = total = 0
    for name, tensor in released.items():
        equal, total = equal + int((tensor == rounded[name]).sum()), total + tensor.numel()
    assert equal >= 0.999 * total  # but for values on the border between two neighbours


if REFERENCE:
    test_checkpoints_agree_with_the_released_scripts = pytest.mark.parametrize("rank", [1, 2])(
        agreement_with_the_released_scripts
    )
