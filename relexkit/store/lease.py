"""The writer's lock of a store in object storage: an object that only one writer can put.

Such a store has no ``flock``, and nothing notices that a process is gone. So the lock is an object
``RUN.zarr.lock`` beside the store, put on the condition that it is not there; its owner puts it
again every few seconds, on the condition that it is still its own. One that nobody has put again
for a minute, by the clock of the storage, is left over from a killed writer: another takes it, on
the condition that it is still the one that was looked at.

S3 and what speaks its protocol take such conditions; of other storage one writer at a time is the
user's promise.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from email.utils import parsedate_to_datetime
from typing import Any

from relexkit.errors import StoreError

SECONDS = 60.0
"""Age at which a lease that is not renewed may be taken by another writer."""

_RENEWALS = 4  # in that time
_CONDITION_FAILED = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "404"}


class Lease:
    """The only lease on the store at an ``s3://`` URL, renewed in the background.

    Raises:
        StoreError: another writer has it, or the storage cannot be written.
    """

    def __init__(self, url: str, seconds: float = SECONDS):
        import fsspec

        self._url, self._seconds = url, seconds
        files, path = fsspec.core.url_to_fs(url)
        self._files, self._lost = files, False
        self._bucket, _, key = path.rstrip("/").partition("/")
        self._key = f"{key}.lock"
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            self._tag = self._acquire()
        except OSError as error:
            raise StoreError(
                f"{url}: cannot be locked for writing ({error.strerror or error}); expected storage"
                " that takes conditional writes: choose another -o"
            ) from error
        self._renewed = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse to go on if another writer may have the lease by now.

        Raises:
            StoreError: it was lost, or could not be renewed for too long.
        """
        if self._lost or time.monotonic() - self._renewed > self._seconds:
            raise StoreError(
                f"{self._url}: this process was cut off for too long and may not be the only"
                " writer any more; run the command again"
            )

    def close(self) -> None:
        """Give the lease back."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it is another's by now, or will be in a minute
            self._call("delete_object", IfMatch=self._tag)

    def _acquire(self) -> str:
        tag = self._put(IfNoneMatch="*")
        if tag is None:
            owner, tag = self._take_over()
        if tag is None:
            raise StoreError(f"{self._url}: is being written by {owner}; wait until it ends")
        return tag

    def _take_over(self) -> tuple[str, str | None]:
        """The owner of the present lease, and the tag of our own if it was abandoned."""
        try:
            head = self._call("head_object")
        except FileNotFoundError:  # it was given back just now
            return "another process", self._put(IfNoneMatch="*")
        owner = head.get("Metadata", {}).get("owner", "another process")
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        if (now - head["LastModified"]).total_seconds() <= self._seconds:
            return owner, None
        return owner, self._put(IfMatch=head["ETag"])

    def _put(self, **condition: str) -> str | None:
        """Put the object, whose tag is returned; None if the condition does not hold."""
        body = uuid.uuid4().bytes  # so that no two leases have the same tag
        try:
            made = self._call("put_object", Body=body, Metadata={"owner": self._owner}, **condition)
        except OSError as error:
            response = getattr(error.__cause__, "response", {})
            if response.get("Error", {}).get("Code") in _CONDITION_FAILED:
                return None
            raise
        return made["ETag"]

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._files.call_s3(method, Bucket=self._bucket, Key=self._key, **arguments)

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds / _RENEWALS):
            try:
                tag = self._put(IfMatch=self._tag)
            except OSError:
                continue  # the connection may come back in time
            if tag is None:
                self._lost = True
                return
            self._tag, self._renewed = tag, time.monotonic()
