"""The base weights of a new store, and the content hash by which a base is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import zarr

from relexkit.processes import cores
from relexkit.store.codecs import (
    BASE_CHUNK,
    BASE_SHARD,
    DENSE_CODECS,
    WRITE_ALL,
    Grid,
    create_array,
)
from relexkit.store.fastpath.chunk_files import Encoded, chunk_files
from relexkit.store.passes import ProgressCallback, blocks, in_order, stretches
from relexkit.weights.dtypes import bits_dtype
from relexkit.weights.layout import Layout

ReadBase = Callable[[int, int, int], np.ndarray]
"""``(part, begin, end) -> bits`` of the base weights."""


def write_base(
    group: zarr.Group,
    layout: Layout,
    read_base: ReadBase,
    owned: Collection[int],
    progress: ProgressCallback | None,
) -> str:
    """Write the base of the ``owned`` parts, whose arrays are there, and return the ``base_sha256``
    of all parts: others are only read.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(cores()) as pool:
        for part, spec in enumerate(layout.parts):
            read = partial(read_base, part)
            pieces: Iterable[np.ndarray] = (read(*span) for span in blocks(spec.numel))
            if part in owned:
                pieces = _written(_array(group, part), read, pool)
            for bits in pieces:
                digest.update(bits.data.cast("B"))
            if progress:
                progress("writing the base", part + 1, len(layout.parts))
    return digest.hexdigest()


def write_base_parts(group: zarr.Group, read_base: ReadBase, owned: Collection[int]) -> None:
    """Write the base of the ``owned`` parts, whose arrays are there."""
    with ThreadPoolExecutor(cores()) as pool:
        for part in owned:
            for _ in _written(_array(group, part), partial(read_base, part), pool):
                pass


def _array(group: zarr.Group, part: int) -> zarr.Array:
    array = group[f"base/{part}"]
    assert isinstance(array, zarr.Array)
    return array.with_config(WRITE_ALL)


def _written(
    array: zarr.Array, read: Callable[[int, int], np.ndarray], pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Write all of an array, and yield its content in order."""
    assert array.shards is not None
    direct = chunk_files(array)
    shards = blocks(array.shape[0], array.shards[0])
    if direct is None:
        for begin, end in shards:
            array[begin:end] = bits = read(begin, end)
            yield bits
        return

    def encode(span: tuple[int, int]) -> tuple[np.ndarray, Encoded]:
        bits = read(*span)
        return bits, direct.encode(bits)

    for number, span in enumerate(shards):
        shard = direct.open_shard((number,))
        try:
            pieces = stretches(span, direct.chunk)
            for bits, chunks in in_order(pool, encode, pieces, cores()):
                shard.append(chunks)
                yield bits
            shard.close()
        except BaseException:
            shard.discard()
            raise


def create_base_array(group: zarr.Group, layout: Layout, part: int) -> zarr.Array:
    """The array of the base weights of a part, with nothing in it."""
    spec = layout.parts[part]
    chunk = min(BASE_CHUNK, max(1, spec.numel))
    shard = -(-min(BASE_SHARD, max(1, spec.numel)) // chunk) * chunk
    grid = Grid((spec.numel,), (chunk,), (shard,))
    return create_array(group, f"base/{part}", grid, bits_dtype(spec.dtype), DENSE_CODECS)


def base_sha256(layout: Layout, read_base: ReadBase) -> str:
    """Content hash of base weights: sha256 of the raw little-endian bits of all parts in order. One
    pass.
    """
    digest = hashlib.sha256()
    for part, spec in enumerate(layout.parts):
        for begin, end in blocks(spec.numel):
            digest.update(read_base(part, begin, end).data.cast("B"))
    return digest.hexdigest()
