"""The physical layout of a store: versions, names, chunks and codecs of its arrays.
`docs/format.md` is its specification.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from relexkit.store.encodings.bits import num_blocks
from relexkit.weights.dtypes import bits_dtype
from relexkit.weights.layout import Layout

FORMAT_VERSION = 1
FACTORS_FORMAT_VERSION = 2
"""Of stores that keep factors, which readers of version 1 do not know."""

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
METRIC_CHUNK = 2**10  # steps of a chunk of a metric, which every step replaces
BASE_CHUNK, BASE_SHARD = 2**20, 2**24

_ROWS = 64  # rows that arrays are created with; doubled when they are full
_ENTRY_CHUNK = 2**17
_ROW_CHUNK = 2**15  # a pass holds all steps of a chunk at once: 128 MiB of float32 for 1000 steps
_SPARSE_CODECS = (BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
DENSE_CODECS = (BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
WRITE_ALL: Any = {
    "write_empty_chunks": True
}  # so that a missing chunk is always damage, never a chunk of fill values
_UNWRITTEN_INDPTR = 0xFFFFFFFF
_UNWRITTEN_GAP = 0xFFFF
_UNWRITTEN_INTEGER = -1


def format_version(layout: Layout) -> int:
    """The oldest version whose readers understand a store with this layout."""
    return (
        FACTORS_FORMAT_VERSION
        if any(part.encoding == "factors" for part in layout.parts)
        else FORMAT_VERSION
    )


def create_step_arrays(group: zarr.Group, layout: Layout) -> None:
    """Create what steps are written to, with no step in it: deltas by encoding, metrics, checksums
    and the commit log.
    """
    for part, spec in enumerate(layout.parts):
        bits = bits_dtype(spec.dtype)
        signed = np.dtype(f"int{bits.itemsize * 8}")
        if spec.encoding == "sparse":
            entries = min(_ENTRY_CHUNK, max(1, spec.numel))
            shards = (1, -(-max(1, spec.numel) // entries) * entries)
            shape = (_ROWS, spec.numel)
            for leaf, dtype, fill in (("indices", np.uint16, _UNWRITTEN_GAP), ("data", signed, 0)):
                name = f"updates/{part}/{leaf}"
                create_array(
                    group,
                    name,
                    shape,
                    dtype,
                    (1, entries),
                    shards=shards,
                    codecs=_SPARSE_CODECS,
                    fill_value=fill,
                )
            shape = (_ROWS, num_blocks(spec.numel) + 1)
            create_array(
                group,
                f"updates/{part}/indptr",
                shape,
                "uint32",
                (1, shape[1]),
                fill_value=_UNWRITTEN_INDPTR,
            )
        elif spec.factors is not None:
            numel, bits = spec.factors.numel, bits_dtype(spec.factors.dtype)
            chunk = min(_ROW_CHUNK, max(1, numel))
            create_array(
                group,
                f"factors/{part}",
                (_ROWS, numel),
                bits,
                (1, chunk),
                shards=(1, -(-max(1, numel) // chunk) * chunk),
                codecs=DENSE_CODECS,
                fill_value=int(np.iinfo(bits).max),
            )
        elif spec.encoding != "fixed":
            chunk = min(_ROW_CHUNK, max(1, spec.numel))
            is_float = spec.encoding == "float"
            create_array(
                group,
                f"deltas/{part}",
                (_ROWS, spec.numel),
                np.float32 if is_float else signed,
                (1, chunk),
                shards=(1, -(-max(1, spec.numel) // chunk) * chunk),
                codecs=DENSE_CODECS,
                fill_value=float("nan") if is_float else _UNWRITTEN_INTEGER,
            )
    group.create_group("metrics", attributes=metric_list({}))
    create_array(
        group,
        "checksums",
        (_ROWS, max(1, len(layout.parts))),
        "uint32",
        (1, max(1, len(layout.parts))),
    )
    create_array(group, "steps", (_ROWS,), "int64", (LOG_CHUNK,), fill_value=-1)[:] = -1


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    chunks: tuple[int, ...],
    *,
    shards: tuple[int, ...] | None = None,
    codecs: Iterable[Any] = _SPARSE_CODECS,
    fill_value: float = 0,
) -> zarr.Array:
    """Create an array whose every chunk is written and carries a checksum, with the names of its
    dimensions; replaces what is there.
    """
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=list(codecs),
        fill_value=fill_value,
        dimension_names=_dimension_names(name, len(shape)),
        config=WRITE_ALL,
        overwrite=True,
    )


_DIMENSIONS = {
    "steps": ("step",),
    "checksums": ("step", "part"),
    "metrics": ("step",),
    "base": ("element {}",),
    "deltas": ("step", "element {}"),
    "factors": ("step", "factor element {}"),
    "updates": ("step", "entry"),
    "indptr": ("step", "block"),
    "sketches": ("step", "sketch"),
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


def create_metric(group: zarr.Group, name: str, num_rows: int) -> zarr.Array:
    """The array ``[T]`` of a metric."""
    return create_array(
        group,
        f"metrics/{name}",
        (num_rows,),
        "float64",
        (METRIC_CHUNK,),
        fill_value=float("nan"),
    )


def create_sketches(group: zarr.Group, num_rows: int, width: int) -> zarr.Array:
    """The array ``[T, width]`` of the sketches that a recorder keeps."""
    return create_array(
        group, "sketches", (num_rows, width), np.float32, (1, width), fill_value=float("nan")
    )


def create_file_array(group: zarr.Group, name: str, num_bytes: int) -> zarr.Array:
    """The array of the bytes of a file."""
    chunks = (max(1, num_bytes),)
    return create_array(group, f"files/{name}", (num_bytes,), "uint8", chunks, codecs=DENSE_CODECS)


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
    found = dict(zip(map(str, names), map(str, names if keys is None else keys), strict=False))
    return None if any("/" in key or not key for key in found.values()) else found
