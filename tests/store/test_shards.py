"""The shortcut past Zarr's pipeline gives what Zarr gives, for every range and kind of array, and
refuses damage.
"""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from relexkit.store.codecs import Grid, create_array
from relexkit.store.fastpath.shards import read_rows, shard_reader


def make(
    path: Path, values: np.ndarray, chunk: int, shard: int, *, fill: float = 0, cname: str = "lz4"
) -> zarr.Array:
    """An array with the given rows (or 1-D), sharded along its last axis as the store writes
    them.
    """
    lead = (1,) * (values.ndim - 1)
    array = zarr.create_array(
        path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(*lead, chunk),
        shards=(*lead, shard),
        compressors=[BloscCodec(cname=cname, clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
        fill_value=fill,
        config={"write_empty_chunks": True},
    )
    array[:] = values
    return array


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equals_zarr_for_any_range(data, tmp_path_factory):
    chunk = data.draw(st.integers(1, 9))
    shard = chunk * data.draw(st.integers(1, 4))
    length = data.draw(st.integers(1, 60))
    rows = data.draw(st.integers(0, 3))
    dtype = data.draw(st.sampled_from([np.uint16, np.int16, np.float32, np.int32, np.uint8]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = rng.integers(0, 3, (rows, length) if rows else (length,)).astype(
        dtype
    )  # small values: some chunks are all fill
    array = make(tmp_path_factory.mktemp("a") / "x", values, chunk, shard)
    begin = data.draw(st.integers(0, length))
    end = data.draw(st.integers(begin, length))
    reader = shard_reader(array)
    assert reader is not None
    for row in range(rows) if rows else [None]:
        expected = array[begin:end] if row is None else array[row, begin:end]
        got = reader.read(row, begin, end)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, expected)


def test_a_chunk_that_was_never_written_is_an_error(tmp_path):
    array = make(tmp_path / "x", np.ones((1, 32), np.int16), 8, 32)
    array.store_path.store.root.joinpath("c/0/0").unlink()
    array[0, 8:16] = 5
    reader = shard_reader(array)
    np.testing.assert_array_equal(reader.read(0, 8, 16), np.full(8, 5))
    with pytest.raises(ValueError, match="a chunk is missing"):
        reader.read(0, 8, 17)


def test_missing_shard_is_an_error_not_fill(tmp_path):
    reader = shard_reader(make(tmp_path / "x", np.ones((2, 32), np.int16), 8, 32))
    (tmp_path / "x" / "c" / "1" / "0").unlink()
    np.testing.assert_array_equal(reader.read(0, 3, 30), np.ones(27, np.int16))
    with pytest.raises(FileNotFoundError):
        reader.read(1, 0, 1)


def test_every_flipped_byte_is_refused_or_harmless(tmp_path):
    values = np.random.default_rng(0).integers(1, 1000, (1, 64)).astype(np.int16)
    array = make(tmp_path / "x", values, 16, 64)
    path = tmp_path / "x" / "c" / "0" / "0"
    original = path.read_bytes()
    refused = 0
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(
                shard_reader(array).read(0, 0, 64), values[0]
            )  # a new one: indices are kept
        except ValueError:
            refused += 1
    assert refused == len(original)


def test_every_truncation_is_refused(tmp_path):
    values = np.random.default_rng(0).integers(1, 1000, (1, 64)).astype(np.int16)
    reader = shard_reader(make(tmp_path / "x", values, 16, 64))
    path = tmp_path / "x" / "c" / "0" / "0"
    original = path.read_bytes()
    for length in range(len(original)):
        path.write_bytes(original[:length])
        with pytest.raises(ValueError, match=r"truncated|checksum"):
            reader.read(0, 0, 64)


def test_other_arrays_are_left_to_zarr(tmp_path):
    values = np.ones((2, 32), np.int16)
    plain = zarr.create_array(tmp_path / "plain", data=values, chunks=(1, 8))
    other = zarr.create_array(
        tmp_path / "other",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, 8),
        shards=(1, 32),
        compressors=[ZstdCodec()],
    )
    assert [shard_reader(a) for a in (plain, other)] == [None, None]


def test_equals_zarr_in_any_zarr_store():
    values = np.arange(64, dtype=np.int16).reshape(2, 32)
    memory = zarr.create_array(
        zarr.storage.MemoryStore(),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, 8),
        shards=(1, 16),
        compressors=[BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    memory[:1] = values[:1]
    reader = shard_reader(memory)
    assert reader is not None
    for begin, end in ((0, 32), (3, 29), (8, 16), (15, 17), (5, 5)):
        np.testing.assert_array_equal(reader.read(0, begin, end), values[0, begin:end])
    with pytest.raises(FileNotFoundError, match="a chunk is missing"):
        reader.read(1, 0, 5)


def test_rows_of_a_chunk_each_equal_zarr_or_are_left_to_it(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    array = create_array(group, "rows", Grid((8, 5), (1, 5)), "uint32")
    values = np.random.default_rng(0).integers(0, 2**32, (6, 5), dtype=np.uint32)
    values[2] = 0  # as fill values, but written
    array[:6] = values
    for count in (0, 1, 6):
        np.testing.assert_array_equal(read_rows(array, count), values[:count])
    assert read_rows(array, 7) is None  # never written
    assert read_rows(array, 9) is None
    chunk = tmp_path / "s/rows/c/3/0"
    raw = chunk.read_bytes()
    for at in range(len(raw)):
        chunk.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        found = read_rows(array, 6)
        assert found is None or np.array_equal(found, values)
    chunk.write_bytes(raw[:-1])
    assert read_rows(array, 6) is None
    assert read_rows(create_array(group, "two", Grid((8, 6), (1, 3)), "uint32"), 1) is None
