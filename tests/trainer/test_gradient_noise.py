"""The estimates of noise and signal against simulated gradients whose noise and signal are
known.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relexkit.trainer.credit.gradient_noise import GradientParts, noise_scale


def test_estimates_are_unbiased():
    generator = np.random.default_rng(0)
    truth, spread, prompts, width, parts = 0.3, 1.0, 8, 50, 4
    model = torch.nn.Linear(width, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    found = []
    for _ in range(600):
        recorded = GradientParts(optimizer)
        per_prompt = generator.normal(truth, spread, (prompts, width)).astype(np.float32)
        for part in range(parts):
            model.weight.grad = torch.from_numpy(
                per_prompt[part::parts].sum(axis=0)[None] / prompts
            )
            recorded.end_part()
            assert model.weight.grad is None
        found.append(recorded.end_step(prompts, lambda *values: list(values)))
        np.testing.assert_allclose(
            model.weight.grad[0], per_prompt.mean(axis=0), rtol=1e-4, atol=1e-6
        )
    traces, signals = (
        [entry[f"gradient_noise/{name}"] for entry in found] for name in ("trace", "signal")
    )
    for values, expected in ((traces, width * spread**2), (signals, width * truth**2)):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - expected) < 4 * error
        assert error < 0.05 * expected
    assert noise_scale(traces, signals) == pytest.approx(spread**2 / truth**2, rel=0.1)
    assert noise_scale([1.0], [-0.1]) == float("inf")
