"""What passes over a store have in common: how many columns they take at a time, how these are cut,
how they report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from relexkit.store.encodings.bits import BLOCK, CHECKSUM_BLOCK

_S = TypeVar("_S")
_T = TypeVar("_T")

ProgressCallback = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``."""


def blocks(numel: int, size: int = CHECKSUM_BLOCK) -> Iterator[tuple[int, int]]:
    """Consecutive ``(begin, end)`` that cover ``numel`` columns in pieces of ``size`` (a multiple
    of ``BLOCK``).
    """
    return stretches((0, numel), size)


def stretches(span: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ``(begin, end)`` that cover ``span`` in pieces of ``size``."""
    for begin in range(*span, size):
        yield begin, min(begin + size, span[1])


def column_windows(
    entries: np.ndarray, numel: int, most_entries: int, most_columns: int
) -> Iterator[tuple[int, int]]:
    """Cut ``numel`` columns between blocks so that no window has more entries or columns (but at
    least one block).

    ``entries`` counts the entries of each block over all steps.
    """
    first, filled = 0, 0
    for block, count in enumerate(entries):
        if block > first and (
            filled + count > most_entries or (block + 1 - first) * BLOCK > most_columns
        ):
            yield first * BLOCK, block * BLOCK
            first, filled = block, 0
        filled += int(count)
    if numel:
        yield first * BLOCK, numel


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[_S], _T], items: Iterable[_S], ahead: int
) -> Iterator[_T]:
    """Results of the workers of a pool in the order of ``items``, at most ``ahead`` of them waiting
    or in work.
    """
    pending: deque[Future[_T]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
