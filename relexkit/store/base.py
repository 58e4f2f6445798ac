"""The base weights of a new store, and the content hash by which a base is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import zarr

from relexkit.store.codecs import BASE_CHUNK, BASE_SHARD, DENSE_CODECS, Grid, create_array
from relexkit.store.passes import ProgressCallback, blocks
from relexkit.weights.dtypes import bits_dtype
from relexkit.weights.layout import Layout


def write_base(
    group: zarr.Group,
    layout: Layout,
    read_base: Callable[[int, int, int], np.ndarray],
    progress: ProgressCallback | None,
) -> str:
    """Write the base of every part, as ``read_base`` gives it to ``(part, begin, end)``, and return
    its ``base_sha256``.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hasher:
        for part, spec in enumerate(layout.parts):
            array = create_base_array(group, layout, part)
            assert array.shards is not None
            shard = array.shards[0]
            for begin in range(0, spec.numel, shard):
                end = min(begin + shard, spec.numel)
                bits = read_base(part, begin, end)
                hashed = hasher.submit(digest.update, bits.data.cast("B"))
                array[begin:end] = bits
                hashed.result()
            if progress:
                progress("writing the base", part + 1, len(layout.parts))
    return digest.hexdigest()


def create_base_array(group: zarr.Group, layout: Layout, part: int) -> zarr.Array:
    """The array of the base weights of a part, with nothing in it."""
    spec = layout.parts[part]
    chunk = min(BASE_CHUNK, max(1, spec.numel))
    shard = -(-min(BASE_SHARD, max(1, spec.numel)) // chunk) * chunk
    grid = Grid((spec.numel,), (chunk,), (shard,))
    return create_array(group, f"base/{part}", grid, bits_dtype(spec.dtype), DENSE_CODECS)


def base_sha256(layout: Layout, read_base: Callable[[int, int, int], np.ndarray]) -> str:
    """Content hash of base weights: sha256 of the raw little-endian bits of all parts in order. One
    pass.
    """
    digest = hashlib.sha256()
    for part, spec in enumerate(layout.parts):
        for begin, end in blocks(spec.numel):
            digest.update(read_base(part, begin, end).data.cast("B"))
    return digest.hexdigest()
