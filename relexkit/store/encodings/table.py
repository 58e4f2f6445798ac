"""The table of encodings. To add one, write a module with an ``Encoding``, and add a line."""

from __future__ import annotations

from relexkit.store.encodings.exact import Exact
from relexkit.store.encodings.factors import LowRank
from relexkit.store.encodings.fixed import Fixed
from relexkit.store.encodings.floats import Floats
from relexkit.store.encodings.protocol import Encoding
from relexkit.store.encodings.sparse import Sparse
from relexkit.weights.layout import Layout

FACTORS = LowRank()
ENCODINGS: dict[str, Encoding] = {
    "sparse": Sparse(),
    "exact": Exact(),
    "float": Floats(),
    "factors": FACTORS,
    "fixed": Fixed(),
}
"""Name in the layout of a store -> how the steps of such a part are kept."""


def format_version(layout: Layout) -> int:
    """The oldest version whose readers understand a store with this layout."""
    return max((ENCODINGS[part.encoding].format_version for part in layout.parts), default=1)


def format_versions() -> list[int]:
    """The versions that this relexkit reads."""
    return sorted({encoding.format_version for encoding in ENCODINGS.values()})


def is_exact(layout: Layout) -> bool:
    """True if every step comes back bit for bit (of an adapter: its own tensors)."""
    return all(ENCODINGS[part.encoding].exact for part in layout.parts)


def check_encodings(layout: Layout) -> None:
    """Refuse a layout with an unknown encoding, or one that does not suit its part.

    Raises:
        ValueError: what is wrong, with the number of the part.
    """
    for number, part in enumerate(layout.parts):
        encoding = ENCODINGS.get(part.encoding)
        if encoding is None:
            raise ValueError(f"part {number} has the encoding {part.encoding!r}")
        if encoding.moves != part.moves:
            raise ValueError(f"part {number} is {part.encoding} but of dtype {part.dtype}")
        if (part.factors is not None) != (encoding is FACTORS):
            raise ValueError(f"part {number} has factors or the encoding, but not both")
