"""Whether two expressions are equal as mathematics, by ``math-verify``, within bounds of time and
size.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import Any

_SECONDS = 5
"""Most time for one parse and for one comparison; an answer that takes longer is wrong."""

_LARGEST_POWER = 10_000  # beyond it a number fills the memory before a time limit acts
_RELATIVE = 1e-6  # of two numbers; math-verify compares six decimals, whatever their size


def same_expression(first: str, second: str) -> bool:
    """Whether two expressions, LaTeX or as one types them, are equal.

    The time limits are signals, which only the main thread receives: in another thread a comparison
    may take longer.
    """
    from math_verify import verify

    if _is_too_large(first) or _is_too_large(second):
        return False
    expected, given = _parsed(_latex(second)), _parsed(_latex(first))
    if not expected or not given:
        return False
    return bool(verify(expected, given, timeout_seconds=_limit())) and not _differ(
        expected[0], given[0]
    )


def _latex(text: str) -> str:
    shown = text.strip().rstrip(".").strip()
    shown = re.sub(r"^\$+|\$+$|^\\[(\[]|\\[)\]]$", "", shown).strip()
    return re.sub(r"\*\*", "^", shown)


@lru_cache(maxsize=4096)
def _parsed(expression: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    if not expression:
        return []
    return parse(
        f"${expression}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=_limit()
    )


def _differ(first: Any, second: Any) -> bool:
    """Whether two numbers differ by more than rounding, relative to their size."""
    if not (getattr(first, "is_number", False) and getattr(second, "is_number", False)):
        return False
    try:
        one, other = first.evalf(15), second.evalf(15)
        return bool(abs(one - other) > _RELATIVE * abs(other))
    except (TypeError, ValueError, OverflowError, ArithmeticError):
        return True


def _is_too_large(expression: str) -> bool:
    """Whether powers or factorials of numbers cannot be written out."""
    shown = re.sub(r"\s|\\[,!;:]", "", expression).replace("**", "^")
    if re.search(r"\d\)?\^[{(]*-?\d*[{(]*\d*\)*\^|!\)*!|\)!|\^[{(]*[^{}()]*!", shown):
        return True
    powers = [int(n) for n in re.findall(r"\^[{(]*-?(\d{1,30})", shown)]
    product = 1
    for power in powers:
        product *= max(1, power)
    factorials = [int(n) for n in re.findall(r"(\d+)!", shown)]
    return product > _LARGEST_POWER or any(n > _LARGEST_POWER for n in factorials)


def _limit() -> Any:
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
