"""Folders of folders, local or in object storage."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relexkit.checkpoints.small_files import MAX_BYTES, read_small
from relexkit.errors import CheckpointError


class Folder(ABC):
    """A folder, local or in object storage."""

    @abstractmethod
    def names(self) -> list[str]:
        """The folders in it."""

    @abstractmethod
    def small(self, path: str) -> bytes | None:
        """A small file below it, None if it is not there."""

    @abstractmethod
    def stamp(self, name: str) -> list[tuple[str, int, str]]:
        """Name, size and time of every file of one of the folders: they tell whether it has
        changed.
        """

    @abstractmethod
    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """One of the folders, as a local one while the context lasts."""


class LocalFolder(Folder):
    """A folder of this machine."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """See ``Folder``."""
        try:
            return sorted(p.name for p in self.path.iterdir() if p.is_dir())
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be listed ({error.strerror or error})"
            ) from None

    def small(self, path: str) -> bytes | None:
        """See ``Folder``."""
        return read_small(self.path / path) if (self.path / path).is_file() else None

    def stamp(self, name: str) -> list[tuple[str, int, str]]:
        """See ``Folder``."""
        try:
            return sorted(
                (str(p), p.stat().st_size, str(p.stat().st_mtime_ns))
                for p in (self.path / name, *(self.path / name).rglob("*"))
                if p.is_file()
            )
        except OSError:  # it goes away meanwhile
            return []

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """See ``Folder``."""
        yield self.path / name


class _RemoteFolder(Folder):
    """What is needed as a local folder is downloaded, and deleted afterwards."""

    def __init__(self, url: str, scratch: Path | None):
        import fsspec

        self.url, self._scratch = url.rstrip("/"), scratch
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"{url}: cannot be opened ({error}); install the fsspec package for it, such as"
                " s3fs or gcsfs"
            ) from None

    def _ask(self, what: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except FileNotFoundError:
            return None
        except CheckpointError:
            raise
        except Exception as error:  # every kind of storage has errors of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"{self.url}/{what}: cannot be read ({reason}); check the address and your access,"
                " and run again"
            ) from None

    def names(self) -> list[str]:
        entries = self._ask("", lambda: self._system.ls(self._root, detail=True)) or []
        names = [str(e["name"]).rstrip("/") for e in entries if e["type"] == "directory"]
        return sorted(name.rpartition("/")[2] for name in names)

    def small(self, path: str) -> bytes | None:
        where = f"{self._root}/{path}"
        size = self._ask(path, lambda: self._system.info(where)["size"])
        if size is None:
            return None
        if size > MAX_BYTES:
            raise CheckpointError(
                f"{self.url}/{path}: has more than {MAX_BYTES:,} bytes; expected a small file"
            )
        return self._ask(path, lambda: self._system.cat_file(where))

    def stamp(self, name: str) -> list[tuple[str, int, str]]:
        entries = (
            self._ask(name, lambda: self._system.ls(f"{self._root}/{name}", detail=True)) or []
        )
        return sorted(
            (str(e["name"]), int(e["size"] or 0), str(e.get("ETag", ""))) for e in entries
        )

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        holder = Path(tempfile.mkdtemp(prefix=".relexkit-", dir=self._scratch))
        try:
            folder = holder / name  # the name is one of ``names``: no path
            folder.mkdir()
            self._ask(name, lambda: self._fetch(name, folder))
            yield folder
        finally:
            shutil.rmtree(holder, ignore_errors=True)

    def _fetch(self, name: str, folder: Path) -> None:
        for entry in self._system.ls(f"{self._root}/{name}", detail=True):
            file = str(entry["name"]).rpartition("/")[2]
            if entry["type"] == "file" and file:
                self._system.get_file(f"{self._root}/{name}/{file}", str(folder / file))


def open_folder(source: str | Path, scratch: Path | None = None) -> Folder:
    """The folder at a path or a URL; downloads go below ``scratch``."""
    if "://" in str(source):
        return _RemoteFolder(str(source), scratch)
    return LocalFolder(Path(source))
