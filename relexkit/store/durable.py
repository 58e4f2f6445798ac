"""Files that survive a power cut: the one place where files of a store are written, flushed and
renamed.

A renamed file may be empty after a power cut unless its content was flushed before, and its name
may be gone unless its folder was flushed after. So a file that replaces another one is flushed
before it takes the name; new files and folders are flushed together, by ``Unflushed.flush``, before
anything says that they are there.

``create``, ``write``, ``fsync``, ``rename`` and ``make_folder`` are all that touches the disk;
everything else here is made of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

_WORKERS = 8  # a journal takes what several threads flush at once
_LARGE = 2**23  # bytes; a file of this size begins to be flushed as soon as it is written


def create(path: Path) -> Any:
    """A new file at ``path``, open for writing, without a buffer."""
    return open(path, "wb", buffering=0)


def write(file: BinaryIO, content: Any) -> None:
    """Write all of ``content``, bytes or a buffer."""
    view = memoryview(content).cast("B")
    while view:
        view = view[file.write(view) :]


def fsync(path: Path) -> None:
    """Put the content of a file, or the names in a folder, on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Give a file another name, which may be that of a file that it replaces."""
    os.replace(source, target)


class Unflushed:
    """Files and folders that were written and may not be on the disk yet; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: set[Path] = set()
        self._folders: set[Path] = set()
        self._begun: list[Future[None]] = []
        self._pool: ThreadPoolExecutor | None = None

    def note_file(self, path: Path, num_bytes: int) -> None:
        """A new file of ``num_bytes``."""
        with self._lock:
            if num_bytes >= _LARGE:
                self._begun.append(self._threads().submit(fsync, path))
            else:
                self._files.add(path)

    def note_folder(self, path: Path) -> None:
        """A folder in which a name was added or replaced."""
        with self._lock:
            self._folders.add(path)

    def flush(self) -> None:
        """Put all of them on the disk: contents first, then the folders that name them.

        Raises:
            OSError: one could not be flushed. What was written since the last flush is in doubt.
        """
        with self._lock:
            files, folders, begun = self._files, self._folders, self._begun
            self._files, self._folders, self._begun = set(), set(), []
            if not (files or folders or begun):
                return
            pool = self._threads()
        begun += [pool.submit(fsync, path) for path in sorted(files)]
        _all(begun)
        _all([pool.submit(fsync, path) for path in sorted(folders)])

    def close(self) -> None:
        """End its threads; what was not flushed may be lost."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS)
        return self._pool


def _all(futures: list[Future[None]]) -> None:
    """Wait for all, then raise what the first of them raised."""
    failures = [future.exception() for future in futures]
    for failure in failures:
        if failure is not None:
            raise failure


@contextlib.contextmanager
def replacing(path: Path, unflushed: Unflushed | None = None) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends, or vanishes if it fails.

    Args:
        unflushed: notes what is to be flushed later; without it the file and its name are on the
            disk when the block ends.

    Raises:
        OSError: it could not be written or flushed.
    """
    temporary = path.with_name(f"{path.name}.partial")
    later = unflushed is not None and not os.path.lexists(path)
    try:
        try:
            file = create(temporary)
        except FileNotFoundError:
            make_folder(path.parent, unflushed)
            file = create(temporary)
        with file:
            yield file
            num_bytes = file.tell()
        if not later:
            fsync(temporary)
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if unflushed is None:
        fsync(path.parent)
        return
    if later:
        unflushed.note_file(path, num_bytes)
    unflushed.note_folder(path.parent)


def write_file(path: Path, content: Any, unflushed: Unflushed | None = None) -> None:
    """Write a whole file, at once for whoever reads it; for the arguments see ``replacing``."""
    with replacing(path, unflushed) as file:
        write(file, content)


def make_folder(path: Path, unflushed: Unflushed | None = None) -> None:
    """Make a folder and those above it that are missing."""
    if path.is_dir():
        return
    make_folder(path.parent, unflushed)
    path.mkdir(exist_ok=True)
    if unflushed is None:
        fsync(path.parent)
    else:
        unflushed.note_folder(path.parent)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Give a complete folder its name, once all files in it are on the disk.

    Raises:
        OSError: a file could not be flushed, or something is at ``folder``.
    """
    content = Unflushed()
    for inside, _, names in os.walk(temporary):
        content.note_folder(Path(inside))
        for name in names:
            content.note_file(Path(inside, name), 0)
    try:
        content.flush()
    finally:
        content.close()
    rename(temporary, folder)
    fsync(folder.parent)
