"""Written checkpoints against float64 predictions from the raw tensors, recorded bits,
transformers, and crashes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import BUFFER, EMBEDDING, HEAD, MASK, Run, Weights, same_bits, write_checkpoint, write_run
from safetensors.torch import load_file

from relexkit import (
    Compute,
    ExtrapolationError,
    Options,
    Output,
    Prediction,
    RelexkitError,
    StoreError,
    TrajectoryStore,
    apply,
    checkout,
    extrapolate,
    gram,
    import_checkpoints,
    predict_weights,
)
from relexkit.materialize import round_checkpoint
from relexkit.store.encodings.table import ENCODINGS
from relexkit.weights.safetensors_io import SafetensorsFolderWriter

BIG = {
    EMBEDDING: (700, 301),
    "model.layers.0.mlp.up_proj.weight": (3, 5),
    "model.norm.weight": (97,),
}
CASES: dict[str, dict[str, Any]] = {
    "sparse": {"dtype": "bfloat16", "density": 0.05},
    "sparse float16": {"dtype": "float16", "density": 0.05},
    "exact": {"dtype": "float32", "density": 1.0},
    "exact bfloat16": {"dtype": "bfloat16", "density": 1.0},
    "float": {"dtype": "float32", "density": 1.0},
}


def make(folder: Path, case: str, **options: Any) -> tuple[Run, TrajectoryStore]:
    run = write_run(
        folder, **({"motion": "drift", "steps": (2, 3, 7, 8, 20)} | CASES[case] | options)
    )
    encoding = case.split()[0]
    asked: dict[str, Any] = {"encoding": "auto" if encoding == "sparse" else encoding}
    if encoding == "float":
        asked["mantissa_bits"] = 23
    store = import_checkpoints(run.source, folder / "run.zarr", base=run.base, **asked).store
    assert {p.encoding for p in store.layout.parts if p.encoding != "fixed"} == {encoding}
    return run, store


def tensors_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def direct_delta(run: Run, name: str, steps: list[int], target: float, rank: int) -> np.ndarray:
    """RELEX with a line on the real steps, from numpy's SVD in float64."""
    deltas = np.stack([run.delta(s, name) for s in steps])
    if not deltas.any():
        return deltas[0]
    right = np.linalg.svd(deltas, full_matrices=False)[2][:rank]
    return (
        np.array([np.polyval(np.polyfit(steps, c, 1), target) for c in (deltas @ right.T).T])
        @ right
    )


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize("until", [None, 7])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_float32_predictions_equal_a_float64_svd(
    case: str, rank: int, until: int | None, tmp_path: Path
) -> None:
    run, store = make(
        tmp_path, case, head="own", buffers=True, frozen=["model.layers.1.mlp.down_proj.weight"]
    )
    [written] = extrapolate(
        store,
        [60],
        tmp_path / "out",
        Prediction(until=until, options=Options(rank=rank)),
        output=Output(rounding="nearest", dtype="float32"),
    )
    steps = [s for s in run.steps if until is None or s <= until]
    found, squares = tensors_of(written.folder), np.zeros(2)
    assert set(found) == set(run.weights[0])
    for name, base in run.weights[0].items():
        if not base.is_floating_point():
            assert same_bits(found[name], base)
            continue
        assert found[name].dtype == torch.float32
        assert found[name].shape == base.shape
        expected = direct_delta(run, name, steps, 60, rank)
        delta = found[name].reshape(-1).double().numpy() - base.reshape(-1).double().numpy()
        squares += ((delta - expected) ** 2).sum(), (expected**2).sum()
        # what float32 weights can hold of the delta, and 1e-5 for sums in float32
        limit = 1e-5 * np.linalg.norm(expected) + 2.0**-24 * np.linalg.norm(
            base.double().numpy() + 0.1
        )
        assert np.linalg.norm(delta - expected) <= limit, name
    assert np.sqrt(squares[0] / squares[1]) < 1e-4  # the contract is 1e-3


@pytest.mark.parametrize("case", ["sparse", "sparse float16", "exact bfloat16"])
def test_sixteen_bit_predictions_are_the_nearest_to_a_float64_svd(
    case: str, tmp_path: Path
) -> None:
    run, store = make(tmp_path, case)
    [written] = extrapolate(store, [60], tmp_path / "out", output=Output(rounding="nearest"))
    found, differ, total = tensors_of(written.folder), 0, 0
    for name, base in run.weights[0].items():
        exact = base.reshape(-1).double() + torch.from_numpy(
            direct_delta(run, name, run.steps, 60, 1)
        )
        expected = exact.to(base.dtype)
        assert found[name].dtype == base.dtype
        off = found[name].reshape(-1) != expected
        # values that lie on the border between two neighbours may fall to either side
        dropped = 16 if base.dtype == torch.bfloat16 else 13
        spacing = (
            torch.from_numpy(np.spacing(expected.float().abs().numpy())) * 2.0**dropped
        ).clamp(min=2.0**-24)
        assert ((found[name].reshape(-1).double() - exact).abs() <= 0.5001 * spacing).all(), name
        differ, total = differ + int(off.sum()), total + off.numel()
    assert differ <= 2e-3 * total


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("case", ["sparse", "float"])
def test_several_targets_in_one_call_equal_single_calls(
    case: str, rank: int, tmp_path: Path
) -> None:
    _, store = make(tmp_path, case)
    targets = [9, 21.5, 400]
    together = extrapolate(
        store,
        targets,
        tmp_path / "together",
        Prediction(options=Options(rank=rank)),
        output=Output(seed=5),
    )
    assert [p.folder.name for p in together] == ["step-9", "step-21.5", "step-400"]
    for target, prediction in zip(targets, together, strict=True):
        [single] = extrapolate(
            store,
            [target],
            tmp_path / "single",
            Prediction(options=Options(rank=rank)),
            output=Output(seed=5),
        )
        assert (single.folder / "model.safetensors").read_bytes() == (
            prediction.folder / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("case", ["sparse", "sparse float16", "exact bfloat16"])
def test_hold_reproduces_the_last_step_bit_for_bit(case: str, tmp_path: Path) -> None:
    run, store = make(tmp_path, case, head="tied")
    for until, step in ((None, 20), (7, 7)):
        [written] = extrapolate(
            store,
            [900],
            tmp_path / str(step),
            Prediction(method="hold", until=until),
            output=Output(rounding="nearest"),
        )
        found = tensors_of(written.folder)
        for name, recorded in run.weights[step].items():
            assert same_bits(found[name], recorded), name


def test_a_negative_zero_that_never_moved_stays_negative(tmp_path: Path) -> None:
    """A base of -0.0 plus a delta of nothing is -0.0: predictions leave alone what the run left
    alone.
    """
    for case in ("sparse", "exact", "float"):
        dtype = getattr(torch, CASES[case]["dtype"])
        run = write_run(tmp_path / case, motion="drift", steps=(2, 3), **CASES[case])
        for folder in run.folders.values():
            weights = load_file(folder / "model.safetensors") | {
                "model.zeros": torch.tensor([-0.0, 0.0, -0.0], dtype=dtype)
            }
            write_checkpoint(folder, weights)
        encoding: Any = "auto" if case == "sparse" else case
        store = import_checkpoints(
            run.source, tmp_path / f"{case}.zarr", base=run.base, encoding=encoding
        ).store
        [written] = extrapolate(store, [9], tmp_path / f"out {case}")
        assert torch.signbit(tensors_of(written.folder)["model.zeros"]).tolist() == [
            True,
            False,
            True,
        ], case


@pytest.mark.parametrize("case", ["sparse", "exact bfloat16", "float"])
def test_stochastic_rounding_does_not_depend_on_the_blocking(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = make(tmp_path, case, shapes=BIG, extras=False)
    results = []
    for budget in (1, 2**22, 2**30):
        [p] = extrapolate(
            store,
            [60],
            tmp_path / str(budget),
            output=Output(dtype="bfloat16", seed=3),
            compute=Compute(memory_budget_bytes=budget),
        )
        results.append((p.folder / "model.safetensors").read_bytes())
    for setting, value in (("sums._WORKERS", 1), ("moved._ENTRIES", 100), ("moved._PIECE", 3000)):
        monkeypatch.setattr(f"relexkit.materialize.{setting}", value)
        [p] = extrapolate(store, [60], tmp_path / setting, output=Output(dtype="bfloat16", seed=3))
        results.append((p.folder / "model.safetensors").read_bytes())
    for kind in ENCODINGS.values():
        monkeypatch.setattr(kind, "part_numel", 70_001)
    options: dict[str, Any] = {"encoding": "float", "mantissa_bits": 23} if case == "float" else {}
    if case == "exact bfloat16":
        options = {"encoding": "exact"}
    cut = import_checkpoints(run.source, tmp_path / "cut.zarr", base=run.base, **options).store
    assert len(cut.layout.parts) > 2
    # the same weights on both, because Gram matrices agree to 1e-7 and not to the last bit
    weights = predict_weights(gram(store), [60.0])
    monkeypatch.setattr("relexkit.materialize.planning.predict_weights", lambda *_, **__: weights)
    [p] = extrapolate(cut, [60], tmp_path / "cut", output=Output(dtype="bfloat16", seed=3))
    results.append((p.folder / "model.safetensors").read_bytes())
    assert len(set(results)) == 1
    [p] = extrapolate(store, [60], tmp_path / "seed", output=Output(dtype="bfloat16", seed=4))
    assert (p.folder / "model.safetensors").read_bytes() != results[0]


def test_stochastic_rounding_takes_neighbours_and_keeps_the_mean(tmp_path: Path) -> None:
    still = "model.layers.0.mlp.up_proj.weight"
    run, store = make(tmp_path, "sparse", frozen=[still])
    [p] = extrapolate(store, [60], tmp_path / "exact", output=Output(dtype="float32"))
    exact = tensors_of(p.folder)
    mean = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in exact.items()}
    for seed in range(40):
        [p] = extrapolate(store, [60], tmp_path / f"s{seed}", output=Output(seed=seed))
        assert json.loads((p.folder / "relexkit.json").read_text())["seed"] == seed
        found = tensors_of(p.folder)
        assert same_bits(found[still], run.weights[0][still])
        for name, tensor in found.items():
            spacing = exact[name].abs().clamp(min=1e-30) * 2.0**-7
            assert ((tensor.float() - exact[name]).abs() <= spacing).all()
            mean[name] += tensor.double() / 40
    error = torch.cat(
        [((mean[n] - exact[n].double()) / (exact[n].abs() + 1e-9)).reshape(-1) for n in exact]
    )
    # one draw is off by at most 2**-7; the mean of 40 draws and 1,800 weights by its 1/270th, three
    # times over
    assert error.mean().abs() < 3 * 2.0**-7 / np.sqrt(40 * error.numel())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("density", [0.02, 1.0])
def test_checkout_is_bit_for_bit_after_the_folders_are_gone(
    dtype: str, density: float, tmp_path: Path
) -> None:
    """Bits of every kind: -0.0, subnormals, sign flips, jumps to half of the largest number."""
    run = write_run(
        tmp_path, dtype=dtype, density=density, motion="bits", head="tied", buffers=True, seed=2
    )
    store = import_checkpoints(
        run.source, tmp_path / "run.zarr", base=run.base, encoding="exact"
    ).store
    shutil.rmtree(run.source)
    shutil.rmtree(tmp_path / "base")
    kinds = torch.cat(
        [
            t.reshape(-1).float()
            for w in run.weights.values()
            for t in w.values()
            if t.is_floating_point()
        ]
    )
    assert (torch.signbit(kinds) & (kinds == 0)).any()
    assert ((kinds != 0) & (kinds.abs() < torch.finfo(getattr(torch, dtype)).smallest_normal)).any()
    for step, weights in run.weights.items():
        found = tensors_of(checkout(store, step, tmp_path / f"out-{step}"))
        assert list(found.keys() ^ weights.keys()) == []
        for name, tensor in weights.items():
            assert same_bits(found[name], tensor), (step, name)
        assert json.loads((tmp_path / f"out-{step}" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", ["exact", "float"])
def test_parts_that_hold_one_value_only(asked: str, dtype: str, tmp_path: Path) -> None:
    """A base of zeros, a step that moves every weight by minus one unit, one that moves nothing:
    data, not missing chunks.
    """
    kind, integer = getattr(torch, dtype), {"float32": torch.int32, "bfloat16": torch.int16}[dtype]
    zeros, ones = torch.zeros(40, dtype=kind), torch.linspace(0.1, 0.9, 40).to(kind)
    for case, base in {"zeros": zeros, "ones": ones}.items():
        steps = {
            1: base,
            2: (ones.view(integer) - 1).view(kind),
            3: zeros,
            4: (ones.view(integer) - 1).view(kind),
        }
        for step, tensor in {0: base, **steps}.items():
            folder = tmp_path / case / ("base" if step == 0 else f"run/step_{step}")
            write_checkpoint(folder, {"w": tensor}, config={})
        options: dict[str, Any] = {"encoding": asked} | (
            {"mantissa_bits": 23} if asked == "float" else {}
        )
        path = tmp_path / f"{case}.zarr"
        store = import_checkpoints(
            tmp_path / case / "run", path, base=tmp_path / case / "base", **options
        ).store
        store.verify()
        assert gram(store).moved[0, 0] == 0
        for step, tensor in {0: base, **steps}.items():
            assert torch.equal(
                tensors_of(checkout(store, step, tmp_path / f"{case}-{step}"))["w"], tensor
            ), (case, step)


@pytest.mark.parametrize("bits", [3, 10, 23])
def test_checkout_of_float_rows_keeps_the_stated_mantissa_bits(bits: int, tmp_path: Path) -> None:
    run = write_run(tmp_path, dtype="float32", motion="drift", density=1.0, seed=4)
    store = import_checkpoints(
        run.source, tmp_path / "run.zarr", base=run.base, encoding="float", mantissa_bits=bits
    ).store
    for step in run.steps:
        folder = checkout(store, step, tmp_path / f"out-{step}")
        assert (
            json.loads((folder / "relexkit.json").read_text())["exact"]
            == f"to {bits} mantissa bits of the delta"
        )
        for name, tensor in tensors_of(folder).items():
            error = np.abs(
                tensor.reshape(-1).double().numpy()
                - run.weights[step][name].reshape(-1).double().numpy()
            )
            sum_rounding = 2.0**-23 * np.maximum(
                np.abs(tensor.reshape(-1).double().numpy()), np.abs(run.delta(step, name))
            )
            assert (
                error <= np.abs(run.delta(step, name)) * 2.0 ** -(bits + 1) + sum_rounding
            ).all()
    for name, tensor in tensors_of(checkout(store, 0, tmp_path / "base-again")).items():
        assert same_bits(tensor, run.weights[0][name])


def test_tied_weights_and_buffers_are_in_the_output(tmp_path: Path) -> None:
    run, store = make(tmp_path, "sparse", head="tied", buffers=True)
    [p] = extrapolate(store, [60], tmp_path / "out", output=Output(seed=1))
    found = tensors_of(p.folder)
    assert same_bits(found[HEAD], found[EMBEDDING])
    assert not same_bits(found[EMBEDDING], run.weights[0][EMBEDDING])
    for name in (BUFFER, MASK):
        assert same_bits(found[name], run.weights[0][name])


def test_an_output_dtype_is_written_into_the_config(tmp_path: Path) -> None:
    run = write_run(tmp_path, motion="drift", density=0.05, steps=(2, 3))
    for folder in run.folders.values():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    store = import_checkpoints(run.source, tmp_path / "run.zarr", base=run.base).store
    [p] = extrapolate(store, [60], tmp_path / "out", output=Output(dtype="float16"))
    config = json.loads((p.folder / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    assert config["vocab_size"] == 53
    assert (p.folder / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    assert tensors_of(p.folder)[EMBEDDING].dtype == torch.float16


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("head", [None, "tied", "own"])
def test_a_prediction_loads_and_generates(
    head: str | None, dtype: str | None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    _, store = make(tmp_path, "sparse", head=head, extras=False)
    [p] = extrapolate(store, [60], tmp_path / "out", output=Output(dtype=dtype))
    loaded: Any = AutoModelForCausalLM.from_pretrained(p.folder, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state, found = model.state_dict(), tensors_of(p.folder)
    assert state[EMBEDDING].dtype == getattr(torch, dtype or "bfloat16")
    for name, tensor in found.items():
        assert same_bits(state[name], tensor)
    tokens = model.generate(
        torch.tensor([[1, 5, 7]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    assert tokens.shape == (1, 7)


@pytest.mark.parametrize("case", ["sparse", "float"])
@pytest.mark.parametrize("head", ["tied", "own"])
def test_apply_gives_a_model_the_weights_of_the_written_folder(
    head: str, case: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run, store = make(tmp_path, case, head=head, extras=False)
    model = AutoModelForCausalLM.from_pretrained(run.folders[2])
    weights = predict_weights(gram(store), [60.0, 90.0], Prediction(options=Options(rank=2)))
    for index, target in enumerate((60, 90)):
        [p] = extrapolate(
            store,
            [target],
            tmp_path / "out",
            Prediction(options=Options(rank=2)),
            output=Output(seed=6),
        )
        apply(store, model, weights[index], seed=6)
        state = model.state_dict()
        for name, tensor in tensors_of(p.folder).items():
            assert same_bits(state[name], tensor)
    apply(store, model, np.zeros_like(weights[0]))
    for name, tensor in run.weights[0].items():
        assert same_bits(model.state_dict()[name], tensor)


def test_apply_reaches_a_head_that_the_model_does_not_tie(tmp_path: Path) -> None:
    """Equal in every step, so tied in the store; but this model keeps two tensors."""

    class Untied(torch.nn.Module):
        def __init__(self, tensors: Weights):
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name.replace(".", "_"), tensor.clone())

        def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
            return {name: getattr(self, name.replace(".", "_")) for name in names}

    run, store = make(tmp_path, "sparse", head="tied")
    names = list(run.weights[0])
    weights = predict_weights(gram(store), [60.0])
    model = Untied(run.weights[0])
    apply(store, model, weights[0])
    assert not same_bits(model.state_dict()[EMBEDDING], run.weights[0][EMBEDDING])
    assert same_bits(model.state_dict()[HEAD], model.state_dict()[EMBEDDING])

    names = [
        n for n in run.weights[0] if n != HEAD
    ]  # and one that has only the embedding, as a model without a head
    other = Untied(run.weights[0])
    apply(store, other, weights[0])
    assert same_bits(other.state_dict()[EMBEDDING], model.state_dict()[EMBEDDING])


def test_apply_refuses_a_model_that_does_not_fit(tmp_path: Path) -> None:
    _, store = make(tmp_path, "sparse", extras=False)
    weights = predict_weights(gram(store), [60.0])[0]
    with pytest.raises(
        RelexkitError, match=r"tensor 'model\.\S+' of shape \[\d+.*\]: the model lacks it"
    ):
        apply(store, torch.nn.Linear(2, 2), weights)

    class Reshaped(torch.nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
            return {t.name: torch.zeros((*t.shape, 1)) for t in store.layout.tensors}

    with pytest.raises(RelexkitError, match=r"the model has it with shape \[\d+(, \d+)?, 1\]"):
        apply(store, Reshaped(), weights)


# -- rounding of any checkpoint --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "sharded", "bin"])
def test_round_checkpoint(layout: str, tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        dtype="float32",
        dtypes={"model.norm.weight": "bfloat16"},
        layout=layout,
        buffers=True,
        steps=(1,),
        motion="drift",
        density=1.0,
    )
    source, weights = run.folders[1], run.weights[1]
    folder = round_checkpoint(source, tmp_path / "nearest", dtype="bfloat16", rounding="nearest")
    for name, tensor in tensors_of(folder).items():
        expected = (
            weights[name].to(torch.bfloat16) if weights[name].is_floating_point() else weights[name]
        )
        assert same_bits(tensor, expected)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    one, same, other = (
        tensors_of(round_checkpoint(source, tmp_path / n, seed=s))
        for n, s in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(same_bits(one[n], same[n]) for n in one)
    assert not all(same_bits(one[n], other[n]) for n in one)
    for name, tensor in one.items():
        if tensor.is_floating_point():
            exact = weights[name].float()
            assert ((tensor.float() - exact).abs() <= exact.abs() * 2.0**-7).all()
    widened = tensors_of(round_checkpoint(folder, tmp_path / "wide", dtype="float32"))
    for name, tensor in widened.items():
        if tensor.is_floating_point():
            assert same_bits(tensor, weights[name].to(torch.bfloat16).float())


def test_round_refuses_what_the_format_cannot_hold_and_leaves_nothing(tmp_path: Path) -> None:
    for name, value, message in (
        (
            "big",
            1e6,
            r"tensor 'w': element 2 has the value (1e\+06|1000000\.0), which float16 cannot hold",
        ),
        (
            "nan",
            float("nan"),
            r"tensor 'w' is NaN or infinite at element 2; expected finite weights",
        ),
    ):
        write_checkpoint(tmp_path / name, {"w": torch.tensor([0.0, 1.0, value])}, config={})
        with pytest.raises(RelexkitError, match=message):
            round_checkpoint(tmp_path / name, tmp_path / "out", dtype="float16")
        assert listing(tmp_path) & {"out", ".out.partial"} == set()
    with pytest.raises(
        RelexkitError, match="--dtype int8 is unknown; choose one of float32, bfloat16, float16"
    ):
        round_checkpoint(tmp_path / "big", tmp_path / "out", dtype="int8")


# -- folders ---------------------------------------------------------------------------------------


def test_a_rerun_skips_a_finished_folder_and_refuses_another(tmp_path: Path) -> None:
    _, store = make(tmp_path, "sparse")
    out = tmp_path / "out"
    [first] = extrapolate(store, [60], out)
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = extrapolate(store, [60, 70], out)
    assert [(p.target, p.already) for p in again] == [(60, True), (70, False)]
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    for prediction, output in (
        (Prediction(), Output(seed=1)),
        (Prediction(options=Options(rank=2)), Output()),
        (Prediction(scale=0.5), Output()),
        (Prediction(until=7), Output()),
        (Prediction(method="hold"), Output()),
    ):
        with pytest.raises(
            RelexkitError,
            match=r"step-60: exists and holds something else; remove it or choose another -o",
        ):
            extrapolate(store, [60], out, prediction, output=output)
    checkout(store, 2, tmp_path / "two")
    checkout(store, 2, tmp_path / "two")
    with pytest.raises(RelexkitError, match="exists and holds something else"):
        checkout(store, 3, tmp_path / "two")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(RelexkitError, match="exists and holds something else"):
        checkout(store, 3, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    checkout(store, 3, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    _, store = make(tmp_path, "sparse")
    left = tmp_path / "out" / ".step-60.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "junk").mkdir()
    extrapolate(store, [60], tmp_path / "out")
    assert listing(tmp_path / "out") == {"step-60"}
    assert "junk" not in listing(tmp_path / "out" / "step-60")


def test_large_steps_keep_all_their_digits(tmp_path: Path) -> None:
    _, store = make(tmp_path, "sparse")
    written = extrapolate(store, [1_000_000, 1_000_001], tmp_path / "out", Prediction(scale=1e-6))
    assert [p.folder.name for p in written] == ["step-1000000", "step-1000001"]
    assert "step 1000001" in (written[1].folder / "README.md").read_text()


def test_the_same_target_twice_is_refused_or_written_once(tmp_path: Path) -> None:
    _, store = make(tmp_path, "sparse")
    [alone] = extrapolate(store, [60], tmp_path / "alone")
    with contextlib.suppress(ExtrapolationError):
        extrapolate(store, [60, 60.0], tmp_path / "out")
        assert listing(tmp_path / "out") == {"step-60"}
        assert (tmp_path / "out/step-60/model.safetensors").read_bytes() == (
            alone.folder / "model.safetensors"
        ).read_bytes()
    assert listing(tmp_path / "out") <= {"step-60"}


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "replace"])
def test_a_full_disk_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = make(tmp_path, "sparse")
    gram(store)
    real, calls = getattr(os, call), 0

    def full(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (0 if call == "replace" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(f"relexkit.weights.safetensors_io.os.{call}", full)
    actions = (
        lambda: extrapolate(store, [60, 70], tmp_path / "out"),
        lambda: checkout(store, 3, tmp_path / "out"),
    )
    for action in actions:
        calls = 0 if action is actions[0] else 1
        with pytest.raises(
            StoreError,
            match=(
                r"cannot be written \(No space left on device\); nothing was left there: free space"
            ),
        ):
            action()
        assert listing(tmp_path / "out") == set()
        assert not (tmp_path / ".out.partial").exists()
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) <= len(before)  # files that were open are closed
    extrapolate(store, [60, 70], tmp_path / "out")
    assert listing(tmp_path / "out") == {"step-60", "step-70"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, StoreError])
def test_an_exception_midway_leaves_nothing(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = make(tmp_path, "sparse")
    real, calls = SafetensorsFolderWriter.write, 0

    def broken(self: SafetensorsFolderWriter, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise error("now")
        real(self, *given)

    monkeypatch.setattr(SafetensorsFolderWriter, "write", broken)
    with pytest.raises(error):
        extrapolate(store, [60, 70], tmp_path / "out")
    assert listing(tmp_path / "out") == set()
    calls = 0
    with pytest.raises(error):
        checkout(store, 3, tmp_path / "three")
    assert listing(tmp_path) == {"base", "run", "run.zarr", "out"}


def test_a_prediction_beyond_the_format_names_the_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    _, store = make(tmp_path, "sparse float16")
    with pytest.raises(
        RelexkitError,
        match=r"tensor 'model\.\S+': element \d+ has the value .*, which float16 cannot hold",
    ):
        extrapolate(store, [60, 1e12], tmp_path / "out")
    assert listing(tmp_path / "out") == set()


def test_refusals_come_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = make(tmp_path, "sparse")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pass over the weights began")

    monkeypatch.setattr(TrajectoryStore, "read_log", refuse)
    for message, prediction, dtype in (
        ("--dtype int8 is unknown", Prediction(), "int8"),
        ("--method magic is unknown", Prediction(method="magic"), None),
        (
            "--alpha has no effect with --method relex",
            Prediction(options=Options(alpha=2.0)),
            None,
        ),
        ("--until 1 keeps no step", Prediction(until=1), None),
    ):
        with pytest.raises(RelexkitError, match=message):
            extrapolate(store, [60], tmp_path / "out", prediction, output=Output(dtype=dtype))
    with pytest.raises(
        StoreError, match=r"step 4 is not recorded in .*; it holds 5 steps from 2 to 20"
    ):
        checkout(store, 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_chunk_names_step_and_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    _, store = make(tmp_path, "sparse")
    gram(store)
    [chunk] = [p for p in Path(store.path, "updates/0/data/c/2").rglob("*") if p.is_file()]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    for action in (
        lambda: extrapolate(TrajectoryStore(store.path), [60], tmp_path / "out"),
        lambda: checkout(TrajectoryStore(store.path), 8, tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match=r"step 7, tensor 'model\.\S+': cannot be read"):
            action()
        assert listing(tmp_path / "out") == set()
    checkout(TrajectoryStore(store.path), 3, tmp_path / "three")  # earlier steps do not need it


def test_model_card(tmp_path: Path) -> None:
    run, store = make(tmp_path, "sparse")
    [p] = extrapolate(
        store,
        [60],
        tmp_path / "out",
        Prediction(until=8, options=Options(rank=2, window=3), scale=0.5),
        output=Output(seed=11),
    )
    card = (p.folder / "README.md").read_text()
    shares, total = 0.0, 0.0
    for name in run.weights[0]:
        energy = (
            np.linalg.svd(np.stack([run.delta(s, name) for s in (2, 3, 7, 8)]), compute_uv=False)
            ** 2
        )
        shares, total = shares + energy[:1].sum(), total + energy.sum()
    for said in (
        "# Extrapolated checkpoint, step 60",
        "| method | relex (rank 2, fit linear, window 3, axis step) |",
        "| steps used | 4, from 2 to 8 |",
        "| target step | 60 |",
        "| scale | 0.5 |",
        "| fitted per | tensor |",
        "as recorded, stochastic (seed 11)",
        str(run.base),
        store.attributes["base"]["sha256"],
        f"| variance on each tensor's first direction | {100 * shares / total:.1f} % |",
        'library_name: "transformers"',
        'tags: ["relexkit", "extrapolated"]',
    ):
        assert said in card, said
    provenance = json.loads((p.folder / "relexkit.json").read_text())
    assert provenance["steps"] == [2, 3, 7, 8]
    assert provenance["rank"] == 2
    [p] = extrapolate(store, [60], tmp_path / "held", Prediction(method="hold"))
    card = (p.folder / "README.md").read_text()
    assert "| method | hold |" in card
    assert "variance" not in card


# -- crashes ---------------------------------------------------------------------------------------

CHILD = """
import sys
import relexkit.materialize, relexkit.checkpoints.formats.huggingface
from relexkit import TrajectoryStore, checkout, extrapolate
store, out = TrajectoryStore(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[3] == "extrapolate":
    extrapolate(store, [60, 70], out)
else:
    checkout(store, 20, out)
"""


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["extrapolate", "checkout"])
def test_killed_at_random_moments_the_same_command_completes_it(
    command: str, kills: int, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    _, store = make(tmp_path, "sparse", shapes={EMBEDDING: (700, 1301)}, extras=False)
    out = tmp_path / "out"

    def start() -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, store.path, str(out), command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        children.append(child)
        return child

    def go(child: subprocess.Popen) -> None:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"ready\n"
        child.stdin.write(b"\n")
        child.stdin.flush()

    waiting = [start() for _ in range(kills + 1)]
    timed = waiting.pop()
    go(timed)
    began = time.monotonic()
    assert timed.wait() == 0
    took = time.monotonic() - began
    expected = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    shutil.rmtree(out)
    shutil.rmtree(Path(store.path, "gram"), ignore_errors=True)
    chance = random.Random(command)
    for child in waiting:
        go(child)
        time.sleep(chance.random() * took)
        child.kill()
        child.wait()
        complete = [out] if command == "checkout" else [out / "step-60", out / "step-70"]
        for folder in complete:
            if folder.exists():
                for path in folder.rglob("*"):
                    assert path.read_bytes() == expected[path.relative_to(out)]
                shutil.rmtree(folder)
        assert TrajectoryStore(store.path).steps.tolist() == [2, 3, 7, 8, 20]
    if command == "extrapolate":
        extrapolate(store, [60, 70], out)
    else:
        checkout(store, 20, out)
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == expected
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_size_limit_is_a_stated_error(tmp_path: Path) -> None:
    """The kernel's own refusal to grow a file, in a process that has such a limit."""
    _, store = make(tmp_path, "sparse", shapes=BIG, extras=False)
    gram(store)
    code = (
        "import resource, sys\nfrom relexkit import cli\nresource.setrlimit(resource.RLIMIT_FSIZE,"
        " (100_000, 100_000))\nsys.exit(cli.main(sys.argv[1:]))"
    )
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "extrapolate",
            store.path,
            "--to",
            "60",
            "-o",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert len(ran.stderr.strip().splitlines()) == 1
    assert "cannot be written" in ran.stderr
    assert "nothing was left there" in ran.stderr
    assert listing(tmp_path / "out") == set()


def test_checkout_of_another_store_is_not_taken_for_finished(tmp_path: Path) -> None:
    """Two runs of the same base in folders of the same name say the same of themselves, but for
    their weights.
    """
    first = write_run(tmp_path / "a", steps=(1, 2), seed=3)
    second = write_run(tmp_path / "b", steps=(1, 2), seed=3, density=0.5)
    stores = [
        import_checkpoints(r.source, tmp_path / f"{n}.zarr", base=r.base).store
        for n, r in (("a", first), ("b", second))
    ]
    checkout(stores[0], 2, tmp_path / "out")
    with pytest.raises(RelexkitError, match="exists and holds something else"):
        checkout(stores[1], 2, tmp_path / "out")


def test_a_float32_prediction_is_not_rounded_by_the_base_configuration(tmp_path: Path) -> None:
    run = write_run(tmp_path, dtype="float32", motion="drift", density=1.0, base_dtype="bfloat16")
    for folder in run.folders.values():
        if folder != run.base:
            (folder / "config.json").unlink(missing_ok=True)
    config = json.loads((run.base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (run.base / "config.json").write_text(json.dumps(config))
    store = import_checkpoints(run.source, tmp_path / "s.zarr", base=run.base).store
    (written,) = extrapolate(store, [60], tmp_path / "out")
    assert json.loads((written.folder / "config.json").read_text())["dtype"] == "float32"
