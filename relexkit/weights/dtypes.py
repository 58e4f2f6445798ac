"""Number formats of weights: raw bits as unsigned integers, exact conversion to float32, and
rounding back.

Weights travel through relexkit as *bits* (``uint16`` or ``uint32`` arrays), because NumPy has no
bfloat16 and because bit-for-bit recovery must not pass through arithmetic. Conversions to float32
are exact for the three formats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from relexkit.errors import RelexkitError

FLOAT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.uint32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.uint16),
}
"""Float formats that can move in a run, with the unsigned integer type that carries their bits."""

_EXPONENT_MASK = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_LARGEST = {"float32": np.inf, "bfloat16": (2 - 2**-7) * 2.0**127, "float16": 65504.0}

Rounding = Literal["stochastic", "nearest"]
ROUNDINGS = ("stochastic", "nearest")


def bits_dtype(dtype: str) -> np.dtype:
    """Unsigned integer type that carries one element of ``dtype`` (``uint8`` for a tensor kept as
    raw bytes).
    """
    return FLOAT_DTYPES.get(dtype, np.dtype(np.uint8))


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Exact float32 values of ``bits`` ``[n]``; ``dtype`` is a key of ``FLOAT_DTYPES``. Allocates 4
    bytes an element.
    """
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "bfloat16":
        words = bits.astype(np.uint32)
        words <<= np.uint32(16)
        return words.view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def nonfinite_index(bits: np.ndarray, dtype: str) -> int | None:
    """Index of the first NaN or infinity in ``bits`` ``[n]``, or None."""
    mask = bits.dtype.type(_EXPONENT_MASK[dtype])
    nonfinite = (bits & mask) == mask
    return int(nonfinite.argmax()) if nonfinite.any() else None


def widen_bits(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bits of the same values in a wider format; only the exact conversions to float32 exist."""
    if source == target:
        return bits
    if target != "float32":
        raise RelexkitError(
            f"cannot widen {source} to {target}: only float32 holds every value of another format"
        )
    return to_float32(bits, source).view(np.uint32)


def round_to_mantissa_bits(values: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """Float32 ``values`` ``[n]`` rounded to nearest even at ``mantissa_bits`` explicit bits (1 to
    23), in place.

    The relative error of a normal number is at most ``2 ** -(mantissa_bits + 1)``.
    """
    drop = 23 - mantissa_bits
    if drop == 0:
        return values
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(drop)) & np.uint32(1)
    odd += np.uint32((1 << (drop - 1)) - 1)
    bits += odd
    bits &= np.uint32(0xFFFFFFFF ^ ((1 << drop) - 1))
    return values


def random_bits(seed: int, tensor: str, start: int, stop: int) -> np.ndarray:
    """Sixteen random bits for elements ``start:stop`` of a tensor, as ``uint16 [stop - start]``.

    Counter-based (Philox keyed by the seed and the tensor's name), so an element's bits do not
    depend on how the tensor is cut into blocks or in which order blocks are visited.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{tensor}".encode()).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    first = start // 16  # one counter value gives four 64-bit words, sixteen elements
    generator.advance(first)
    words = generator.random_raw(4 * (-(-stop // 16) - first))
    return words.astype("<u8", copy=False).view(np.uint16)[start - 16 * first : stop - 16 * first]


def round_bits(
    values: np.ndarray,
    dtype: str,
    rounding: Rounding,
    *,
    seed: int = 0,
    tensor: str = "",
    start: int = 0,
) -> np.ndarray:
    """Bits of float32 ``values`` ``[n]`` in ``dtype``, rounded to nearest even or stochastically.

    Stochastic rounding takes one of the two neighbours in ``dtype`` with probabilities that make
    the expectation equal to the value (for float16 subnormals to within 2**-16 of their spacing); a
    value that ``dtype`` holds exactly stays as it is. ``seed``, ``tensor`` and ``start`` (the index
    of ``values[0]`` in the tensor) fix the draws.

    Raises:
        RelexkitError: a value is NaN, infinite or rounds beyond the largest finite number of
            ``dtype``.
    """
    if dtype not in FLOAT_DTYPES or rounding not in ROUNDINGS:
        raise RelexkitError(
            f"cannot round to {dtype} with {rounding} rounding; expected {', '.join(FLOAT_DTYPES)}"
            f" and {' or '.join(ROUNDINGS)}"
        )
    stochastic = rounding == "stochastic" and dtype != "float32"
    random = random_bits(seed, tensor, start, start + len(values)) if stochastic else None
    return rounded(values, dtype, random, tensor, range(start, start + len(values)))


def rounded(
    values: np.ndarray,
    dtype: str,
    random: np.ndarray | None,
    tensor: str,
    places: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """``round_bits`` with the random bits ``uint16 [n]`` of the values, None to round to nearest;
    ``places`` are their indices in the tensor.
    """
    largest = _LARGEST[dtype]
    inside = not len(values) or (values.min() > -largest and values.max() < largest)
    if not inside:  # or NaN
        bad = nonfinite_index(np.ascontiguousarray(values).view(np.uint32), "float32")
        if bad is not None:
            raise _does_not_fit(tensor, places[bad], values[bad], dtype)
    if dtype == "float32":
        bits = np.ascontiguousarray(values).view(np.uint32)
    elif random is None:
        bits = _round_nearest(values, dtype)
    else:
        bits = _round_stochastic(values, dtype, random)
    bad = None if inside else nonfinite_index(bits, dtype)
    if bad is not None:
        raise _does_not_fit(tensor, places[bad], values[bad], dtype)
    return bits


def _does_not_fit(tensor: str, index: int, value: np.float32, dtype: str) -> RelexkitError:
    return RelexkitError(
        f"tensor {tensor!r}: element {index} has the value {float(value):g}, which {dtype} cannot"
        " hold; expected finite weights: choose a nearer target or --dtype float32"
    )


def _round_nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    return _upper_halves(odd)


def _upper_halves(words: np.ndarray) -> np.ndarray:
    """The upper 16 bits of ``uint32 [n]``."""
    words >>= np.uint32(16)
    return words.astype(np.uint16)


def _round_stochastic(values: np.ndarray, dtype: str, random: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    if dtype == "bfloat16":
        return _upper_halves(bits + random)
    # float16: 13 dropped bits for normal numbers; below 2**-14 the spacing is fixed at 2**-24.
    dropped = random >> np.uint16(3)
    result = ((bits + dropped) & np.uint32(0xFFFFE000)).view(np.float32)
    small = np.abs(values) < 2.0**-14
    if small.any():
        scaled = np.abs(values[small]).astype(np.float64) * 2.0**24
        magnitude = np.floor(scaled + random[small] / 65536.0) * 2.0**-24
        result[small] = np.copysign(magnitude, values[small])
    with np.errstate(over="ignore"):
        return result.astype(np.float16).view(np.uint16)
