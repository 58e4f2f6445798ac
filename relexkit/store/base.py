"""The base weights of a new store, or the checksums of a base that it refers to; and the content
hash by which a base is known again.
"""

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
from relexkit.store.encodings.bits import block_checksums
from relexkit.store.fastpath.chunk_files import Encoded, chunk_files
from relexkit.store.passes import ProgressCallback, blocks, in_order, stretches
from relexkit.store.reference import CHECKSUMS, num_blocks
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
    """Write the base of the ``owned`` parts, or the checksums of a base by reference, whose arrays
    are there, and return the ``base_sha256`` of all parts: others are only read.
    """
    digest, checksums = hashlib.sha256(), list[int]()
    by_reference = CHECKSUMS in group
    with ThreadPoolExecutor(cores()) as pool:
        for part, spec in enumerate(layout.parts):
            read = partial(read_base, part)
            pieces: Iterable[np.ndarray] = (read(*span) for span in blocks(spec.numel))
            if part in owned and not by_reference:
                pieces = _written(_array(group, part), read, pool)
            for bits in pieces:
                digest.update(bits.data.cast("B"))
                if by_reference:
                    checksums += block_checksums(bits, BASE_CHUNK)
            if progress:
                progress("writing the base", part + 1, len(layout.parts))
    if by_reference:
        array = group[CHECKSUMS]
        assert isinstance(array, zarr.Array)
        array[:] = np.array(checksums, np.uint32)
    return digest.hexdigest()


def write_base_parts(group: zarr.Group, read_base: ReadBase, owned: Collection[int]) -> None:
    """Write the base of the ``owned`` parts, whose arrays are there; nothing of a base by
    reference.
    """
    if CHECKSUMS in group:
        return
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


def create_base(group: zarr.Group, layout: Layout, *, by_reference: bool) -> None:
    """The arrays of the base weights, one for each part, or that of their checksums, with nothing
    in them.
    """
    if by_reference:
        count = sum(num_blocks(layout))
        create_array(group, CHECKSUMS, Grid((count,), (max(1, count),)), "uint32")
        return
    for part, spec in enumerate(layout.parts):
        chunk = min(BASE_CHUNK, max(1, spec.numel))
        shard = -(-min(BASE_SHARD, max(1, spec.numel)) // chunk) * chunk
        grid = Grid((spec.numel,), (chunk,), (shard,))
        create_array(group, f"base/{part}", grid, bits_dtype(spec.dtype), DENSE_CODECS)


def base_sha256(layout: Layout, read_base: ReadBase) -> str:
    """Content hash of base weights: sha256 of the raw little-endian bits of all parts in order. One
    pass.
    """
    digest = hashlib.sha256()
    for part, spec in enumerate(layout.parts):
        for begin, end in blocks(spec.numel):
            digest.update(read_base(part, begin, end).data.cast("B"))
    return digest.hexdigest()
