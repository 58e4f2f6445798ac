"""The sparse log and the dense rows: encoding is undone by decoding, at every boundary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relexkit.store.encodings.bits import (
    BLOCK,
    CHECKSUM_BLOCK,
    apply_update,
    block_checksums,
    changes,
    clip_update,
    content_checksum,
    decode_columns,
    encode_columns,
    float_row,
    num_blocks,
)

EDGE_COLUMNS = [
    0,
    1,
    BLOCK - 2,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    2 * BLOCK - 1,
    2 * BLOCK,
    3 * BLOCK - 1,
    3 * BLOCK,
    3 * BLOCK + 4,
]


def check_columns(columns: np.ndarray, numel: int) -> None:
    gaps, indptr = encode_columns(columns, numel)
    assert gaps.dtype == np.uint16
    assert indptr.dtype == np.uint32
    assert len(gaps) == len(columns)
    assert len(indptr) == num_blocks(numel) + 1
    for block in range(num_blocks(numel)):
        inside = columns[(columns >= block * BLOCK) & (columns < (block + 1) * BLOCK)]
        assert indptr[block + 1] - indptr[block] == len(inside)
        # each block decodes alone, from its own entries and its own two numbers
        alone = decode_columns(
            gaps[indptr[block] : indptr[block + 1]], indptr[block : block + 2], block
        )
        np.testing.assert_array_equal(alone, inside)
    whole = decode_columns(gaps, indptr)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole, columns)


@settings(max_examples=200, deadline=None)
@given(
    edges=st.sets(st.sampled_from(EDGE_COLUMNS)),
    others=st.sets(st.integers(0, 3 * BLOCK + 4), max_size=40),
    beyond=st.integers(1, 2 * BLOCK),
)
def test_columns_round_trip_around_block_boundaries(
    edges: set[int], others: set[int], beyond: int
) -> None:
    columns = np.array(sorted(edges | others), np.int64)
    check_columns(columns, (int(columns[-1]) if len(columns) else 0) + beyond)


@pytest.mark.parametrize("numel", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3])
def test_no_column_and_every_column(numel: int) -> None:
    check_columns(np.empty(0, np.int64), numel)
    check_columns(np.arange(numel), numel)


def test_the_largest_part_keeps_its_last_column() -> None:
    numel = 2**31 - 1
    columns = np.array([0, numel - BLOCK, numel - 1])
    gaps, indptr = encode_columns(columns, numel)
    np.testing.assert_array_equal(decode_columns(gaps, indptr), columns)


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(0, 70),
    skip=st.integers(0, 9),
    data=st.data(),
    dtype=st.sampled_from([np.uint16, np.uint32, np.uint8]),
)
def test_changes_are_the_columns_that_differ_with_the_bits_there(
    length: int, skip: int, data: st.DataObject, dtype: type
) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    top = int(np.iinfo(dtype).max)
    before = random.integers(0, top, length + skip, dtype=dtype, endpoint=True)[
        skip:
    ]  # views of any alignment
    after = np.concatenate([np.zeros(skip, dtype), before])[skip:]
    for column in (
        data.draw(st.sets(st.integers(0, max(0, length - 1)), max_size=length)) if length else ()
    ):
        after[column] ^= dtype(data.draw(st.integers(1, top)))
    columns, old, new = changes(before, after)
    np.testing.assert_array_equal(columns, np.flatnonzero(before != after))
    np.testing.assert_array_equal(old, before[columns])
    np.testing.assert_array_equal(new, after[columns])


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(0, 300),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_an_update_moves_one_state_to_the_next_exactly(length: int, seed: int, dtype: type) -> None:
    random = np.random.default_rng(seed)
    before = random.integers(0, np.iinfo(dtype).max, length, dtype=dtype, endpoint=True)
    after = before.copy()
    chosen = random.random(length) < random.random()
    after[chosen] = random.integers(
        0, np.iinfo(dtype).max, int(chosen.sum()), dtype=dtype, endpoint=True
    )
    columns, _, _ = changes(before, after)
    signed = np.dtype(f"int{8 * np.dtype(dtype).itemsize}")
    differences = (after[columns] - before[columns]).view(signed)  # wraps: 0xFFFF to 0 is one unit
    gaps, indptr = encode_columns(columns, length)
    state = before.copy()
    old, new = apply_update(state, decode_columns(gaps, indptr), differences)
    np.testing.assert_array_equal(state, after)
    np.testing.assert_array_equal(old, before[columns])
    np.testing.assert_array_equal(new, after[columns])


@settings(max_examples=100, deadline=None)
@given(columns=st.sets(st.integers(0, 60)), begin=st.integers(0, 61), length=st.integers(0, 61))
def test_a_clipped_update_is_the_window_of_the_whole(
    columns: set[int], begin: int, length: int
) -> None:
    ordered = np.array(sorted(columns), np.int32)
    state = np.zeros(61, np.uint16)
    apply_update(state, ordered, np.arange(1, len(ordered) + 1, dtype=np.int16))
    end = min(61, begin + length)
    inside, differences = clip_update(
        (ordered, np.arange(1, len(ordered) + 1, dtype=np.int16)), begin, end
    )
    window = np.zeros(end - begin, np.uint16)
    apply_update(window, inside, differences)
    np.testing.assert_array_equal(window, state[begin:end])


@pytest.mark.parametrize("mantissa_bits", [1, 7, 10, 23])
def test_float_rows_are_torch_deltas_within_the_stated_bits(mantissa_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(999, generator=generator)
    current = base + torch.randn(999, generator=generator) * 1e-4
    bits = [t.view(torch.int32).numpy().view(np.uint32) for t in (base, current)]
    exact = (current - base).numpy()
    row = float_row(bits[0], bits[1], "float32", mantissa_bits)
    assert row.dtype == np.float32
    assert (
        np.abs(row.astype(np.float64) - exact) <= np.abs(exact) * 2.0 ** -(mantissa_bits + 1)
    ).all()
    if mantissa_bits == 23:
        np.testing.assert_array_equal(row, exact)


def test_checksums_see_every_byte_and_the_order_of_blocks() -> None:
    random = np.random.default_rng(0)
    content = random.integers(0, 2**16, CHECKSUM_BLOCK + 5, dtype=np.uint64).astype(np.uint16)
    before = block_checksums(content)
    assert len(before) == 2
    for position in (0, CHECKSUM_BLOCK - 1, CHECKSUM_BLOCK, CHECKSUM_BLOCK + 4):
        flipped = content.copy()
        flipped[position] ^= 1 << 9
        after = block_checksums(flipped)
        assert [a != b for a, b in zip(after, before, strict=True)] == [
            position < CHECKSUM_BLOCK,
            position >= CHECKSUM_BLOCK,
        ]
        assert content_checksum(after) != content_checksum(before)
    assert content_checksum(before) != content_checksum(before[::-1])
    assert block_checksums(content[:0]) == []


def test_the_checksum_is_crc32c() -> None:
    # RFC 3720, appendix B.4: 32 bytes of zeros
    assert block_checksums(np.zeros(16, np.uint16)) == [0x8A9136AA]
