"""TensorBoard events, written in the caller's thread: TensorBoard's own writer uses another one,
which prints a traceback when the disk is full and loses what it still holds when the process ends.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

_COUNT = itertools.count()


class EventFile:
    """A new file of events below ``folder``.

    Args:
        purge_step: events of this step and later ones that earlier files hold are void; None if
            nothing was logged before.

    Raises:
        OSError: the disk is full, or the place cannot be written; so does every call.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
        self._event = Event
        self._file = open(folder / f"events.out.tfevents.{name}", "wb")  # noqa: SIM115 (close)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number of a step."""
        from torch.utils.tensorboard.summary import scalar

        self._add(step=step, summary=scalar(name, value))

    def text(self, name: str, text: str, step: int) -> None:
        """A sentence about a step."""
        from torch.utils.tensorboard.summary import text as summary

        self._add(step=step, summary=summary(name, text))

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush, and close the file."""
        self._file.close()
