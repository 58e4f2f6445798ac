"""The physical layout of a store: names of its arrays and of what it holds beside them.
`docs/format.md` is its specification.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import google_crc32c
import numpy as np
import zarr

from relexkit.store.codecs import DENSE_CODECS, ROWS, Grid, create_array
from relexkit.store.encodings.table import ENCODINGS
from relexkit.store.recent_metrics import create_recent
from relexkit.weights.layout import Layout

FORMAT_VERSION = 1
"""Of derived arrays. That of a store depends on its encodings: see their table."""

SAFE_FILE_NAME = re.compile(
    r"(?!(.*/)?(relexkit\.json|zarr\.json|README|__[^/]*$))"
    r"(?!.*\.(safetensors|bin|pt|pth|ckpt|gguf|pkl|index\.json)$)"
    r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/){0,2}[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}",
    re.IGNORECASE,
)
"""Files that a store may hold and write beside weights: plain names, at most two folders deep, that
replace no weights and no record of ours.
"""

LOG_CHUNK = 2**17  # steps that a store can hold: the commit log is one chunk, replaced as a whole
METRIC_CHUNK = 2**10  # steps of a chunk of a metric


def create_step_arrays(group: zarr.Group, layout: Layout) -> None:
    """Create what steps are written to, with no step in it: deltas by encoding, metrics, checksums
    and the commit log.
    """
    for part, spec in enumerate(layout.parts):
        ENCODINGS[spec.encoding].create(group, part, spec)
    group.create_group("metrics", attributes=metric_list({}))
    create_recent(group)
    width = max(1, len(layout.parts))
    create_array(group, "checksums", Grid((ROWS, width), (1, width)), "uint32")
    create_array(group, "steps", Grid((ROWS,), (LOG_CHUNK,)), "int64", fill_value=-1)[:] = -1


def create_metric(group: zarr.Group, name: str, num_rows: int) -> zarr.Array:
    """The array ``[T]`` of a metric."""
    grid = Grid((num_rows,), (METRIC_CHUNK,))
    return create_array(group, f"metrics/{name}", grid, "float64", fill_value=float("nan"))


def create_sketches(group: zarr.Group, num_rows: int, width: int) -> zarr.Array:
    """The array ``[T, width]`` of the sketches that a recorder keeps."""
    grid = Grid((num_rows, width), (1, width))
    return create_array(group, "sketches", grid, np.float32, fill_value=float("nan"))


def create_file_array(group: zarr.Group, name: str, num_bytes: int) -> zarr.Array:
    """The array of the bytes of a file."""
    grid = Grid((num_bytes,), (max(1, num_bytes),))
    return create_array(group, f"files/{name}", grid, "uint8", DENSE_CODECS)


def json_checksum(document: Any) -> int:
    """CRC-32C of a document, however its keys are ordered."""
    return google_crc32c.value(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


_PLAIN_METRIC = re.compile(r"(?!zarr\.json$)[a-z0-9][a-z0-9_.-]{0,99}(?<!\.)")


def metric_key(name: str, taken: Collection[str]) -> str:
    """Name of the array that holds a metric: its own where every file system can have it, else
    ``_N``.

    >>> metric_key("kl", []), metric_key("rewards/format/mean", ["kl"])
    ('kl', '_1')
    """
    return name if _PLAIN_METRIC.fullmatch(name) else f"_{len(taken)}"


def metric_list(keys: Mapping[str, str]) -> dict[str, Any]:
    """Attributes of the group of metrics, from name -> name of the array.

    ``keys`` is left out where all are the same, as they were before names could be anything.
    """
    names = list(keys)
    if names == list(keys.values()):
        return {"names": names, "checksum": json_checksum(names)}
    return {
        "names": names,
        "keys": list(keys.values()),
        "checksum": json_checksum([names, list(keys.values())]),
    }


def metric_keys(attributes: Mapping[str, Any]) -> dict[str, str] | None:
    """Inverse of ``metric_list``; None if it is damaged."""
    names, keys = attributes.get("names"), attributes.get("keys")
    checked = names if keys is None else [names, keys]
    if not isinstance(names, list) or attributes.get("checksum") != json_checksum(checked):
        return None
    by_name = dict(zip(map(str, names), map(str, names if keys is None else keys), strict=False))
    return None if any("/" in key or not key for key in by_name.values()) else by_name
