"""How the checkpoints of a run are read and recorded, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from relexkit.errors import RelexkitError
from relexkit.store.encodings.table import ENCODINGS, FACTORS

DEFAULT_MANTISSA_BITS = 10

SPARSE_BELOW = 1 / 8
"""A dtype whose neighbouring checkpoints differ in a smaller share of the weights is stored as a
sparse log.
"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The arguments of ``import_checkpoints`` that ``watch`` and an estimate have too; see there.

    Raises:
        RelexkitError: the encoding is unknown, or the mantissa bits are out of range or of no
        effect.
    """

    base: str | Path | None = None
    base_by_reference: bool = False
    encoding: str = "auto"
    mantissa_bits: int | None = None
    source_format: str | None = None
    step_map: str | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.encoding != "auto" and self.encoding not in self._named():
            known = "auto, exact or float"
            raise RelexkitError(f"--encoding {self.encoding} is unknown; choose {known}")
        bits = self.mantissa_bits
        if bits is not None and not 1 <= bits <= 23:
            raise RelexkitError(f"--mantissa-bits {bits} is out of range; expected 1 to 23")
        if bits is not None and self.encoding == "exact":
            raise RelexkitError(
                "--mantissa-bits has no effect with --encoding exact; leave one of them out"
            )

    @staticmethod
    def _named() -> set[str]:
        """Encodings that can be asked for by name: those of whole weights."""
        return {n for n, kind in ENCODINGS.items() if kind.moves and kind is not FACTORS}

    @property
    def is_named(self) -> bool:
        """True if one encoding is to be taken whatever moves."""
        return self.encoding not in ("auto", "exact")

    @property
    def rounds(self) -> bool:
        """True if float deltas are asked for by name."""
        return self.is_named and not ENCODINGS[self.encoding].exact

    def encoding_of(self, dtype: str, density: float) -> str:
        """The encoding of a float dtype of which neighbouring checkpoints differ in such a share of
        the weights.
        """
        if self.is_named:
            return self.encoding
        if density < SPARSE_BELOW:
            return "sparse"
        return "exact" if self.encoding == "exact" or dtype != "float32" else "float"

    def fits(self, kinds: set[str]) -> bool:
        """Whether a store with these encodings is what was asked for."""
        if self.encoding == "exact":
            return all(ENCODINGS[kind].exact for kind in kinds)
        return self.encoding == "auto" or kinds <= {self.encoding}


PLAIN = Reading()
