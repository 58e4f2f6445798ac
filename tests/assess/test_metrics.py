from __future__ import annotations

import numpy as np
import pytest

from relexkit.assess.metrics import Informative, informative_steps
from relexkit.gram_matrix.rates import learning_rates

NAN = float("nan")


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"frac_reward_zero_std": [1.0, 0.5, NAN, 0.0]}, Informative(2, 3, "frac_reward_zero_std")),
        (
            {"num_informative_groups": [0.0, 3.0, 1.0, 0.0], "reward_std": [1.0] * 4},
            Informative(2, 4, "num_informative_groups"),
        ),
        (
            {"reward_std": [NAN] * 4, "grad_norm": [0.0, 2.0, 0.0, 0.0]},
            Informative(1, 4, "grad_norm"),
        ),
        ({"reward": [1.0, 1.0, 1.0, 1.0]}, None),
        ({}, None),
    ],
)
def test_informative_steps(metrics: dict, expected: Informative | None) -> None:
    assert (
        informative_steps({name: np.array(values) for name, values in metrics.items()}) == expected
    )


def test_a_constant_or_unknown_rate_is_no_schedule() -> None:
    steps = np.arange(1, 6)
    assert learning_rates(steps, {}) is None
    assert learning_rates(steps, {"learning_rate": np.full(5, 3e-6)}) is None
    assert learning_rates(steps, {"learning_rate": np.array([3e-6, NAN, NAN, NAN, NAN])}) is None


def test_rates_between_recorded_steps_are_interpolated() -> None:
    rates = learning_rates(np.array([2, 4, 8]), {"learning_rate": np.array([1.0, 3.0, NAN])})
    assert rates is not None
    np.testing.assert_allclose(rates, [1, 1, 2, 3, 3, 3, 3, 3])


def test_a_linear_decay_goes_on_to_zero() -> None:
    steps = np.arange(5, 55, 5)
    rates = learning_rates(steps, {"learning_rate": 1 - steps / 100})
    assert rates is not None
    np.testing.assert_allclose(rates[4:100], 1 - np.arange(5, 101) / 100, atol=1e-12)
    assert rates[-1] == 0
    # the model keeps the last rate after the end


def test_a_cosine_keeps_its_last_rate() -> None:
    steps = np.arange(1, 41)
    rates = learning_rates(steps, {"learning_rate": 1 + np.cos(np.pi * steps / 20)})
    assert rates is not None
    assert len(rates) == 40
