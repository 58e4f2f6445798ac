"""Several processes on one piece of work: ``torchrun --nproc-per-node N -m relexkit ...`` divides
the columns of a pass, or the parts of a store, and puts together what they give.

Every process makes the same calls. An error in one of them is raised in all, and a process that
dies ends the others with a stated error: nothing is completed before all have answered.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.store.encodings.bits import BLOCK

_T = TypeVar("_T")

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others' share of a pass; a process that dies is noticed at once.
"""


class Team:
    """How this process, ``rank`` of ``size``, shares work with others. This class has no others,
    and loads no PyTorch; one that runs under another engine has its ``rank``, ``size`` and
    ``exchange``.
    """

    rank = 0
    size = 1

    def exchange(self, value: Any) -> list[Any]:
        """The values that all processes give, in the order of their ranks, in every process."""
        return [value]

    def spans(self, *numels: int) -> list[list[tuple[int, int]]]:
        """This process's columns of parts of so many: a share of the blocks of all of them
        together, so that few parts are divided.
        """
        counts = [-(-numel // BLOCK) for numel in numels]
        low, high = (sum(counts) * i // self.size for i in (self.rank, self.rank + 1))
        shares, before = [], 0
        for numel, count in zip(numels, counts, strict=True):
            first, last = max(low - before, 0), min(high - before, count)
            shares.append([(first * BLOCK, min(last * BLOCK, numel))] if first < last else [])
            before += count
        return shares

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work of this process; ends when all have done theirs, with the error of the first that
        failed.

        There may be calls of the team in it: what fails here reaches the others in whichever call
        they make next.
        """
        failure: Exception | None = None
        try:
            yield
        except FailedTogether:
            raise  # the others have it too
        except (RelexkitError, OSError, MemoryError) as error:
            failure = error
        self._answers(failure, None)

    def gather(self, make: Callable[[], _T]) -> list[_T]:
        """What every process makes, in every process; or the error of the first that failed."""
        made, failure = None, None
        try:
            made = make()
        except (RelexkitError, OSError, MemoryError) as error:
            failure = error
        return self._answers(failure, made)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the processes, in every process."""
        return values if self.size == 1 else np.sum(self.exchange(values), axis=0)

    def share(self, make: Callable[[], _T]) -> _T:
        """What the first process makes, in every process."""
        [first, *_] = self.gather(lambda: make() if self.rank == 0 else None)
        return first  # type: ignore[return-value]

    def _answers(self, failure: Exception | None, made: Any) -> list[Any]:
        """What all processes have made, unless one has failed."""
        if self.size == 1 and failure is not None:
            raise failure
        message = None if failure is None else str(failure) or type(failure).__name__
        answers = self.exchange((message, made))
        said = next((m for m, _ in answers if m is not None), None)
        if said is not None:
            raise FailedTogether(said, self.rank) from failure
        return [value for _, value in answers]


ALONE = Team()
"""No other process."""


class FailedTogether(RelexkitError):
    """An error that ends the work of every process; only the first one has to print it."""

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.said_elsewhere = rank > 0


class _TorchTeam(Team):
    def __init__(self, device: str, stack: contextlib.ExitStack):
        import torch

        from relexkit.processes import joined

        self._device = torch.device(device)
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        with self._alive():
            self._processes = stack.enter_context(joined(backend, TIMEOUT))
        self.rank, self.size = self._processes.rank, self._processes.size

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (
            RuntimeError
        ) as error:  # gloo: the connection to a peer is gone, or nobody answered in time
            message = (
                f"process {self.rank} of {self.size}: another process ended or does not answer"
                f" ({str(error).splitlines()[0]}); nothing is left half-written: look for its"
                " message and run the command again"
            )
            raise FailedTogether(message, 0) from error

    def exchange(self, value: Any) -> list[Any]:
        with self._alive():
            return self._processes.gather(value)

    def sum(self, values: np.ndarray) -> np.ndarray:
        import torch

        total = torch.from_numpy(np.array(values, order="C")).to(self._device)
        with self._alive():
            return self._processes.sum(total).cpu().numpy()


@contextlib.contextmanager
def team(device: str = "cpu") -> Iterator[Team]:
    """The processes that torchrun started, or this one alone; ``device`` is where the sums of
    arrays are made.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield ALONE
        return
    with contextlib.ExitStack() as stack:
        yield _TorchTeam(device, stack)


def local_device(device: str) -> str:
    """``cuda`` -> this process's own GPU when torchrun started several."""
    return (
        f"cuda:{os.environ['LOCAL_RANK']}"
        if device == "cuda" and "LOCAL_RANK" in os.environ
        else device
    )
