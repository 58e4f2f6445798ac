"""What changed between two versions of a tensor's raw bytes, as one zstd frame, and the checksum of
the new bytes.

Trainers send such deltas to their inference engines through files. Both encodings know nothing of
dtypes:

- ``xor``: the new bytes xor the old ones; what did not change is zero, and compresses to nothing.
- ``overwrite``: the number of changed bytes, their positions, their new values, all little-endian.

Deltas come from files of unknown origin, so they are applied in blocks, and nothing that they claim
decides how much memory is taken.
"""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from relexkit.errors import CheckpointError, RelexkitError

BLOCK_BYTES = 2**20
"""Bytes that are decompressed, changed and hashed at a time: they fit a processor's cache."""

LEVEL = 1
"""Of the compression; the trainers measured that higher ones cost more than they save."""

_MAX_WINDOW_BYTES = 2**27  # what a decoder has to accept by default, and more than level 1 needs
_ENTRIES = 2**16  # of an ``overwrite`` delta that are held at a time


class Hasher(Protocol):
    """The part of ``hashlib``'s objects that is needed."""

    def update(self, data: Any, /) -> Any:
        """Continue over more bytes."""

    def hexdigest(self) -> str:
        """The checksum so far, in lower-case hexadecimal digits."""


class _Adler32:
    def __init__(self) -> None:
        self._value = 1

    def update(self, data: Any, /) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _xxh3_128() -> Hasher:
    try:
        import xxhash
    except ImportError:
        raise missing_package("xxhash") from None
    return xxhash.xxh3_128()


def _blake3() -> Hasher:
    try:
        import blake3
    except ImportError:
        raise missing_package("blake3") from None
    return blake3.blake3()


CHECKSUMS: dict[str, Callable[[], Hasher]] = {
    "xxh3-128": _xxh3_128,
    "blake3": _blake3,
    "adler32": _Adler32,
    "sha256": hashlib.sha256,
}
"""Checksums of a tensor's new bytes, by the names that trainers give them."""


def zstandard() -> Any:
    """The package of that name, imported when it is needed.

    Raises:
        RelexkitError: it is not installed.
    """
    try:
        import zstandard as package
    except ImportError:
        raise missing_package("zstandard") from None
    return package


def missing_package(name: str) -> RelexkitError:
    """What to say where a package of the extra ``sync`` is not installed."""
    return RelexkitError(
        f"weight-sync deltas need the package {name}; install it with: pip install 'relexkit[sync]'"
    )


# -- applying --------------------------------------------------------------------------------------


class Delta(ABC):
    """A delta that is being applied to a tensor of ``num_bytes`` bytes, from its beginning to its
    end.

    Args:
        open_frame: gives a new binary file, at the beginning of the compressed frame.

    Raises (in every method):
        CheckpointError: the frame is damaged or does not fit the tensor; without the tensor's name.
    """

    def __init__(self, open_frame: Callable[[], Any], num_bytes: int):
        self._num_bytes = num_bytes

    @abstractmethod
    def apply(self, begin: int, block: np.ndarray) -> None:
        """Turn the old bytes ``begin:begin+len(block)`` into the new ones, in place. Blocks follow
        one another.
        """

    @abstractmethod
    def finish(self) -> None:
        """Check that nothing is left after the last block."""


class _Frame:
    """The decompressed bytes of one frame, in order."""

    def __init__(self, file: Any):
        self._package = zstandard()
        decompressor = self._package.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._reader = decompressor.stream_reader(file, read_across_frames=False)

    def read_into(self, out: np.ndarray) -> int:
        """Fill ``out`` (bytes); returns how many there were."""
        view, filled = out.data.cast("B"), 0
        try:
            while filled < len(view):
                count = self._reader.readinto(view[filled:])
                if not count:
                    break
                filled += count
        except self._package.ZstdError as error:
            raise CheckpointError(f"its delta is not a whole zstd frame ({error})") from None
        return filled

    def expect(self, count: int) -> np.ndarray:
        """Exactly ``count`` bytes."""
        out = np.empty(count, np.uint8)
        num_read = self.read_into(out)
        if num_read < count:
            raise CheckpointError("its delta ends too early; write or copy it again")
        return out

    def skip(self, count: int) -> None:
        """Leave out ``count`` bytes."""
        while count > 0:
            count -= len(self.expect(min(count, BLOCK_BYTES)))

    def expect_end(self) -> None:
        """Nothing is left."""
        if self.read_into(np.empty(1, np.uint8)):
            raise CheckpointError("its delta unpacks to more than the tensor holds; it is damaged")


class XorDelta(Delta):
    """See the module."""

    def __init__(self, open_frame: Callable[[], Any], num_bytes: int):
        super().__init__(open_frame, num_bytes)
        self._frame = _Frame(open_frame())
        self._buffer = np.empty(min(num_bytes, BLOCK_BYTES), np.uint8)

    def apply(self, begin: int, block: np.ndarray) -> None:
        """See ``Delta``; blocks have at most ``BLOCK_BYTES``."""
        part = self._buffer[: len(block)]
        num_read = self._frame.read_into(part)
        if num_read < len(block):
            raise CheckpointError(
                f"its delta unpacks to {begin + num_read:,} bytes; the tensor has"
                f" {self._num_bytes:,}"
            )
        block ^= part

    def finish(self) -> None:
        """See ``Delta``."""
        self._frame.expect_end()


class OverwriteDelta(Delta):
    """See the module. The frame is unpacked twice, for the positions and for the values."""

    def __init__(self, open_frame: Callable[[], Any], num_bytes: int):
        super().__init__(open_frame, num_bytes)
        self._positions_frame, self._values_frame = _Frame(open_frame()), _Frame(open_frame())
        count = int(self._positions_frame.expect(4).view("<u4")[0])
        if count > num_bytes:
            raise CheckpointError(
                f"its delta claims {count:,} changed bytes; the tensor has {num_bytes:,}"
            )
        self._remaining, self._last = count, -1
        self._values_frame.skip(4 + 4 * count)
        self._positions, self._values = np.empty(0, np.int64), np.empty(0, np.uint8)

    def _load(self) -> None:
        count = min(self._remaining, _ENTRIES)
        self._remaining -= count
        self._positions = self._positions_frame.expect(4 * count).view("<u4").astype(np.int64)
        self._values = self._values_frame.expect(count)
        if (np.diff(self._positions, prepend=self._last) <= 0).any():
            raise CheckpointError("the positions of its delta do not ascend; it is damaged")
        self._last = int(self._positions[-1])
        if self._last >= self._num_bytes:
            raise CheckpointError(
                f"its delta changes byte {self._last:,}; the tensor has {self._num_bytes:,}"
            )

    def apply(self, begin: int, block: np.ndarray) -> None:
        """See ``Delta``."""
        end = begin + len(block)
        while True:
            if not len(self._positions):
                if not self._remaining:
                    return
                self._load()
            inside = int(np.searchsorted(self._positions, end))
            block[self._positions[:inside] - begin] = self._values[:inside]
            self._positions, self._values = self._positions[inside:], self._values[inside:]
            if len(self._positions):
                return

    def finish(self) -> None:
        """See ``Delta``."""
        self._values_frame.expect_end()


ENCODINGS: dict[str, type[Delta]] = {"xor": XorDelta, "overwrite": OverwriteDelta}
"""Deltas by the names that trainers give them."""


# -- encoding --------------------------------------------------------------------------------------


def xor_frame(blocks: Iterable[tuple[np.ndarray, np.ndarray]], num_bytes: int) -> Iterator[bytes]:
    """The frame of an ``xor`` delta, in pieces, from ``(old, new)`` bytes in blocks that follow one
    another.

    The frame says its unpacked size, ``num_bytes``, which some receivers ask for.
    """
    compressor = zstandard().ZstdCompressor(level=LEVEL).compressobj(size=num_bytes)
    for old, new in blocks:
        yield compressor.compress((old ^ new).data)
    yield compressor.flush()
