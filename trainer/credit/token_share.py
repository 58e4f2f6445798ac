"""Which tokens carry the update: the share of ``sum |A| |v|`` by token and by class of token.

``|A|`` is the advantage of a token's rollout and ``|v|`` the length of its gradient proxy
(``trainer.credit.token_states``), so a token's share is its part of the summed lengths of all
gradients at the output head, before any of them cancel. A claim that is often made of such runs,
that formatting and other shared tokens carry over 80 % of the update, is the share named
``shared``: of token ids that occur on both sides of the batch, in rollouts that are reinforced and
in others that are suppressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

CLASSES = ("whitespace", "punctuation", "digits", "discourse", "special", "rest")
"""Classes of tokens; punctuation includes operators, ``special`` is the end of sequence and its
like.
"""

_DISCOURSE = (
    "so thus therefore hence then now first second third next finally also but however although"
    " because since if when wait hmm okay ok well let alternatively instead again actually indeed"
    " given suppose recall note"
)

Masses = dict[int, np.ndarray]
"""By token id: ``sum |A| |v|`` over tokens with ``A > 0`` and ``A < 0``, and the same two times the
token coefficients.
"""


def token_class(text: str) -> str:
    """Class of a token that is not special, from its text."""
    word = text.strip()
    if not word:
        return "whitespace"
    if all(character.isdigit() for character in word):
        return "digits"
    if not any(character.isalnum() for character in word):
        return "punctuation"
    return "discourse" if word.lower() in _DISCOURSE.split() else "rest"


class TokenClasses:
    """Classes of a tokenizer's tokens, looked up once each."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known = dict.fromkeys(tokenizer.all_special_ids, "special")

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = token_class(self.text(token))
        return self._known[token]

    def text(self, token: int) -> str:
        """What the token reads as."""
        return self._tokenizer.decode([token])


def token_masses(
    completion_ids: Iterable[Sequence[int]],
    advantages: Iterable[float],
    norms: Iterable[Sequence[float] | np.ndarray],
    weights: Iterable[Sequence[float] | np.ndarray] | None = None,
) -> Masses:
    """The masses of the tokens of rollouts: their ids, advantages, and by token ``|v|`` and
    coefficients (1 if None).
    """
    rows = [np.asarray(row, np.int64) for row in completion_ids]
    signed = list(advantages)
    mass = [abs(a) * np.asarray(n, np.float64) for a, n in zip(signed, norms, strict=True)]
    weighted = (
        mass
        if weights is None
        else [m * np.asarray(w, np.float64) for m, w in zip(mass, weights, strict=True)]
    )
    if not rows:
        return {}
    ids, place = np.unique(np.concatenate(rows), return_inverse=True)
    positive = np.repeat(np.array(signed) > 0, [len(row) for row in rows])
    masses = np.zeros((len(ids), 4))
    for column, values in ((0, mass), (2, weighted)):
        flat = np.concatenate(values)
        masses[:, column] = np.bincount(place, flat * positive, len(ids))
        masses[:, column + 1] = np.bincount(place, flat * ~positive, len(ids))
    return dict(zip(ids.tolist(), masses, strict=True))


def add_masses(parts: Iterable[Masses]) -> Masses:
    """Masses of several processes or steps together."""
    total: Masses = {}
    for part in parts:
        for token, values in part.items():
            total[token] = total[token] + values if token in total else values
    return total


def class_shares(
    masses: Masses, classes: Mapping[int, str] | TokenClasses, *, weighted: bool = False
) -> dict[str, float]:
    """Shares of ``CLASSES``, which add up to 1, and of ``shared`` ids; NaN where every advantage is
    zero.
    """
    first = 2 if weighted else 0
    sums, shared = dict.fromkeys(CLASSES, 0.0), 0.0
    for token, values in masses.items():
        positive, negative = values[first : first + 2]
        sums[classes[token]] += positive + negative
        shared += positive + negative if positive > 0 and negative > 0 else 0.0
    total = sum(sums.values())
    return {
        name: value / total if total else float("nan")
        for name, value in (sums | {"shared": shared}).items()
    }


def largest_tokens(masses: Masses, count: int) -> list[tuple[int, float, float]]:
    """The ``count`` tokens with the largest shares: id, share, and share with token
    coefficients.
    """
    plain, weighted = (sum(v[i] + v[i + 1] for v in masses.values()) for i in (0, 2))
    ordered = sorted(masses.items(), key=lambda item: -(item[1][0] + item[1][1]))[:count]
    return [
        (token, (v[0] + v[1]) / plain, (v[2] + v[3]) / weighted)
        for token, v in ordered
        if plain and weighted
    ]
