"""Derived arrays kept in a store beside the steps: found again if they are whole, else computed
again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import zarr

from relexkit.errors import StoreError
from relexkit.store import FORMAT_VERSION, TrajectoryStore, WriterLock, create_array

_UNWRITTEN_COUNT = np.iinfo(np.int64).min


def kept(
    store: TrajectoryStore, name: str, keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attributes and whole arrays that ``keep`` left in group ``name``; empty if they are absent,
    damaged or half-written.
    """
    try:
        group = zarr.open_group(store.path, path=name, mode="r")
        arrays = {
            key: np.asarray(zarr.open_array(store.path, path=f"{name}/{key}", mode="r")[:])
            for key in keys
        }
        attributes = dict(group.attrs)
    except Exception:  # it is derived data and computed again
        return {}, {}
    unwritten = any(
        (a == _UNWRITTEN_COUNT).any() if a.dtype == np.int64 else np.isnan(a).any()
        for a in arrays.values()
    )
    return (
        ({}, {})
        if unwritten or attributes.get("format_version") != FORMAT_VERSION
        else (attributes, arrays)
    )


def keep(
    store: TrajectoryStore, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]
) -> None:
    """Keep derived ``arrays [S, ...]`` in group ``name`` of a store, if nobody else does and it can
    be written.
    """
    with contextlib.suppress(StoreError, OSError), WriterLock(f"{store.path.rstrip('/')}.gram"):
        group = zarr.open_group(store.path, mode="r+").create_group(name, overwrite=True)
        for key, values in arrays.items():
            fill = _UNWRITTEN_COUNT if values.dtype == np.int64 else float("nan")
            chunks, shape = (1, *values.shape[1:]), values.shape
            create_array(group, key, shape, values.dtype, chunks, shards=shape, fill_value=fill)[
                :
            ] = values
        group.update_attributes({**attributes, "format_version": FORMAT_VERSION})
