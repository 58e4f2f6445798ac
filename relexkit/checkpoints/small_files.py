"""The small files beside the weights: configurations, tokenizers, markers. A hostile one may be of
any size.
"""

from __future__ import annotations

from pathlib import Path

from relexkit.errors import CheckpointError

MAX_BYTES = 100_000_000
"""Largest configuration or tokenizer that is read."""


def read_small(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a file of at most ``most`` bytes.

    Raises:
        CheckpointError: it is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = bytearray()
            while len(content) <= most and (piece := file.read(min(2**20, most + 1))):
                content += piece  # one read of most + 1 would take that much memory at once
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > most:
        raise CheckpointError(
            f"{path}: has more than {most:,} bytes; expected a small file: remove or replace it"
        )
    return bytes(content)
