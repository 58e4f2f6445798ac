"""SIGINT and SIGTERM end a command in one line, with status 130 or 143, from the first line on.

While a command runs they raise, so that it leaves its outputs as it should; before and after that,
and where an exception would get lost (in an import, in a destructor), they end the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_IMPORTING = "<frozen importlib._bootstrap>"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; whatever cleans up after Ctrl-C does so after this too."""


def status_of(interruption: KeyboardInterrupt) -> int:
    """The exit status that a shell expects: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT)


def sentence(number: int) -> str:
    """The message, in one line."""
    what = "terminated" if number == signal.SIGTERM else "interrupted"
    return f"relexkit: {what}; run the same command again to go on"


def end_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    """End the process in one line, without any clean-up; it leaves what a kill would leave."""
    os.write(2, f"{sentence(number)}\n".encode())
    os._exit(128 + number)


def end_at_once_on_signals() -> None:
    """What signals do while no command runs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)


@contextmanager
def raising() -> Iterator[None]:
    """Signals raise ``KeyboardInterrupt`` or ``Terminated`` in the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    hook = sys.unraisablehook
    try:
        for number in numbers:
            signal.signal(number, _raise)
        sys.unraisablehook = _not_ignored(hook)
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    if _importing(frame):
        end_at_once(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _not_ignored(hook: Any) -> Any:
    """Python's report of an exception that it can only ignore; an interruption ends the process
    instead.
    """

    def unraisable(raised: Any) -> None:
        if issubclass(raised.exc_type, KeyboardInterrupt):
            terminated = issubclass(raised.exc_type, Terminated)
            end_at_once(signal.SIGTERM if terminated else signal.SIGINT)
        hook(raised)

    return unraisable
