"""The files or objects below a group, by name: what Zarr offers only behind its event loop."""

from __future__ import annotations

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync


def read_key(group: zarr.Group, name: str) -> bytes | None:
    """The bytes of a file or object; None if there is none."""
    buffer = sync((group.store_path / name).get(default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


def has_key(group: zarr.Group, name: str) -> bool:
    """Whether there is such a file or object."""
    return sync((group.store_path / name).exists())


def delete_key(group: zarr.Group, name: str) -> None:
    """Delete a file or object, if there is one."""
    sync((group.store_path / name).delete())


def delete_below(group: zarr.Group, name: str) -> None:
    """Delete all that lies below ``name``."""
    sync((group.store_path / name).delete_dir())


def bytes_below(group: zarr.Group, name: str) -> int:
    """Size of all that lies below ``name``."""
    return sync(group.store.getsize_prefix((group.store_path / name).path))
