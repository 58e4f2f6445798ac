"""A local store as Zarr writes it, through ``relexkit.store.durable``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from relexkit.store import durable


class DurableStore(LocalStore):
    """A folder that Zarr writes to; ``unflushed`` knows what is not on the disk yet."""

    def __init__(
        self,
        root: Path | str,
        *,
        read_only: bool = False,
        unflushed: durable.Unflushed | None = None,
    ):
        super().__init__(root, read_only=read_only)
        self.unflushed = durable.Unflushed() if unflushed is None else unflushed

    def with_read_only(self, read_only: bool = False) -> DurableStore:
        """The same folder, with the same notes."""
        return type(self)(self.root, read_only=read_only, unflushed=self.unflushed)

    async def set(self, key: str, value: Buffer) -> None:
        """Write one file, at once for whoever reads it."""
        self._check_writable()
        await asyncio.to_thread(self._write, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """As ``set``, if there is no such file; there is one writer."""
        if not await self.exists(key):
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """As ``set``, for callers outside the event loop."""
        self._check_writable()
        self._write(key, value)

    def _write(self, key: str, value: Buffer) -> None:
        # the description of the whole says whether there is a store: never a name without content
        unflushed = None if key == "zarr.json" else self.unflushed
        durable.write_file(self.root / key, value.as_buffer_like(), unflushed)


def for_writing(path: str) -> Any:
    """What Zarr takes to write the store at ``path``: a ``DurableStore``, or a URL as it is."""
    return path if "://" in path else DurableStore(path)


def unflushed_of(store: Any) -> durable.Unflushed | None:
    """The notes of a ``DurableStore``; None for any other, which keeps what it has taken."""
    return store.unflushed if isinstance(store, DurableStore) else None


def flush(store: Any) -> None:
    """Put on the disk what a ``DurableStore`` has written; any other keeps what it has taken."""
    if isinstance(store, DurableStore):
        store.unflushed.flush()
