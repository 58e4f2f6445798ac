"""What the ``zarr.json`` of every group and array of a store must say, from its layout alone."""

from __future__ import annotations

import json
from typing import Any

import zarr
from zarr.storage import MemoryStore

from relexkit.errors import StoreError
from relexkit.store.base import create_base
from relexkit.store.fastpath.keys import read_key
from relexkit.store.format import (
    create_file_array,
    create_metric,
    create_sketches,
    create_step_arrays,
)
from relexkit.store.recent_metrics import NAME
from relexkit.store.reference import CHECKSUMS
from relexkit.weights.layout import Layout


def verify_descriptions(
    group: zarr.Group,
    layout: Layout,
    files: list[str],
    metrics: list[str],
    path: str,
    *,
    by_reference: bool,
) -> None:
    """Compare every description with that of a store which is created now for the same layout.

    How many rows there is room for, how wide a sketch is, how long a file is and how large the
    chunks are may differ: readers take them from the description.

    Raises:
        StoreError: one is damaged or missing, by name.
    """
    expected = zarr.create_group(MemoryStore())
    create_base(expected, layout, by_reference=by_reference)
    create_step_arrays(expected, layout)
    for name in files:
        create_file_array(expected, name, 1)
    for name in metrics:
        create_metric(expected, name, 64)
    if raw_description(group, "sketches") is not None:
        create_sketches(expected, 64, 1)
    if raw_description(group, NAME) is None:  # written by an earlier release
        del expected[NAME]
    for name, node in expected.members(max_depth=None):
        try:
            stored = _description(group, name)
            wanted = _description(expected, name)
            if isinstance(node, zarr.Array):
                group[name]  # what Zarr does not take is malformed
                same = _fixed(stored) == _fixed(wanted) and _same_shape(
                    name, stored["shape"], wanted["shape"]
                )
            else:
                same = {**stored, "attributes": {}} == {**wanted, "attributes": {}}
                same &= name == "metrics" or stored["attributes"] == {}
        except Exception as error:
            raise _damaged(path, name, str(error).strip().splitlines()[0]) from error
        if not same:
            raise _damaged(path, name, "it differs from what relexkit writes")


def raw_description(group: zarr.Group, name: str) -> bytes | None:
    """The bytes of the ``zarr.json`` of a group or an array; None if there is none."""
    return read_key(group, f"{name}/zarr.json")


def _description(group: zarr.Group, name: str) -> dict[str, Any]:
    content = raw_description(group, name)
    if content is None:
        raise ValueError("zarr.json is missing")
    return json.loads(content)


def _fixed(document: Any) -> Any:
    """A description without the numbers that differ between stores of one layout, and without the
    names of dimensions, which no reader uses and earlier releases did not write.
    """
    if isinstance(document, dict):
        return {
            key: len(value) if key in ("shape", "chunk_shape") else _fixed(value)
            for key, value in document.items()
            if key != "dimension_names"
        }
    return [_fixed(value) for value in document] if isinstance(document, list) else document


def _same_shape(name: str, stored: list[int], wanted: list[int]) -> bool:
    """Rows are doubled when they are full; the base has none, files and sketches have any size."""
    top = name.split("/")[0]
    if top in ("base", CHECKSUMS, "files"):
        return top == "files" or stored == wanted
    doublings = stored[0] // wanted[0]
    rows = stored[0] == doublings * wanted[0] and doublings.bit_count() == 1
    return rows and (top == "sketches" or stored[1:] == wanted[1:])


def _damaged(path: str, name: str, reason: str) -> StoreError:
    return StoreError(
        f"{path}: the description of {name} (zarr.json) is damaged ({reason}); restore the store"
        " from a copy"
    )
