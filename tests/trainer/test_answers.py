"""Answers: every written answer of the table, every notation of a number, and what is no answer."""

from __future__ import annotations

import json
import re
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relexkit.trainer.tasks.answers import given_answer, gives_answer, tag_content
from relexkit.trainer.tasks.numerals import computed, last_number, numbers

ROOT = Path(__file__).parents[2]
WRITTEN = [
    json.loads(line) for line in (ROOT / "docs/answers/written.jsonl").read_text().splitlines()
]
DOCUMENTED = re.findall(
    r"^\| `` (.+?) `` \| (.*?) \| (.*?) \|$", (ROOT / "docs/tasks.md").read_text(), re.MULTILINE
)


def asked(row):
    return gives_answer(row["completion"], row["reference"], row.get("question", ""))


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in WRITTEN}))
def test_every_written_answer_is_rewarded_or_refused_as_labelled(kind):
    rows = [row for row in WRITTEN if row["kind"] == kind]
    assert [row for row in rows if asked(row) != row["right"]] == []


def test_the_table_of_the_documentation():
    assert len(DOCUMENTED) >= 12
    for reference, right, wrong in DOCUMENTED:
        for cell, expected in ((right, True), (wrong, False)):
            for completion in re.findall(r"`` (.+?) ``", cell):
                assert gives_answer(completion, reference) is expected, (reference, completion)


# -- notations --------------------------------------------------------------------------------

WHOLE = st.integers(-(10**12), 10**12)
SEPARATORS = (",", "_", "'", "\u202f", "\u00a0", "{,}", r"\,")
MINUSES = ("-", "−", "–")


def grouped(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


@st.composite
def written(draw):
    """A value, and one of the ways in which it is written."""
    value = draw(WHOLE)
    sign = draw(st.sampled_from(MINUSES)) if value < 0 else ""
    way = draw(st.sampled_from(["plain", "grouped", "decimal", "exponent", "times", "fraction"]))
    size = abs(value)
    if way == "plain":
        return Fraction(value), sign + str(size)
    if way == "grouped":
        return Fraction(value), sign + grouped(size, draw(st.sampled_from(SEPARATORS)))
    if way == "decimal":
        decimals = draw(st.integers(1, 6))
        exact = Fraction(value, 10**decimals)
        digits = str(size).zfill(decimals + 1)
        return exact, f"{sign}{digits[:-decimals]}.{digits[-decimals:]}"
    if way in ("exponent", "times"):
        exponent = draw(st.integers(-30, 30))
        signs = {
            "exponent": f"e{exponent}",
            "times": draw(st.sampled_from((rf"\times 10^{{{exponent}}}", f" × 10^{exponent}"))),
        }
        return value * Fraction(10) ** exponent, f"{sign}{size}{signs[way]}"
    below = draw(st.integers(1, 10**6))
    form = draw(st.sampled_from(("{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}")))
    return Fraction(value, below), sign + form.format(size, below)


AROUND = (
    "{}",
    "It is {}.",
    "The answer is {}",
    "**{}**",
    "so ${}$",
    "<answer>{}</answer>",
    "#### {}",
)


@given(written(), st.sampled_from(AROUND))
@settings(max_examples=300, deadline=None)
def test_every_notation_is_read_exactly(number, around):
    value, text = number
    (found,) = numbers(around.format(text))[-1:]
    assert found.value == value
    assert gives_answer(around.format(text), str(value))
    other = value + Fraction(1, 7)
    assert not gives_answer(around.format(text), str(other))


@given(written(), written(), st.sampled_from((", ", " or ", " and ", " ", "; ")))
@settings(max_examples=150, deadline=None)
def test_a_list_is_not_one_of_its_numbers(first, second, between):
    (one, text), (other, last) = first, second
    if one == other:
        return
    for wanted in (one, other):
        assert not gives_answer(f"It is {text}{between}{last}.", str(wanted), "Which?")


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_text_is_too_strange_to_be_read(text):
    for reference in ("5", "Paris", "x^2+1", "(1,2)"):
        assert gives_answer(text, reference) in (True, False)
    last_number(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The total is 1,234.", "1234"),
        ("$1,234,567", "1234567"),
        ("It is −5.", "-5"),
        ("10-3=7", "7"),
        ("the range 3-5", "5"),
        ("from -3 to -4.5 degrees", "-4.5"),
        ("1e5", "1e5"),
        ("1.5e-3", "1.5e-3"),
        (".5", ".5"),
        ("3/4", "3/4"),
        ("1 3/4", "7/4"),
        ("٣", "3"),
        ("2 000", "2000"),
        ("1 2 3 100 200", "200"),
        ("5%", "5"),
        ("12.", "12"),
        ("1.5 million", "1500000"),
        ("- 5 apples", "5"),
        ("no number", None),
    ],
)
def test_the_last_number_as_a_scorer_reads_it(text, number):
    assert last_number(text) == number


def test_arithmetic_is_exact_and_bounded():
    assert computed("0.1 + 0.2") == Fraction(3, 10)
    assert computed("2^{10} - (3 × 4)") == 1012
    assert computed("9^9^9^9") is None
    assert computed("1/0") is None
    assert computed("x + 1") is None


def test_the_answer_is_where_it_is_marked():
    assert given_answer("It is 3. <answer>4</answer> or 5") == "4"
    assert given_answer(r"\boxed{\frac{1}{2}} and 5") == r"\frac{1}{2}"
    assert given_answer("3\n#### 4") == "4"
    assert given_answer("**Answer:** 4. Bye!") == "4."
    assert tag_content("<answer>4</answer> <answer>") == "4"
    assert tag_content("<Answer> 4 </Answer> so <answer>5</answer>") == "5"
    assert tag_content("<answer>4") == "4"
    assert tag_content("4") is None


def test_huge_powers_end_and_threads_can_compare():
    assert not gives_answer("$9^{9^{9^{9}}}$", "10")
    found = []
    thread = threading.Thread(
        target=lambda: found.append(gives_answer(r"$\frac{x}{2}$", r"\frac{2x}{4}"))
    )
    thread.start()
    thread.join()
    assert found == [True]
