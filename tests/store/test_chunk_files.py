"""Files written past Zarr equal those that Zarr writes, and what is not completed leaves
nothing.
"""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from relexkit.store.fastpath.chunk_files import ZarrRow, chunk_files


def make(
    path: Path, shape, dtype, chunk: int, shard: int | None, *, fill=0, cname="lz4"
) -> zarr.Array:
    lead = (1,) * (len(shape) - 1)
    return zarr.create_array(
        path,
        shape=shape,
        dtype=dtype,
        chunks=(*lead, chunk),
        shards=(*lead, shard) if shard else None,
        compressors=[BloscCodec(cname=cname, clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
        fill_value=fill,
        config={"write_empty_chunks": True},
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_row_in_pieces_is_the_file_that_zarr_writes(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")
    chunk, length = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 60))
    dtype, fill = data.draw(
        st.sampled_from(
            [(np.float32, float("nan")), (np.int32, -1), (np.int16, -1), (np.uint16, 65535)]
        )
    )
    shard = -(-length // chunk) * chunk
    values = (
        np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 3, length).astype(dtype)
    )
    direct, usual = (
        make(folder / name, (3, length), dtype, chunk, shard, fill=fill)
        for name in ("direct", "usual")
    )
    usual[1, :] = values
    found = chunk_files(direct)
    assert found is not None
    row = found.open_row(1)
    places = data.draw(st.lists(st.integers(1, 60), max_size=3, unique=True))
    cuts = sorted(chunk * place for place in places if chunk * place < length)
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
        row.append(found.encode(values[begin:end]))
    row.close()
    assert files(folder / "direct") == files(folder / "usual")
    through_zarr = ZarrRow(usual, 2)
    through_zarr.append([values])
    through_zarr.close()
    np.testing.assert_array_equal(usual[2], direct[1])


@pytest.mark.parametrize(("dtype", "fill"), [(np.float64, float("nan")), (np.int64, -1)])
def test_a_chunk_is_the_file_that_zarr_writes_also_when_it_is_not_full(tmp_path, dtype, fill):
    values = np.arange(10).astype(dtype)
    direct, usual = (
        make(tmp_path / name, (10,), dtype, 4, None, fill=fill, cname="zstd")
        for name in ("direct", "usual")
    )
    usual[:] = values
    found = chunk_files(direct)
    for chunk in range(3):
        found.write((chunk,), values[4 * chunk : 4 * chunk + 4])
    assert files(tmp_path / "direct") == files(tmp_path / "usual")


def test_a_row_that_is_given_up_or_cannot_be_completed_leaves_what_was_there(tmp_path, monkeypatch):
    array = make(tmp_path / "x", (1, 32), np.float32, 8, 32)
    array[0, :] = 7
    before = files(tmp_path)
    found = chunk_files(array)
    row = found.open_row(0)
    row.append(found.encode(np.ones(16, np.float32)))
    row.discard()
    assert files(tmp_path) == before

    def full(*_):
        raise OSError(28, "No space left on device")

    found = chunk_files(array)
    row = found.open_row(0)
    row.append(found.encode(np.ones(32, np.float32)))
    monkeypatch.setattr("relexkit.store.durable.rename", full)
    with pytest.raises(OSError, match="No space"):
        row.close()
    assert files(tmp_path) == before


def test_other_arrays_are_left_to_zarr(tmp_path):
    plain = zarr.create_array(
        tmp_path / "plain", shape=(4, 8), dtype="f4", chunks=(1, 4), compressors=[ZstdCodec()]
    )
    assert chunk_files(plain) is None
    memory = zarr.create_array({}, shape=(4, 8), dtype="f4", chunks=(1, 4))
    assert chunk_files(memory) is None
