"""A disk that fails, and one that loses its power: what the tests of durability put under the
program.

Inside ``watched`` everything that changes files below a folder goes through one place: opening a
file for writing, making a folder or a link, writing, flushing, renaming, removing. There the k-th
operation can be made to fail, and the whole sequence can be kept as a log. ``after_cut`` builds
from a log the folder that a machine might find after its power went: of every file what was
written up to its last flush, or more; of every folder the names up to its last flush, or more.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from relexkit.store import durable

_FSYNC = durable.fsync  # the other tests leave it out, for the session that begins after this

FAILING = ("open", "mkdir", "write", "fsync", "rename")
"""Operations that can be made to fail."""


@dataclass(frozen=True)
class Event:
    """One operation: ``kind`` of ``FAILING``, ``remove`` or ``truncate``; paths relative to the
    folder.

    ``handle`` numbers the opened files; ``at`` and ``content`` say what a write put where.
    """

    kind: str
    path: str
    target: str = ""
    handle: int = 0
    at: int = 0
    content: bytes = b""


@dataclass
class Disk:
    """What happens below ``root``.

    Attributes:
        fail_at: number, from 1, of the operation of ``FAILING`` that fails; 0 for none.
        stays: all operations from there on fail too, as on a disk that is full; flushes and names
            of a full disk still work.
        count: operations of ``FAILING`` so far.
        failed: what has failed, as ``kind path``.
        log: every operation that went well.
    """

    root: Path
    fail_at: int = 0
    error: int = errno.ENOSPC
    stays: bool = False
    count: int = 0
    failed: list[str] = field(default_factory=list)
    log: list[Event] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)
    _handles: dict[int, tuple[int, str]] = field(default_factory=dict)
    _number: int = 0

    def inside(self, path: Any, folder: int | None = None) -> str | None:
        """Path below the root, or None if it is not there. Locks are no data."""
        if isinstance(path, int):
            held = self._handles.get(path)
            return (
                held[1] if held is not None else self.inside(os.readlink(f"/proc/self/fd/{path}"))
            )
        text = os.fspath(path)
        if isinstance(text, bytes):
            text = os.fsdecode(text)
        if folder is not None:
            text = f"{os.readlink(f'/proc/self/fd/{folder}')}/{text}"
        text = os.path.abspath(text)
        below = f"{self.root}/"
        return text[len(below) :] if text.startswith(below) and ".lock" not in text else None

    def step(self, kind: str, path: str) -> None:
        """Count an operation, and fail if it is its turn."""
        with self._lock:
            self.count += 1
            full = self.stays and self.failed and kind in ("open", "write", "mkdir")
            if self.count == self.fail_at or full:
                self.failed.append(f"{kind} {path}")
                raise OSError(self.error, os.strerror(self.error), str(self.root / path))

    def opened(self, fd: int, path: str) -> int:
        with self._lock:
            self._number += 1
            self._handles[fd] = (self._number, path)
            return self._number

    def closed(self, fd: int) -> None:
        self._handles.pop(fd, None)


class _File(io.FileIO):
    """A file opened for writing below the root."""

    disk: Disk
    inside: str
    handle: int

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self.disk.step("write", self.inside)
        with self.disk._lock:
            at = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
            done = super().write(view)
            assert done == len(view)
            self.disk.log.append(
                Event("write", self.inside, handle=self.handle, at=at, content=bytes(view))
            )
        return done

    def truncate(self, size: int | None = None) -> int:
        raise NotImplementedError("no file of ours is truncated while it is open")

    def close(self) -> None:
        if not self.closed:
            self.disk.closed(self.fileno())
        super().close()


@contextlib.contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Route what Python does to files below ``disk.root`` through the disk."""
    real = {name: getattr(os, name) for name in _PATCHED}
    real_open, real_close = io.open, os.close

    def opening(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        path = None if isinstance(file, int) or opener else disk.inside(file)
        if path is None or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        with disk._lock:
            disk.step("open", path)
            there = os.path.lexists(file)
            raw = _File(os.fspath(file), mode.replace("b", "").replace("t", ""))
            raw.disk, raw.inside = disk, path
            raw.handle = disk.opened(raw.fileno(), path)
            kind = "truncate" if there and "w" in mode else "open"
            disk.log.append(Event(kind, path, handle=raw.handle))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        inside = disk.inside(path, dir_fd)
        if inside is None or not flags & (os.O_WRONLY | os.O_RDWR):
            return real["open"](path, flags, mode, dir_fd=dir_fd)
        with disk._lock:
            disk.step("open", inside)
            there = (disk.root / inside).exists()
            fd = real["open"](path, flags, mode, dir_fd=dir_fd)
            kind = "truncate" if there and flags & os.O_TRUNC else "open"
            disk.log.append(Event(kind, inside, handle=disk.opened(fd, inside)))
        return fd

    def os_close(fd: int) -> None:
        disk.closed(fd)
        real_close(fd)

    def os_write(fd: int, content: Any, at: int | None = None) -> int:
        held = disk._handles.get(fd)
        if held is None:
            return real["write"](fd, content) if at is None else real["pwrite"](fd, content, at)
        disk.step("write", held[1])
        with disk._lock:
            place = os.lseek(fd, 0, os.SEEK_CUR) if at is None else at
            view = memoryview(content).cast("B")
            done = real["write"](fd, view) if at is None else real["pwrite"](fd, view, at)
            part = bytes(view[:done])
            disk.log.append(Event("write", held[1], handle=held[0], at=place, content=part))
        return done

    def fallocate(fd: int, offset: int, length: int) -> None:
        held = disk._handles.get(fd)
        if held is None:
            real["posix_fallocate"](fd, offset, length)
            return
        disk.step("write", held[1])
        with disk._lock:
            size = os.fstat(fd).st_size
            real["posix_fallocate"](fd, offset, length)
            grown = bytes(max(0, offset + length - size))
            disk.log.append(Event("write", held[1], handle=held[0], at=size, content=grown))

    def fsync(fd: int) -> None:
        inside = disk.inside(fd)
        if inside is not None or os.readlink(f"/proc/self/fd/{fd}") == str(disk.root):
            disk.step("fsync", inside or "")
            with disk._lock:
                disk.log.append(Event("fsync", inside or ""))
        # the real one would only cost time: no test cuts the power

    def rename(source: Any, target: Any, **options: Any) -> None:
        pair = disk.inside(source, options.get("src_dir_fd")), disk.inside(target)
        if pair[0] is None or pair[1] is None:
            assert pair == (None, None), f"renamed across the border: {source} {target}"
            real["replace"](source, target, **options)
            return
        disk.step("rename", pair[1])
        with disk._lock:
            real["replace"](source, target, **options)
            disk.log.append(Event("rename", pair[0], target=pair[1]))

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        inside = disk.inside(path, dir_fd)
        if inside is None:
            real["mkdir"](path, mode, dir_fd=dir_fd)
            return
        if not (disk.root / inside).exists():
            disk.step("mkdir", inside)
        with disk._lock:
            real["mkdir"](path, mode, dir_fd=dir_fd)
            disk.log.append(Event("mkdir", inside))

    def removing(name: str) -> Any:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            inside = disk.inside(path, dir_fd)
            with disk._lock:
                real[name](path, dir_fd=dir_fd)
                if inside is not None:
                    disk.log.append(Event("remove", inside))

        return remove

    def linking(name: str) -> Any:
        def refuse(*arguments: Any, **options: Any) -> Any:
            assert all(disk.inside(a) is None for a in arguments), f"os.{name} is not modelled"
            return real[name](*arguments, **options)

        return refuse

    replaced = {
        "open": os_open,
        "close": os_close,
        "write": os_write,
        "pwrite": os_write,
        "posix_fallocate": fallocate,
        "fsync": fsync,
        "fdatasync": fsync,
        "rename": rename,
        "replace": rename,
        "mkdir": mkdir,
        "unlink": removing("unlink"),
        "remove": removing("remove"),
        "rmdir": removing("rmdir"),
        "link": linking("link"),
        "symlink": linking("symlink"),
    }
    assert replaced.keys() == {*_PATCHED, "close"}
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(os, name, function))
        for owner in (io, builtins):
            stack.enter_context(mock.patch.object(owner, "open", opening))
        if durable.fsync is not _no_fsync:
            stack.enter_context(mock.patch.object(durable, "fsync", _FSYNC))
        # rmtree asks whether the functions that it uses take descriptors of folders
        known = {os.open, os.mkdir, os.unlink, os.remove, os.rmdir, os.rename, os.replace}
        stack.enter_context(mock.patch.object(os, "supports_dir_fd", os.supports_dir_fd | known))
        yield disk


def without_flushes() -> Any:
    """Inside, nothing is ever flushed, also not in ``watched``."""
    return mock.patch.object(durable, "fsync", _no_fsync)


def _no_fsync(path: Path) -> None:
    pass


_PATCHED = (
    "open",
    "write",
    "pwrite",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "rename",
    "replace",
    "mkdir",
    "unlink",
    "remove",
    "rmdir",
    "link",
    "symlink",
)


# -- power cuts ------------------------------------------------------------------------------------


class _Inode:
    def __init__(self, content: bytes | None):
        self.content = content  # None: a folder
        self.writes: list[tuple[int, bytes]] = []  # since the last flush; (-1, b"") empties
        self.names: dict[str, _Inode] = {}  # as flushed
        self.changes: list[list[tuple[str, _Inode | None]]] = []  # since; each of them at once

    def now(self) -> dict[str, _Inode]:
        """The names that a running machine sees."""
        return _changed(self.names, self.changes)


def _changed(
    names: dict[str, _Inode], changes: list[list[tuple[str, _Inode | None]]]
) -> dict[str, _Inode]:
    found = dict(names)
    for change in changes:
        for name, inode in change:
            if inode is None:
                found.pop(name, None)
            else:
                found[name] = inode
    return found


def _written(content: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    found = bytearray(content)
    for at, piece in writes:
        if at < 0:
            found.clear()
            continue
        found.extend(bytes(max(0, at - len(found))))
        found[at : at + len(piece)] = piece
    return bytes(found)


def _snapshot(path: Path) -> _Inode:
    if not path.is_dir():
        return _Inode(path.read_bytes())
    folder = _Inode(None)
    folder.names = {p.name: _snapshot(p) for p in path.iterdir() if ".lock" not in p.name}
    return folder


class Power:
    """Goes through a log and can be cut anywhere.

    Args:
        before: a copy of the folder as it was, all of it on the disk, when the log began.
    """

    def __init__(self, before: Path, log: list[Event]):
        self._root = _snapshot(before)
        self._log = log
        self._handles: dict[int, _Inode] = {}
        self.done = 0

    def go_on(self, until: int) -> None:
        """Let the operations up to number ``until`` happen."""
        for event in self._log[self.done : until]:
            self._apply(event)
        self.done = max(self.done, until)

    def _find(self, path: str) -> _Inode:
        found = self._root
        for name in Path(path).parts:
            found = found.now()[name]
        return found

    def _apply(self, event: Event) -> None:
        parent, name = str(Path(event.path).parent), Path(event.path).name
        if event.kind in ("open", "truncate"):
            folder = self._find(parent)
            if name not in folder.now():
                folder.changes.append([(name, _Inode(b""))])
            inode = self._handles[event.handle] = folder.now()[name]
            if event.kind == "truncate":
                inode.writes.append((-1, b""))
        elif event.kind == "write":
            self._handles[event.handle].writes.append((event.at, event.content))
        elif event.kind == "mkdir":
            self._find(parent).changes.append([(name, _Inode(None))])
        elif event.kind == "remove":
            self._find(parent).changes.append([(name, None)])
        elif event.kind == "rename":
            assert str(Path(event.target).parent) == parent, f"{event.path} moves to {event.target}"
            moved = self._find(event.path)
            self._find(parent).changes.append([(name, None), (Path(event.target).name, moved)])
        elif event.kind == "fsync":
            inode = self._find(event.path)
            if inode.content is None:
                inode.names, inode.changes = inode.now(), []
            else:
                inode.content, inode.writes = _written(inode.content, inode.writes), []

    def after_cut(self, place: Path, chance: random.Random | None) -> None:
        """Build at ``place`` what is on the disk when the power goes now: of what was not flushed a
        random first part each, nothing without ``chance``.
        """
        _build(self._root, place, chance)

    def running(self, place: Path) -> None:
        """Build at ``place`` what a machine sees whose power stays."""
        _build(self._root, place, None, everything=True)


def _build(
    inode: _Inode, place: Path, chance: random.Random | None, everything: bool = False
) -> None:
    def kept(changes: list[Any]) -> list[Any]:
        if everything:
            return changes
        return changes[: chance.randint(0, len(changes))] if chance and changes else []

    if inode.content is not None:
        place.write_bytes(_written(inode.content, kept(inode.writes)))
        return
    place.mkdir()
    for name, inner in _changed(inode.names, kept(inode.changes)).items():
        _build(inner, place / name, chance, everything)


def same_files(first: Path, second: Path) -> list[str]:
    """Paths below two folders that differ, locks left out."""
    trees = []
    for folder in (first, second):
        paths = [p for p in folder.rglob("*") if ".lock" not in p.name]
        trees.append(
            {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}
        )
    names = {*trees[0], *trees[1]}
    return sorted(n for n in names if trees[0].get(n, 0) != trees[1].get(n, 0))


def copy(source: Path, target: Path) -> Path:
    """A copy of a folder in place of whatever is there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
