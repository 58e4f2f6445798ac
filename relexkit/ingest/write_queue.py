"""Writes made in the background, one after the other, until one fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np


class WriteQueue:
    """Calls made in order on a thread of their own. After the first failure none is made any more:
    later ones rely on the success of the earlier ones.

    Args:
        most_bytes: arguments that may wait; a larger call waits until the queue is empty.
    """

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._waiting_bytes = 0
        self._failure: BaseException | None = None

    def put(self, write: Callable[..., None], *arguments: Any) -> None:
        """Make a call once there is room in the queue; arrays and lists of bytes take room.

        Raises:
            BaseException: what the first failed call raised.
        """
        size = sum(
            a.nbytes if isinstance(a, np.ndarray) else sum(map(len, a))
            for a in arguments
            if isinstance(a, (np.ndarray, list))
        )
        self._wait(max(0, self._most - size))
        self._pending.append((self._thread.submit(self._call, write, *arguments), size))
        self._waiting_bytes += size

    def finish(self) -> None:
        """Wait until every call is made; raises as ``put`` does."""
        self._wait(0)

    def close(self) -> None:
        """``finish``, and end the thread."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()

    def _wait(self, num_bytes: int) -> None:
        """Wait until no more than ``num_bytes`` are in the queue."""
        while self._pending and (num_bytes == 0 or self._waiting_bytes > num_bytes):
            call, size = self._pending.popleft()
            self._waiting_bytes -= size
            call.result()
        if self._failure is not None:
            raise self._failure

    def _call(self, write: Callable[..., None], *arguments: Any) -> None:
        if self._failure is not None:
            return
        try:
            write(*arguments)
        except BaseException as failure:
            self._failure = failure
