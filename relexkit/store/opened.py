"""A store opened for reading, bound to the content of its steps: what it gives is of one state, or
it refuses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from relexkit.errors import StoreError
from relexkit.store.encodings.protocol import Encoding
from relexkit.store.encodings.table import ENCODINGS, is_exact
from relexkit.store.fastpath.arrays import ReadableArrays
from relexkit.store.opening import layout_of, open_group, read_attributes, reference_of
from relexkit.store.reference import CHECKSUMS, ReferencedBase

_T = TypeVar("_T")


class OpenedStore:
    """What ``TrajectoryStore`` is without its reads; see there."""

    def __init__(self, path: str | Path, *, locked: bool = False):
        self.path, self._locked = str(path), locked
        self._lock = threading.RLock()
        self._indptr: dict[int, np.ndarray] = {}
        self._group = open_group(self.path)
        self._arrays = ReadableArrays(self._group, self.path)
        self.attributes = read_attributes(self._group, self.path)
        self.layout = layout_of(self.attributes, self.path)
        self.reference = reference_of(self.attributes, self.path)
        self._base: ReferencedBase | None = None
        if self.reference is not None:
            self._base = ReferencedBase(
                self.path,
                self.layout,
                self.reference,
                self.attributes["base"]["sha256"],
                partial(self._arrays.read_rows, "the checksums of the base", CHECKSUMS, None),
            )
        self.refresh()

    def refresh(self) -> None:
        """See the steps that a writer has committed since."""
        self._arrays.forget()
        self._indptr.clear()
        self._checksums: np.ndarray | None = None
        self._seen = self._arrays.version("steps")
        log = self._arrays.read_rows("the commit log", "steps", None)
        self.steps: np.ndarray = log[: int((log >= 0).sum())]
        if (log[len(self.steps) :] != -1).any() or (np.diff(self.steps, prepend=0) <= 0).any():
            raise StoreError(
                f"{self.path}: the commit log does not go upwards from 1 without a hole; restore"
                " the store from a copy"
            )

    def add_step(self, step: int) -> None:
        """Note a step that this process has just committed; ``refresh`` without reading
        anything.
        """
        self._indptr.clear()
        self._checksums = None
        self.steps = np.append(self.steps, step)

    def forget_shapes(self) -> None:
        """Note that this process has just made room for more steps."""
        self._arrays.forget()

    @property
    def mantissa_bits(self) -> int | None:
        """Mantissa bits of float deltas; None if no part holds any."""
        return self.attributes["mantissa_bits"]

    @property
    def exact(self) -> bool:
        """True if every recorded step can be rebuilt bit for bit (of an adapter: its own
        tensors).
        """
        return is_exact(self.layout)

    @property
    def has_factors(self) -> bool:
        """True if the steps are low-rank adapters, kept as factors."""
        return any(part.factors is not None for part in self.layout.parts)

    def encoding(self, part: int) -> Encoding:
        """How the steps of a part are kept."""
        return ENCODINGS[self.layout.parts[part].encoding]

    def row_of(self, step: int) -> int:
        """Row of a recorded step.

        Raises:
            StoreError: the step is not recorded.
        """
        rows = np.flatnonzero(self.steps == step)
        if not len(rows):
            raise StoreError(
                f"step {step} is not recorded in {self.path}; it holds {describe_steps(self.steps)}"
            )
        return int(rows[0])

    def checksums(self) -> np.ndarray:
        """Content checksum of every step and part, ``uint32 [T, parts]``."""
        self._bind()
        assert self._checksums is not None
        return self._checksums

    def check_unchanged(self) -> None:
        """Refuse results of a pass during which other steps were recorded in place of these, or the
        store was replaced; steps that were added do not matter.

        Raises:
            StoreError: these steps are gone or have another content.
        """
        self._confirm(always=True)

    def _content(self, where: str | Callable[[], str], read: Callable[[], _T]) -> _T:
        """What ``read`` gives, if it is of the steps that this reader was opened with.

        Raises:
            StoreError: ``read`` failed, or what it gave may be of other steps.
        """
        if not self._locked:
            self._bind()
        try:
            content = self._arrays.guard(where, read)
        except StoreError:
            self._confirm()  # a store that is being rewritten is not damaged
            raise
        self._confirm()
        return content

    def _bind(self) -> None:
        """Take the content checksums of these steps, before anything is read of them."""
        if self._checksums is not None:
            return
        with self._lock:
            if self._locked:
                self._checksums = self._read_checksums()
            while self._checksums is None:
                seen = self._arrays.version("steps")
                try:
                    checksums = self._read_checksums()
                except StoreError:
                    self._check_log()
                    raise
                if seen != self._seen:
                    self._check_log()
                if self._arrays.version("steps") == seen:  # else they may be of two states
                    self._checksums, self._seen = checksums, seen

    def _read_checksums(self) -> np.ndarray:
        return self._arrays.read_rows("the checksums", "checksums", len(self.steps))

    def _check_log(self) -> None:
        """Refuse a log that names other steps now."""
        if not self._is_prefix_of(self._reopened()):
            self._refuse()

    def _confirm(self, always: bool = False) -> None:
        """Refuse to go on if the commit log was replaced and these steps have another content
        now.
        """
        if self._locked:
            return
        now = self._arrays.version("steps")
        if now == self._seen and not always:
            return
        with self._lock:
            if now == self._seen and not always:
                return
            self._bind()
            other = self._reopened()
            if not self._is_prefix_of(other):
                self._refuse()
            if not np.array_equal(other.checksums()[: len(self.steps)], self.checksums()):
                self._refuse()
            self._seen = now

    def _reopened(self) -> OpenedStore:
        try:
            return type(self)(self.path)
        except StoreError as error:
            raise self._changed() from error

    def _is_prefix_of(self, other: OpenedStore) -> bool:
        return other.attributes == self.attributes and np.array_equal(
            other.steps[: len(self.steps)], self.steps
        )

    def _changed(self) -> StoreError:
        return StoreError(
            f"{self.path}: other steps were recorded in place of those that were read, or the store"
            " was replaced; run the command again when nothing writes it"
        )

    def _refuse(self) -> None:
        raise self._changed()

    def _tensor_at(self, part: int, column: int) -> str:
        segments = self.layout.segments_in(part, column)
        return segments[0].tensor.name if segments else f"part {part}"

    def _where(self, row: int, part: int, begin: int) -> str:
        return f"step {self.steps[row]}, tensor {self._tensor_at(part, begin)!r}"

    def _damaged(self, row: int, part: int, begin: int, reason: str) -> None:
        self._confirm()
        raise StoreError(
            f"{self.path}: {self._where(row, part, begin)}: {reason}; restore the store from a copy"
        )


def describe_steps(steps: np.ndarray) -> str:
    """Steps in words: ``40 steps from 1 to 40``."""
    if not len(steps):
        return "no steps"
    if len(steps) == 1:
        return f"only step {steps[0]}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
