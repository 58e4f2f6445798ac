"""Updates of bfloat16 weights against formulas written out in float64, and whole runs with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from relexkit import TrajectoryStore, checkout
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.bfloat16_adamw import BFloat16AdamW
from relexkit.weights.dtypes import random_bits

ROUNDINGS = ("nearest", "stochastic", "compensated")
PRECISIONS = tuple(f"bfloat16_{rounding}" for rounding in ROUNDINGS)
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def optimizer_of(start: torch.Tensor, rounding: str, seed: int = 3, **options: Any):
    weight = torch.nn.Parameter(start.clone())
    return weight, BFloat16AdamW(
        [("w", weight)], rounding=rounding, seed=seed, **{**OPTIONS, **options}
    )


def gradients(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, generator=generator).bfloat16() * 10.0 ** (-i % 3) for i in range(count)
    ]


def below(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 number next to zero from each value, and the distance to the one after it."""
    spacing = np.exp2(np.floor(np.log2(np.abs(values))) - 7)
    return np.sign(values) * np.floor(np.abs(values) / spacing) * spacing, spacing


def nearest(values: np.ndarray) -> np.ndarray:
    low, spacing = below(np.where(values == 0, 1.0, values))
    up = np.abs(values - low) > spacing / 2
    return np.where(values == 0, 0.0, low + np.sign(values) * up * spacing)


def assert_nearest(found: torch.Tensor, exact: np.ndarray, terms: np.ndarray) -> None:
    """Rounded to nearest, up to what float32 errs by when it adds numbers as large as ``terms``."""
    _, spacing = below(np.where(exact == 0, 1.0, exact))
    error = np.abs(found.detach().double().numpy() - exact)
    assert (error <= spacing / 2 + 2.0**-21 * np.abs(terms)).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_step_equals_the_formula_in_float64(rounding):
    size, beta1, beta2 = 20_000, *OPTIONS["betas"]
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, optimizer = optimizer_of(start, rounding)
    for count, gradient in enumerate(gradients(5, size), start=1):
        kept = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "compensation": 0.0}
        kept |= {name: value.double().numpy() for name, value in optimizer.state[weight].items()}
        w, g = weight.detach().double().numpy(), gradient.double().numpy()
        mean = beta1 * kept["exp_avg"] + (1 - beta1) * g
        square = beta2 * kept["exp_avg_sq"] + (1 - beta2) * g**2
        adam = (mean / (1 - beta1**count)) / (np.sqrt(square / (1 - beta2**count)) + 1e-8)
        update = -1e-3 * (adam + 0.1 * w)
        weight.grad = gradient
        optimizer.step()
        state = optimizer.state[weight]
        assert_nearest(state["exp_avg"], mean, np.abs(kept["exp_avg"]) + np.abs(g))
        assert_nearest(state["exp_avg_sq"], square, square)
        if rounding == "stochastic":
            low, spacing = below(w + update)
            share = np.floor(np.abs(w + update - low) / spacing * 65536)
            up = share + random_bits(3, f"w:{count}", 0, size) >= 65536
            expected = low + np.sign(w + update) * up * spacing
            # float32 errs by a unit of the 16 bits, which turns one draw in 65536
            assert (weight.detach().double().numpy() != expected).sum() <= 3
        else:
            assert_nearest(weight, w + update + kept["compensation"], w)
        if rounding == "compensated":
            left = (w + update + kept["compensation"]) - weight.detach().double().numpy()
            np.testing.assert_allclose(
                state["compensation"].double().numpy(), left, rtol=2**-8, atol=1e-7
            )
        moved = update != 0
        lost, total = optimizer.lost_and_moved()
        assert total == moved.sum()
        assert abs(lost - (moved & (nearest(w + update) == w)).sum()) <= 3  # ties
        assert 0.1 < lost / total < 0.9  # both kinds occur


def test_nearest_is_what_pytorch_does_to_bfloat16_parameters():
    size = 20_000
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, ours = optimizer_of(start, "nearest")
    other = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([other], fused=True, **OPTIONS)
    for gradient in gradients(20, size):
        weight.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    assert other.dtype == theirs.state[other]["exp_avg"].dtype == torch.bfloat16
    # the order of float32 operations differs, which turns a few close decisions
    assert (weight != other).float().mean() < 1e-3


def test_tiny_updates_are_lost_kept_on_average_or_kept():
    """250 steps of 2^-10 each, from 1 where bfloat16 has a spacing of 2^-7 (2^-8 below)."""
    size, options = 4096, {"lr": 2.0**-10, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    found = {}
    for rounding in ROUNDINGS:
        weight, optimizer = optimizer_of(
            torch.ones(size, dtype=torch.bfloat16), rounding, **options
        )
        for _ in range(250):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
        found[rounding] = weight.detach().double()
        assert optimizer.lost_and_moved() == (size, size)
    exact = 1 + 250 * 2.0**-10
    assert torch.equal(found["nearest"], torch.ones(size, dtype=torch.float64))
    assert (found["compensated"] - exact).abs().max() <= 2.0**-8
    # each step has a variance of at most its length times the spacing: sums of 250, means of 4096
    deviation = (250 * 2.0**-10 * 2.0**-7 / size) ** 0.5
    assert abs(float(found["stochastic"].mean()) - exact) < 5 * deviation
    assert found["stochastic"].std() > 0


def test_random_bits_belong_to_seed_and_step():
    def run(seed: int) -> torch.Tensor:
        weight, optimizer = optimizer_of(torch.ones(64, dtype=torch.bfloat16), "stochastic", seed)
        taken = []
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            before = weight.detach().clone()
            optimizer.step()
            taken.append(weight.detach() - before)
        assert not torch.equal(*taken)
        return torch.stack(taken)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def settings(base: Path, output: Path, precision: str, **options: Any) -> GRPOConfig:
    defaults = {
        "task": {"name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make"},
        "max_steps": 3,
        "generation_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-4,
        "beta": 0.1,
        "device": "cpu",
    }
    return GRPOConfig(
        model=str(base), output=str(output), precision=precision, **{**defaults, **options}
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bfloat16_run_is_recorded_exactly_and_goes_on_to_the_same_bits(base, tmp_path, precision):
    whole = train(settings(base, tmp_path / "whole", precision))
    for steps in (2, 3):
        parted = train(settings(base, tmp_path / "parted", precision, max_steps=steps))
    stores = [TrajectoryStore(folder / "run.zarr") for folder in (whole, parted)]
    np.testing.assert_array_equal(stores[0].checksums(), stores[1].checksums())
    assert {part.encoding for part in stores[0].layout.parts} == {"sparse"}
    final, started = (load_file(folder / "model.safetensors") for folder in (whole / "final", base))
    recorded = load_file(checkout(stores[0], 3, tmp_path / "three") / "model.safetensors")
    at_start = load_file(checkout(stores[0], 0, tmp_path / "base") / "model.safetensors")
    resumed = load_file(parted / "final" / "model.safetensors")
    for name, tensor in final.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(recorded[name], tensor), name
        assert torch.equal(resumed[name], tensor), name
        assert torch.equal(at_start[name], started[name].bfloat16()), name
    entries = read_log(whole)
    assert entries[0]["kl"] == 0  # the reference has the same precision
    assert all(0.2 < entry["lost_updates"] < 1 for entry in entries)
    np.testing.assert_array_equal(
        stores[0].metrics()["lost_updates"], [entry["lost_updates"] for entry in entries]
    )
