"""Whether an answer equals the reference as mathematics: by text first, then by ``math-verify``."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

_SECONDS = 5
"""Most time for one parse and for one comparison; an answer that takes longer is wrong."""


def equal_as_mathematics(completion: str, answer: str) -> bool:
    """Whether the last expression of ``completion`` equals ``answer``, a number or LaTeX with or
    without dollar signs.

    A completion of one line that is nothing but the expression needs no dollar signs or box either.
    The time limits are signals, which only the main thread receives: in another thread a comparison
    of huge powers may take for ever.

    Raises:
        ValueError: ``answer`` is not mathematics.
    """
    said = completion.strip()
    if said == answer.strip():
        return True
    from math_verify import parse, verify

    limit = _limit()
    expected = _parsed_answer(answer)
    if not expected:
        raise ValueError(
            f"the reference answer {answer!r} is not mathematics; expected a number or LaTeX, or"
            " reward: exact"
        )
    found = parse(completion, parsing_timeout=limit)
    if verify(expected, found, timeout_seconds=limit):
        return True
    if "$" in said or "boxed" in said or "\n" in said:
        return False
    return bool(verify(expected, parse(f"${said}$", parsing_timeout=limit), timeout_seconds=limit))


@lru_cache(maxsize=4096)
def _parsed_answer(answer: str) -> list[Any]:
    from math_verify import parse

    marked = "$" in answer or "\\boxed" in answer
    return parse(answer if marked else f"${answer}$", parsing_timeout=_limit()) or parse(
        answer, parsing_timeout=_limit()
    )


def _limit() -> Any:
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
