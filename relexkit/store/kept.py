"""Derived arrays kept in a store beside the steps: found again if they are whole and come from the
content that the store has now, else computed again.

A group of them holds, in its attributes, the steps and the content checksums that it was computed
from, the CRC-32C of every array, and a ``checksum`` of all that. The attributes are written last.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.storage import MemoryStore

from relexkit.errors import StoreError
from relexkit.store.codecs import Grid, create_array
from relexkit.store.descriptions import raw_description
from relexkit.store.encodings.bits import extend_checksum
from relexkit.store.fastpath.local import for_writing, unflushed_of
from relexkit.store.format import FORMAT_VERSION, json_checksum
from relexkit.store.lock import WriterLock
from relexkit.weights.layout import Layout

_EMPTY_GROUP = b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}'
_UNWRITTEN_COUNT = np.iinfo(np.int64).min
_CHUNK = 2**20  # elements


class Content(Protocol):
    """What results are derived from: a ``TrajectoryStore``."""

    path: str
    layout: Layout
    steps: np.ndarray

    def checksums(self) -> np.ndarray:
        """Content checksum of every step and part, ``uint32 [T, parts]``."""


def identity(store: Content, part: int, num_rows: int) -> dict[str, Any]:
    """What a result of a part over the first ``num_rows`` steps is computed from: their numbers and
    the checksums of their content.
    """
    return {
        "steps": store.steps[:num_rows].tolist(),
        "content": store.checksums()[:num_rows, part].tolist(),
    }


def common_prefix(store: Content, part: int, attributes: dict[str, Any]) -> int:
    """The first steps of the store whose number and content are those in ``attributes``."""
    now = identity(store, part, len(store.steps))
    pairs = zip(
        zip(now["steps"], now["content"], strict=True),
        zip(attributes.get("steps", []), attributes.get("content", []), strict=False),
        strict=False,
    )
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def kept_attributes(store: Content, name: str) -> dict[str, Any]:
    """What group ``name`` was computed from; empty if it is absent, damaged or half-written."""
    try:
        return _attributes(store, name)
    except Exception:  # it is derived data and computed again
        return {}


def kept(
    store: Content, name: str, keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attributes and whole arrays that ``keep`` left in group ``name``; empty if they are absent,
    damaged or half-written.
    """
    try:
        attributes = _attributes(store, name)
        return attributes, {key: _array(store, name, key, attributes) for key in keys}
    except Exception:  # it is derived data and computed again
        return {}, {}


def keep(
    store: Content, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]
) -> None:
    """Keep derived ``arrays [S, ...]`` in group ``name`` of a store, if no other process does and
    it can be written. They are on the disk before their attributes are.
    """
    content = {
        **attributes,
        "format_version": FORMAT_VERSION,
        "arrays": {key: _checksum(values) for key, values in arrays.items()},
    }
    with contextlib.suppress(StoreError, OSError), _keeping(store.path):
        place = for_writing(store.path)
        unflushed = unflushed_of(place)
        with contextlib.closing(unflushed) if unflushed else contextlib.nullcontext():
            group = zarr.open_group(place, mode="r+").create_group(name, overwrite=True)
            for key, values in arrays.items():
                _create(group, key, values, _grid(values))[:] = values
            if unflushed:
                unflushed.flush()
            group.update_attributes(content | {"checksum": json_checksum(content)})
            if unflushed:
                unflushed.flush()


def _keeping(path: str) -> contextlib.AbstractContextManager:
    """One process at a time, on a local disk; elsewhere the checksums expose a mixture."""
    return contextlib.nullcontext() if "://" in path else WriterLock(f"{path.rstrip('/')}.gram")


def _grid(values: np.ndarray) -> Grid:
    """Several tensors in a chunk: Zarr takes a millisecond for every one that it reads."""
    shape = values.shape
    together = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return Grid(shape, (min(together, max(1, shape[0])), *shape[1:]))


def _grid_before(values: np.ndarray) -> Grid:
    """As they were cut before: every tensor is a chunk, all chunks are one file."""
    return Grid(values.shape, (1, *values.shape[1:]), values.shape)


def _create(group: zarr.Group, key: str, values: np.ndarray, grid: Grid) -> zarr.Array:
    fill = _UNWRITTEN_COUNT if values.dtype == np.int64 else float("nan")
    return create_array(group, key, grid, values.dtype, fill_value=fill)


def verify_kept(store: Content) -> None:
    """Read all derived arrays and compare them with their checksums.

    Raises:
        StoreError: some are damaged. One that is being written, or that an earlier release has left
            without checksums, is passed over: it is not used.
    """
    for top in ("gram", "randomized"):
        try:
            if _check_group(_raw(store, top) or _EMPTY_GROUP):
                raise ValueError("its description is malformed")
        except (ValueError, KeyError) as error:
            raise _damaged(store, top, top, str(error)) from error
        for part in range(len(store.layout.parts)):
            name = f"{top}/{part}"
            before = _raw(store, name)
            try:
                attributes = _attributes(store, name)
                for key in attributes.get("arrays", ()):
                    _check_description(store, name, key, _array(store, name, key, attributes))
            except Exception as error:
                if before == _raw(store, name):  # else another process replaces it
                    raise _damaged(store, top, name, str(error)) from error


def _damaged(store: Content, top: str, name: str, reason: str) -> StoreError:
    return StoreError(
        f"{store.path}: {name}, which is derived from the steps, is damaged ({reason}); remove"
        f" {top}/ inside the store, and it is computed again"
    )


def _check_description(store: Content, name: str, key: str, values: np.ndarray) -> None:
    stored = json.loads(_raw(store, f"{name}/{key}") or b"null")
    for grid in (_grid(values), _grid_before(values)):
        wanted = zarr.create_group(MemoryStore())
        _create(wanted, key, values, grid)
        if stored == json.loads(raw_description(wanted, key) or b""):
            return
    raise ValueError(f"the description of {key} is malformed")


def _raw(store: Content, name: str) -> bytes | None:
    return raw_description(zarr.open_group(store.path, mode="r"), name)


def _check_group(raw: bytes) -> dict[str, Any]:
    """The attributes of a group with this description.

    Raises:
        ValueError, KeyError: it does not describe a group.
    """
    document = json.loads(raw)
    attributes = document["attributes"]
    if document != {"attributes": attributes, "zarr_format": 3, "node_type": "group"}:
        raise ValueError("its description is malformed")
    return attributes


def _attributes(store: Content, name: str) -> dict[str, Any]:
    """Checked attributes; empty if there are none.

    Raises:
        ValueError: they do not fit their checksum.
    """
    attributes = _check_group(_raw(store, name) or _EMPTY_GROUP)
    if not {"content", "arrays", "checksum"} & set(attributes):
        return {}  # half-written, or kept by a release that had no checksums here
    content = {key: value for key, value in attributes.items() if key != "checksum"}
    if attributes.get("checksum") != json_checksum(content):
        raise ValueError("its description does not match its checksum")
    return content if content["format_version"] == FORMAT_VERSION else {}


def _array(store: Content, name: str, key: str, attributes: dict[str, Any]) -> np.ndarray:
    """A whole array of a group with these attributes.

    Raises:
        ValueError: it does not match its checksum. (What Zarr raises of damage goes through.)
    """
    values = np.asarray(zarr.open_array(store.path, path=f"{name}/{key}", mode="r")[:])
    if attributes["arrays"][key] != _checksum(values):
        raise ValueError(f"{key} does not match its checksum")
    return values


def _checksum(values: np.ndarray) -> int:
    return extend_checksum(0, np.ascontiguousarray(values).reshape(-1))
