"""The writer's lock: one process at a time changes a store, or writes the folder beside which the
lock lies.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import socket
from pathlib import Path
from uuid import uuid4

from relexkit.errors import StoreError
from relexkit.store.durable import make_folder
from relexkit.store.lease import Lease

_MEMBER = ".member-"


class WriterLock(contextlib.AbstractContextManager):
    """The writer's lock: ``flock`` on a file beside the store, which names its owner and vanishes
    with the process; of a store behind an ``s3://`` URL a ``Lease``.

    Args:
        member: this process writes parts for the one that has the lock. It has a lock of its own,
            so that nobody else begins to write before it ends, should that one die.
    """

    def __init__(self, path: str, *, member: bool = False):
        self._file = None
        self._lease = Lease(path) if path.startswith("s3://") and not member else None
        if "://" in path:
            return  # other object stores take no conditions; one writer is the user's promise
        lock_path = os.path.realpath(path)  # one lock, whatever the spelling of the path
        lock_path += f"{_MEMBER}{uuid4().hex}.lock" if member else ".lock"
        try:
            make_folder(Path(lock_path).parent)
            while True:
                fd = os.open(
                    lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
                )
                file = os.fdopen(fd, "r+")  # held until close()
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    owner = file.read().strip() or "another process"
                    file.close()
                    raise StoreError(
                        f"{path}: is being written by {owner}; wait until it ends"
                    ) from None
                if os.path.exists(lock_path) and os.path.samestat(
                    os.fstat(file.fileno()), os.stat(lock_path)
                ):
                    break
                file.close()  # its owner removed it between our open and our lock
            file.truncate(0)
            user = os.environ.get("USER") or f"user {os.getuid()}"
            file.write(f"process {os.getpid()} of {user} on {socket.gethostname()}")
            file.flush()
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be locked for writing ({error.strerror or error}); expected a"
                " writable place on a file system with locks: choose another -o"
            ) from error
        self._file, self._path = file, lock_path

    def check(self) -> None:
        """Refuse to go on if the lock may be another's by now, as that of an object store may be.

        Raises:
            StoreError: it may.
        """
        if self._lease is not None:
            self._lease.check()

    def close(self) -> None:
        """Release the lock and remove its file."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._file.close()
            self._file = None

    def __exit__(self, *_: object) -> None:
        self.close()


def leading(path: str) -> WriterLock:
    """The lock of a store's writer, once no process of an earlier team still writes parts of it.

    Raises:
        StoreError: another process writes the store.
    """
    lock = WriterLock(path)
    try:
        if "://" not in path:
            place = Path(os.path.realpath(path))
            for other in place.parent.glob(f"{glob.escape(place.name)}{_MEMBER}*.lock"):
                WriterLock(str(other.with_suffix(""))).close()  # it may be that of a dead one
    except BaseException:
        lock.close()
        raise
    return lock
