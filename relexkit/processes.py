"""The processes that work together under ``torchrun``: who leads, what all agree on; and the
processors that one may use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from relexkit.errors import RelexkitError

_T = TypeVar("_T")


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Processes:
    """The processes of ``torch.distributed``, or this one alone."""

    def __init__(self) -> None:
        import torch.distributed as dist

        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, on every process."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Any) -> Any:
        """A tensor summed over the processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def agree(self, action: Callable[[], _T]) -> _T:
        """Run ``action`` (without collective calls in it) on every process; if it fails on one,
        every one raises.
        """
        try:
            result = action()
        except Exception as error:
            self.gather(str(error) if isinstance(error, RelexkitError) else repr(error))
            raise
        for rank, message in enumerate(self.gather(None)):
            if message is not None:
                raise RelexkitError(f"process {rank}: {message}")
        return result

    def lead(self, action: Callable[[], _T]) -> _T | None:
        """``agree`` on what only the first process does; None on the others."""
        return self.agree(lambda: action() if self.rank == 0 else None)


@contextmanager
def joined(backend: str, timeout: timedelta | None = None) -> Iterator[Processes]:
    """The processes that ``torchrun`` has started, joined for the time of the block; this one alone
    otherwise.

    Args:
        backend: of ``torch.distributed``, such as ``gloo`` or ``nccl``.
        timeout: how long one waits for the others; PyTorch's if not given.
    """
    import torch.distributed as dist

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if several:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield Processes()
    finally:
        if several:
            dist.destroy_process_group()
