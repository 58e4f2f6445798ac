"""Classes of tokens, and shares of the update by hand."""

from __future__ import annotations

import math

import pytest

from relexkit.trainer.credit.token_share import (
    add_masses,
    class_shares,
    largest_tokens,
    token_class,
    token_masses,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\n", "whitespace"),
        ("  ", "whitespace"),
        (" 12", "digits"),
        ("+", "punctuation"),
        (" \\(", "punctuation"),
        ("%.", "punctuation"),
        (" Therefore", "discourse"),
        ("wait", "discourse"),
        (" apple", "rest"),
        ("x1", "rest"),
        ("", "whitespace"),
    ],
)
def test_classes(text, expected):
    assert token_class(text) == expected


CLASSES = {0: "special", 1: "digits", 2: "rest"}


def masses():
    """A = 2: tokens 1, 2 with norms 1, 3. A = -1: tokens 1, 0 with norms 2, 4, and coefficients
    1/2, 2.
    """
    return token_masses(
        [[1, 2], [1, 0]], [2.0, -1.0], [[1.0, 3.0], [2.0, 4.0]], [[1.0, 1.0], [0.5, 2.0]]
    )


def test_shares_by_hand():
    shares = class_shares(masses(), CLASSES)  # 1: 2 + 2, 2: 6, 0: 4; of 14
    assert shares["digits"] == pytest.approx(4 / 14)
    assert shares["rest"] == pytest.approx(6 / 14)
    assert shares["special"] == pytest.approx(4 / 14)
    assert shares["shared"] == pytest.approx(4 / 14)  # only token 1 is on both sides
    assert shares["whitespace"] == 0
    weighted = class_shares(masses(), CLASSES, weighted=True)  # 1: 2 + 1, 2: 6, 0: 8; of 17
    assert weighted["digits"] == pytest.approx(3 / 17)
    assert weighted["special"] == pytest.approx(8 / 17)


def test_parts_add_up():
    first = token_masses([[1, 2]], [2.0], [[1.0, 3.0]], [[1.0, 1.0]])
    second = token_masses([[1, 0]], [-1.0], [[2.0, 4.0]], [[0.5, 2.0]])
    assert class_shares(add_masses([first, second]), CLASSES) == class_shares(masses(), CLASSES)
    assert largest_tokens(masses(), 1) == [(2, pytest.approx(6 / 14), pytest.approx(6 / 17))]


def test_nothing_pulls_where_all_advantages_are_zero():
    found = token_masses([[1, 2]], [0.0], [[1.0, 3.0]])
    assert all(math.isnan(share) for share in class_shares(found, CLASSES).values())
    assert class_shares({}, CLASSES).keys() == class_shares(masses(), CLASSES).keys()
