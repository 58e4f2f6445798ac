"""Number formats against torch, and the distribution of stochastic rounding against its
definition.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relexkit.errors import RelexkitError
from relexkit.weights.dtypes import (
    bits_dtype,
    nonfinite_index,
    random_bits,
    round_bits,
    round_to_mantissa_bits,
    to_float32,
    widen_bits,
)

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIXTEEN = ("bfloat16", "float16")
ALL_16_BITS = np.arange(2**16, dtype=np.uint16)
LARGEST = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0}


def torch_values(bits: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16).copy()).view(TORCH[dtype]).to(torch.float32).numpy()


def torch_nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    return (
        torch.from_numpy(values.copy()).to(TORCH[dtype]).view(torch.int16).numpy().view(np.uint16)
    )


def finite_bits(dtype: str) -> np.ndarray:
    return ALL_16_BITS[np.isfinite(torch_values(ALL_16_BITS, dtype))]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_to_float32_agrees_with_torch_on_every_bit_pattern(dtype: str) -> None:
    expected = torch_values(ALL_16_BITS, dtype)
    found = to_float32(ALL_16_BITS, dtype)
    assert found.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_float32_bits_are_the_values() -> None:
    values = np.array([0.0, -0.0, 1.5, -1e-45, 3e38], np.float32)
    np.testing.assert_array_equal(
        to_float32(values.view(np.uint32), "float32").view(np.uint32), values.view(np.uint32)
    )


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_widened_bits_are_those_of_torch(dtype: str) -> None:
    bits = finite_bits(dtype)
    widened = widen_bits(bits, dtype, "float32")
    assert widened.dtype == np.uint32
    np.testing.assert_array_equal(widened, torch_values(bits, dtype).view(np.uint32))


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
def test_no_other_widening_exists(source: str, target: str) -> None:
    with pytest.raises(RelexkitError, match=f"cannot widen {source} to {target}"):
        widen_bits(np.zeros(3, bits_dtype(source)), source, target)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nonfinite_index_finds_the_first_nan_or_infinity(dtype: str) -> None:
    values = torch.tensor(
        [1.0, -2.0, torch.finfo(TORCH[dtype]).max, float("-inf"), float("nan"), float("inf")]
    )
    integer = torch.int32 if dtype == "float32" else torch.int16
    bits = values.to(TORCH[dtype]).view(integer).numpy().view(bits_dtype(dtype))
    assert nonfinite_index(bits, dtype) == 3
    assert nonfinite_index(bits[4:], dtype) == 0
    assert nonfinite_index(bits[:3], dtype) is None
    assert nonfinite_index(bits[:0], dtype) is None


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_nonfinite_index_on_every_bit_pattern(dtype: str) -> None:
    finite = np.isfinite(torch_values(ALL_16_BITS, dtype))
    found = np.array([nonfinite_index(ALL_16_BITS[i : i + 1], dtype) is None for i in range(2**16)])
    np.testing.assert_array_equal(found, finite)


# -- nearest ---------------------------------------------------------------------------------------


def edge_values(dtype: str) -> np.ndarray:
    """Every finite value, every middle between neighbours and the float32 numbers on both sides of
    each middle.
    """
    values = np.unique(torch_values(finite_bits(dtype), dtype).astype(np.float64))
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    # not beyond the last middle: what rounds to infinity has its own test
    return np.concatenate(
        [values.astype(np.float32), np.array([-0.0, 1e-45, -1e-45], np.float32), middles, *around]
    )


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_nearest_rounding_agrees_with_torch_on_ties_subnormals_and_extremes(dtype: str) -> None:
    values = edge_values(dtype)
    np.testing.assert_array_equal(
        round_bits(values, dtype, "nearest"), torch_nearest(values, dtype)
    )


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_nearest_rounding_agrees_with_torch_on_random_bit_patterns(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.abs(values) <= LARGEST[dtype]]  # a NaN compares false
    np.testing.assert_array_equal(
        round_bits(values, dtype, "nearest"), torch_nearest(values, dtype)
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_float32_output_keeps_every_bit(rounding: str) -> None:
    values = np.array([0.0, -0.0, 1e-45, 1 / 3, -3.4e38], np.float32)
    np.testing.assert_array_equal(round_bits(values, "float32", rounding), values.view(np.uint32))  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_tensor_and_element(
    rounding: str, dtype: str, bad: float
) -> None:
    values = np.array([1.0, 2.0, bad, 4.0], np.float32)
    pattern = (
        rf"tensor 'a\.b': element 102 has the value .*{'nan' if math.isnan(bad) else 'inf'}.*,"
        rf" which {dtype} cannot hold"
    )
    with pytest.raises(RelexkitError, match=pattern):
        round_bits(values, dtype, rounding, tensor="a.b", start=100)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pattern", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFFC00000, 0x7FFF8000, 0xFFFF8001]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_no_nan_payload_turns_into_a_number(pattern: int, rounding: str, dtype: str) -> None:
    values = np.full(64, pattern, np.uint32).view(np.float32)
    with pytest.raises(RelexkitError, match="cannot hold"):
        round_bits(values, dtype, rounding)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_overflow_by_rounding_is_refused(dtype: str) -> None:
    largest = np.float32(LARGEST[dtype])
    step = largest - to_float32(finite_bits(dtype)[finite_bits(dtype) < 2**15][-2:-1], dtype)[0]
    over = np.array([0.5, np.float32(np.float64(largest) + 0.75 * np.float64(step))], np.float32)
    with pytest.raises(
        RelexkitError,
        match=(
            rf"tensor 't': element 1 has the value .*, which {dtype} cannot hold.*--dtype float32"
        ),
    ):
        round_bits(over, dtype, "nearest", tensor="t")
    np.testing.assert_array_equal(
        to_float32(round_bits(np.array([largest]), dtype, "nearest"), dtype), [largest]
    )


# -- stochastic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_stochastic_rounding_keeps_every_representable_value(dtype: str) -> None:
    bits = finite_bits(dtype)
    for seed in range(5):
        np.testing.assert_array_equal(
            round_bits(torch_values(bits, dtype), dtype, "stochastic", seed=seed), bits
        )


def neighbours(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The largest representable number at or below each value, and the smallest at or above."""
    grid = np.unique(torch_values(finite_bits(dtype), dtype).astype(np.float64))
    wide = values.astype(np.float64)
    return (
        grid[np.searchsorted(grid, wide, side="right") - 1],
        grid[np.searchsorted(grid, wide, side="left")],
    )


def spread(dtype: str) -> np.ndarray:
    """Values over the whole range of the format, of both signs, subnormals and a few above the
    smallest normal included.
    """
    random = np.random.default_rng(1)
    info = torch.finfo(TORCH[dtype])
    low, high = math.log(max(info.smallest_normal / 2**12, 1e-44)), math.log(info.max / 2)
    values = np.exp(random.uniform(low, high, 40_000)) * random.choice([-1, 1], 40_000)
    near = info.smallest_normal * random.uniform(0.5, 2, 5_000)
    return np.concatenate([values, near, -near]).astype(np.float32)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_keeps_the_sign(dtype: str) -> None:
    values = spread(dtype)
    rounded = to_float32(round_bits(values, dtype, "stochastic", seed=3), dtype)
    below, above = neighbours(values, dtype)
    assert ((rounded == below) | (rounded == above)).all()
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(values))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("bfloat16", 1e-3, 1e3),
        ("bfloat16", 1e-44, 1e-38),  # subnormals of both
        ("float16", 7e-5, 6e4),
        ("float16", 6e-8, 6e-5),  # subnormals
        ("float16", 1e-12, 5.9e-8),  # below the smallest subnormal: mostly zero
    ],
)
def test_stochastic_rounding_is_unbiased(dtype: str, low: float, high: float) -> None:
    # For the seed below the outcome is fixed. Had it been drawn anew, |z| > 6 has odds of 2e-9 for
    # each of the two
    # statistics; a bias of 1 % of the spacing gives z = 0.01 * sqrt(400000) / 0.41 = 15.
    random = np.random.default_rng(2)
    values = np.exp(random.uniform(math.log(low), math.log(high), 400_000)).astype(np.float32)
    values *= random.choice(np.array([-1, 1], np.float32), len(values))
    rounded = to_float32(round_bits(values, dtype, "stochastic", seed=11), dtype).astype(np.float64)
    below, above = neighbours(values, dtype)
    inside = above > below
    share = ((values - below) / np.where(inside, above - below, 1))[
        inside
    ]  # the probability to go up
    up = (rounded == above)[inside]
    variance = (share * (1 - share)).sum()
    assert variance > 5  # else the normal approximation of z says nothing
    assert abs((up - share).sum()) / math.sqrt(variance) < 6
    weight = (
        share - share.mean()
    )  # a slope: values near the upper neighbour must go up more often, in proportion
    slope_variance = (weight**2 * share * (1 - share)).sum()
    assert abs((weight * (up - share)).sum()) / math.sqrt(slope_variance) < 6


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("value", [1.001, -0.3337, 3.1e-5, 1.7e-7, -2.5e-8])
def test_one_value_rounded_many_times_averages_to_itself(dtype: str, value: float) -> None:
    # 6 sigma as above: odds of a false alarm 2e-9 had the seed been drawn anew.
    values = np.full(200_000, value, np.float32)
    below, above = (n[0] for n in neighbours(values[:1], dtype))
    rounded = to_float32(round_bits(values, dtype, "stochastic", seed=5, tensor="x"), dtype).astype(
        np.float64
    )
    share = (float(values[0]) - below) / (above - below)
    sigma = (above - below) * math.sqrt(share * (1 - share) / len(values))
    # for float16 subnormals the stated resolution of the probability is 2**-16 of the spacing
    assert abs(rounded.mean() - float(values[0])) < 6 * sigma + 2**-16 * (above - below)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3000), max_size=8),
    start=st.integers(0, 2**40),
    dtype=st.sampled_from(SIXTEEN),
    seed=st.integers(0, 2**63),
)
def test_any_cut_into_blocks_gives_the_same_bits(
    cuts: list[int], start: int, dtype: str, seed: int
) -> None:
    values = np.random.default_rng(0).standard_normal(3000).astype(np.float32) * 1e-4
    whole = round_bits(values, dtype, "stochastic", seed=seed, tensor="w", start=start)
    edges = sorted({0, 3000, *cuts})
    pieces = [
        round_bits(values[a:b], dtype, "stochastic", seed=seed, tensor="w", start=start + a)
        for a, b in itertools.pairwise(edges)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_seeds_tensors_and_positions_draw_differently() -> None:
    draws = [
        random_bits(0, "a", 0, 4096),
        random_bits(1, "a", 0, 4096),
        random_bits(0, "b", 0, 4096),
        random_bits(0, "a", 1, 4097),
    ]
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            # agreement of independent draws: binomial(4096, 2**-16); more than 5 has odds below
            # 1e-9
            assert np.count_nonzero(first == second) <= 5
    np.testing.assert_array_equal(draws[3][:-1], draws[0][1:])  # the same stream, one element later


def test_random_bits_are_uniform_and_uncorrelated() -> None:
    draws = random_bits(7, "model.layers.0.weight", 5, 5 + 2**20).astype(np.float64)
    # mean and lag correlations of n uniform numbers, 6 sigma: odds of a false alarm 2e-9 each
    n, centred = len(draws), draws - (2**16 - 1) / 2
    sigma = 2**16 / math.sqrt(12)
    assert abs(centred.mean()) < 6 * sigma / math.sqrt(n)
    for lag in (1, 3, 4, 16, 64):
        assert abs((centred[lag:] * centred[:-lag]).mean()) < 6 * sigma**2 / math.sqrt(n)
    counts = np.bincount((draws / 256).astype(int), minlength=256)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 6 * math.sqrt(2 * 255)  # about 1e-8


def test_stochastic_bits_are_the_same_in_every_version() -> None:
    """A recorded seed must reproduce a checkpoint later: these bits are part of the format."""
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"12:w").digest()[:16], "little")
    words = np.random.Generator(np.random.Philox(key=key)).bit_generator.random_raw(8)
    expected = [(int(word) >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    np.testing.assert_array_equal(random_bits(12, "w", 0, 32), expected)


# -- mantissa --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mantissa_bits", range(1, 24))
def test_rounding_to_mantissa_bits_is_nearest_and_within_its_bound(mantissa_bits: int) -> None:
    random = np.random.default_rng(mantissa_bits)
    values = (random.standard_normal(20_000) * 10.0 ** random.integers(-30, 30, 20_000)).astype(
        np.float32
    )
    rounded = round_to_mantissa_bits(values.copy(), mantissa_bits)
    exponent = np.floor(np.log2(np.abs(values.astype(np.longdouble))))
    unit = np.exp2(exponent - mantissa_bits)
    expected = np.rint(values.astype(np.longdouble) / unit) * unit  # rint: ties to even, as stated
    np.testing.assert_array_equal(rounded.astype(np.longdouble), expected)
    error = np.abs(rounded.astype(np.longdouble) - values) / np.abs(values)
    assert error.max() <= 2.0 ** -(mantissa_bits + 1)
    assert not (rounded.view(np.uint32) & np.uint32((1 << (23 - mantissa_bits)) - 1)).any()


def test_rounding_to_mantissa_bits_keeps_zeros_and_their_signs() -> None:
    values = np.array([0.0, -0.0], np.float32)
    np.testing.assert_array_equal(
        round_to_mantissa_bits(values.copy(), 3).view(np.uint32), values.view(np.uint32)
    )
