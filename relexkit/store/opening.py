"""Opening a store's group and checking that it is one: its description, format version and
state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zarr

from relexkit.errors import StoreError
from relexkit.store.encodings.table import check_encodings, format_versions
from relexkit.store.format import json_checksum
from relexkit.store.reference import FORMAT_VERSION, Reference
from relexkit.weights.layout import Layout


class NotAStoreError(StoreError):
    """Something else is there, or nothing."""


class CreationInterrupted(NotAStoreError):
    """A store that a killed writer has not finished creating."""


def open_group(path: str) -> zarr.Group:
    """The Zarr group at ``path``, for reading, whatever it holds.

    Raises:
        NotAStoreError: there is no group.
        StoreError: it is damaged, or needs a package that is not installed.
    """
    if "::" in path and not os.path.isdir(path):
        raise StoreError(
            f"{path}: is a chain of addresses; expected one, a folder or a URL such as"
            " s3://BUCKET/RUN.zarr: unpack archives first"
        )
    if "://" not in path and not os.path.isdir(path):
        raise NotAStoreError(
            f"{path}: no such store; expected a folder written by `relexkit import`"
        )
    try:
        return zarr.open_group(path, mode="r")
    except ImportError as error:
        raise StoreError(
            f"{path}: cannot be opened ({error}); install the fsspec package for it, such as s3fs"
        ) from error
    except FileNotFoundError:
        raise NotAStoreError(
            f"{path}: is not a trajectory store; expected a folder written by `relexkit import`"
            f"{store_inside(path)}"
        ) from None
    except Exception as error:
        raise StoreError(
            f"{path}: is not a readable Zarr group ({error}); restore the store from a copy"
        ) from error


def store_inside(path: str) -> str:
    """What to add about a folder that is not a store but holds one; empty if it does not."""
    stores = sorted(p.parent for p in Path(path).glob("*/zarr.json")) if "://" not in path else []
    return f": did you mean {stores[0]}?" if stores else ""


def read_attributes(group: zarr.Group, path: str) -> dict[str, Any]:
    """The description of a complete store of a version that this relexkit reads.

    Raises:
        NotAStoreError: it has none, or its creation was interrupted.
        StoreError: it is of another version, or damaged.
    """
    attributes = dict(group.attrs).get("relexkit")
    if not isinstance(attributes, dict) or "format_version" not in attributes:
        raise NotAStoreError(
            f"{path}: is a Zarr group but not a trajectory store; expected one written by `relexkit"
            " import`"
        )
    versions = [*format_versions(), FORMAT_VERSION]
    if attributes["format_version"] not in versions:
        known = f"{', '.join(map(str, versions[:-1]))} and {versions[-1]}"
        raise StoreError(
            f"{path}: has format version {attributes['format_version']!r}; this relexkit reads"
            f" versions {known}: install the release that wrote it"
        )
    if attributes.get("state") != "ready":
        raise CreationInterrupted(
            f"{path}: its creation was interrupted; run the same `relexkit import` again"
        )
    content = {key: value for key, value in attributes.items() if key != "checksum"}
    if attributes.get("checksum") != json_checksum(content):
        raise StoreError(
            f"{path}: its description (zarr.json) is damaged; restore the store from a copy"
        )
    odd = next(
        (key for key, fits in _FIELDS.items() if key not in content or not fits(content[key])), None
    )
    if odd is not None:
        raise StoreError(
            f"{path}: its description (zarr.json) has no usable {odd!r}; restore the store from a"
            " copy"
        )
    return content


def layout_of(attributes: dict[str, Any], path: str) -> Layout:
    """The layout in the description of a store.

    Raises:
        StoreError: it is not valid: tensors overlap, a shape is negative, a name is missing.
    """
    try:
        layout = Layout.from_json(attributes["layout"])
        check_encodings(layout)
        return layout
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: its description (zarr.json) is malformed ({error}); restore the store from a"
            " copy"
        ) from None


def reference_of(attributes: dict[str, Any], path: str) -> Reference | None:
    """Where the base is that a store only refers to; None if the store holds it.

    Raises:
        StoreError: the description is not valid.
    """
    if "base_reference" not in attributes:
        return None
    try:
        return Reference.from_json(attributes["base_reference"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: its description (zarr.json) is malformed ({error}); restore the store from a"
            " copy"
        ) from None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "source": _is_text,
    "relexkit_version": _is_text,
    "mantissa_bits": lambda bits: bits is None or (type(bits) is int and 1 <= bits <= 23),
    "files": lambda names: isinstance(names, list) and all(map(_is_text, names)),
    "base": lambda base: (
        isinstance(base, dict)
        and _is_text(base.get("description"))
        and _is_text(base.get("sha256"))
    ),
}
"""What every reader relies on in a description; the layout is checked where it is read."""
