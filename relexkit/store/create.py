"""Creating a store: what may be replaced at its place, and in which order its parts are written so
that a crash shows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from relexkit.errors import StoreError
from relexkit.store.base import ReadBase, create_base, write_base, write_base_parts
from relexkit.store.durable import make_folder
from relexkit.store.encodings.table import format_version, is_exact
from relexkit.store.fastpath.keys import delete_below, delete_key
from relexkit.store.fastpath.local import flush, for_writing, unflushed_of
from relexkit.store.format import create_file_array, create_step_arrays, json_checksum
from relexkit.store.lock import WriterLock, leading
from relexkit.store.opening import CreationInterrupted, NotAStoreError, open_group, read_attributes
from relexkit.store.passes import ProgressCallback
from relexkit.store.reference import FORMAT_VERSION, Reference
from relexkit.version import __version__
from relexkit.weights.layout import Layout


@dataclass(frozen=True, kw_only=True)
class About:
    """What a store says of its run.

    Attributes:
        source, base: where the checkpoints and the base came from, in words.
        files: configuration and tokenizer, by name.
        mantissa_bits: of float deltas; of no effect if there are none.
        reference: of a base that the store does not hold.
    """

    source: str
    base: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    mantissa_bits: int | None = None
    reference: Reference | None = None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """How one of several processes takes part in creating a store.

    Attributes:
        owned: the parts whose base it writes.
        leads: whether it does all the rest; one process does.
        wait: returns when all have called it.
    """

    owned: Collection[int]
    leads: bool
    wait: Callable[[], object]


def create_store(
    path: str | Path,
    layout: Layout,
    read_base: ReadBase,
    about: About,
    progress: ProgressCallback | None = None,
    shared: Shared | None = None,
) -> None:
    """Write a store without steps: layout, base weights or their checksums, files. Killed half-way,
    the next call starts over.

    Args:
        read_base: ``(part, begin, end) -> bits`` of the base weights.
        shared: several processes make this call at once, each with its own.

    Raises:
        StoreError: something is at ``path`` already, another process writes it, or the disk is
            full.
    """
    path = str(path)
    shared = shared or Shared(owned=range(len(layout.parts)), leads=True, wait=lambda: None)
    if not shared.leads:
        shared.wait()
        with WriterLock(path, member=True), _writing(path) as place:
            write_base_parts(zarr.open_group(place, mode="r+"), read_base, shared.owned)
        shared.wait()
        return
    with leading(path):
        _clear_for_creation(path)
        attributes: dict[str, Any] = {
            "format_version": format_version(layout) if about.reference is None else FORMAT_VERSION,
            "state": "creating",
            "relexkit_version": __version__,
            "source": about.source,
            "mantissa_bits": None if is_exact(layout) else about.mantissa_bits,
            "layout": layout.to_json(),
            "files": sorted(about.files),
        }
        if about.reference is not None:
            attributes["base_reference"] = about.reference.to_json()
        with _writing(path) as place:
            if "://" not in path:
                make_folder(Path(path))
            group = zarr.create_group(place, attributes={"relexkit": attributes})
            create_base(group, layout, by_reference=about.reference is not None)
            shared.wait()
            digest = write_base(group, layout, read_base, shared.owned, progress)
            create_step_arrays(group, layout)
            for name, content in about.files.items():
                data = np.frombuffer(content, np.uint8)
                create_file_array(group, name, len(data))[:] = data
            attributes |= {"state": "ready", "base": {"description": about.base, "sha256": digest}}
            flush(place)
            shared.wait()
            group.attrs["relexkit"] = attributes | {"checksum": json_checksum(attributes)}


@contextlib.contextmanager
def _writing(path: str) -> Iterator[Any]:
    """Where Zarr writes a store; what was written is on the disk when the block ends.

    Raises:
        StoreError: something could not be written.
    """
    place = for_writing(path)
    try:
        yield place
        flush(place)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror or error}); free space and run the"
            " command again"
        ) from error
    finally:
        unflushed = unflushed_of(place)
        if unflushed is not None:
            unflushed.close()


def _clear_for_creation(path: str) -> None:
    """Remove an interrupted creation; refuse anything else that is there."""
    if "://" in path:
        _clear_remote(path)
        return
    if not os.path.lexists(path):
        return
    folder = Path(path)
    if not folder.is_dir():
        raise StoreError(f"{path}: exists and is not a folder; choose another -o")
    if all(p.name.endswith(".partial") for p in folder.iterdir()):
        return  # empty, or killed while the very first file was written
    try:
        read_attributes(open_group(path), path)
    except CreationInterrupted:
        for child in folder.iterdir():  # zarr.json goes last: it says what this is
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != "zarr.json":
                child.unlink()
        (folder / "zarr.json").unlink()
        return
    except NotAStoreError:
        raise StoreError(
            f"{path}: exists and is not a trajectory store; choose another -o"
        ) from None
    raise StoreError(f"{path}: a store exists there; choose another -o")


def _clear_remote(path: str) -> None:
    """``_clear_for_creation`` of a URL. What an object store cannot do at once is done in the same
    order.
    """
    try:
        group = open_group(path)
    except NotAStoreError:
        return
    try:
        read_attributes(group, path)
    except CreationInterrupted:
        writable = zarr.open_group(path, mode="r+")
        for name in list(writable.keys()):
            delete_below(writable, name)
        delete_key(writable, "zarr.json")  # last: it says what this is
        return
    except NotAStoreError:
        raise StoreError(
            f"{path}: exists and is not a trajectory store; choose another -o"
        ) from None
    raise StoreError(f"{path}: a store exists there; choose another -o")
