"""How the arrays of a store are cut into chunks and compressed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

ROWS = 64
"""Rows that arrays are created with; doubled when they are full."""

BASE_CHUNK, BASE_SHARD = 2**20, 2**24
LOG_CODECS = (BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
DENSE_CODECS = (BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
WRITE_ALL: Any = {"write_empty_chunks": True}
"""So that a missing chunk is always damage, never a chunk of fill values."""


class Grid(NamedTuple):
    """Shape of an array, and how it is cut: chunks are compressed, shards are files, of one chunk
    if not given.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None


def rows_of(numel: int, most: int) -> Grid:
    """Rows of ``numel`` for each step, one file each, in chunks of at most ``most`` elements."""
    chunk = min(most, max(1, numel))
    return Grid((ROWS, numel), (1, chunk), (1, -(-max(1, numel) // chunk) * chunk))


def create_array(
    group: zarr.Group,
    name: str,
    grid: Grid,
    dtype: Any,
    codecs: Iterable[Any] = LOG_CODECS,
    fill_value: float = 0,
) -> zarr.Array:
    """Create an array whose every chunk is written and carries a checksum, with the names of its
    dimensions; replaces what is there.
    """
    return group.create_array(
        name,
        shape=grid.shape,
        dtype=dtype,
        chunks=grid.chunks,
        shards=grid.shards,
        compressors=list(codecs),
        fill_value=fill_value,
        dimension_names=_dimension_names(name, len(grid.shape)),
        config=WRITE_ALL,
        overwrite=True,
    )


_DIMENSIONS = {
    "steps": ("step",),
    "checksums": ("step", "part"),
    "metrics": ("step",),
    "base": ("element {}",),
    "base-checksums": ("base block",),
    "deltas": ("step", "element {}"),
    "factors": ("step", "factor element {}"),
    "updates": ("step", "entry"),
    "indptr": ("step", "block"),
    "sketches": ("step", "sketch"),
    "recent-metrics": ("recent entry",),
    "files": ("byte of {}",),
}
"""Names of the dimensions by the group of an array, or its own name; ``{}`` is the part or file:
arrays that lie beside each other with different lengths have different dimensions.
"""


def _dimension_names(name: str, num_dimensions: int) -> tuple[str, ...] | None:
    """None for derived arrays, which only relexkit reads."""
    top, _, rest = name.partition("/")
    names = _DIMENSIONS.get(rest.rpartition("/")[2], _DIMENSIONS.get(top, ()))
    return tuple(n.format(rest) for n in names) if len(names) == num_dimensions else None
