"""Numbers as people and models write them, read exactly.

``1,234``, ``1 234``, ``1'234``, ``12,34,567``, ``1.234,56``, ``$5``, ``−5`` (U+2212), ``.5``,
``1e5``, ``1.5 × 10^-5``, ``10⁵``, ``3/4``, ``1 3/4``, ``½``, ``5%``, ``1.5 million``, digits of
other scripts, and the LaTeX of these. A minus after a digit, a letter or a closing bracket is an
operator or a range, not a sign: ``3-5`` holds 3 and 5.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_MOST_DIGITS = 4000  # of a number that is written with an exponent, or comes out of a power
_FLOAT_DIGITS = 15  # a decimal with so many may be a binary float as it was printed
_ENOUGH_DIGITS = 6  # of a decimal that stands for a value which has no finite decimals
_MAGNITUDES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_LETTER_UNITS = "mgskKNJWVAhLlCF"
_MINUS = str.maketrans(dict.fromkeys("−﹣－–‑‐", "-"))
_BLANK = "\u202f"  # what no-break and thin blanks become: unlike others they may group digits
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_POWER_OF_TEN = r"10\s*(?:\^|\*\*)\s*[{(]?\s*([-+]?\d+)\s*[)}]?"
_UNSIGNED = rf"""
    [1-9]\d{{0,2}}(?:,\d{{3}})+(?!,?\d)(?:\.\d+)?
  | [1-9]\d?(?:,\d{{2}})+,\d{{3}}(?!,?\d)(?:\.\d+)?
  | [1-9]\d{{0,2}}(?:\.\d{{3}})+,\d{{1,2}}(?!\d)
  | [1-9]\d{{0,2}}(?:['_{_BLANK}]\d{{3}})+(?!\d)(?:\.\d+)?
  | (?<!\d\ )[1-9]\d{{0,2}}(?:\ \d{{3}})+(?!\ ?\d)(?:\.\d+)?
  | \d+\ \d+/\d+(?![/\d])
  | (?<!/)\d+/\d+(?![/\d])
  | \d+(?:\.\d+)?
  | (?<![\d.])\.\d+
"""
_NUMBER = re.compile(
    rf"""(?<![A-Za-z\\])(?:
      (?P<ten>{_POWER_OF_TEN})
    | (?P<plain>{_UNSIGNED})
      (?:[eE](?P<e>[-+]?\d+)(?!\w) | \s*[×x*·⋅]\s*{_POWER_OF_TEN.replace("([-+]?", "(?P<x>[-+]?")})?
    )(?P<percent>\s?%|\s*percent\b|\s?pct\b)?
     (?:\s*(?P<magnitude>{"|".join(_MAGNITUDES)})\b)?""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text.

    Attributes:
        value: exact; of a percentage what stands before the sign.
        text: without separators, in ASCII: ``1234``, ``-0.5``, ``3/4``, ``1e5``.
        percent: whether it is a percentage.
        digits: significant digits of a decimal or of one with an exponent; 0 for a whole number or
            a fraction, which are exact.
        unit: value of its last digit.
        begin, end: where it stands in ``plain(text)``, its sign and per cent sign included.
    """

    value: Fraction
    text: str
    percent: bool
    digits: int
    unit: Fraction
    begin: int
    end: int


def plain(text: str) -> str:
    """The text in ASCII signs: digits of any script, minus signs, LaTeX of numbers and units;
    without currency signs, dollar signs of LaTeX, and the marks of bold type and code.
    """
    text = re.sub(r"[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", _vulgar, text.translate(_MINUS))
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"[\u00a0\u2007\u2009\u202f]", _BLANK, text)
    if not text.isascii():
        text = "".join(
            str(unicodedata.decimal(c)) if not c.isascii() and c.isdecimal() else c for c in text
        )
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?:(\d)\s*)?\\frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))", _fraction, text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)
    text = text.replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\\(?:times|cdot)(?![a-z])\s*", "×", text)
    text = re.sub(r"(?<=\d)\\[,!;:]\s*(?=\d)", _BLANK, text)
    text = re.sub(r"\\[,!;: ]|\\(?:left|right|quad|qquad)\b|\\[()\[\]](?!\w)", " ", text)
    text = re.sub(r"(?<=[A-Za-z])\\?[$€£¥₹]|\\?[$€£¥₹](?=[A-Za-z])", " ", text)
    text = re.sub(r"\\?[$€£¥₹]", "", text)
    text = re.sub(r"(?<![\w)\]}])\*\*(?!\s)|(?<=\S)\*\*(?![\w({\[.-])|__|`", "", text)
    return text


def numbers(text: str) -> list[Number]:
    """All numbers of ``plain(text)``, in order. One too long to be written out is left out."""
    shown, all_numbers = plain(text), []
    for match in _NUMBER.finditer(shown):
        read = _read(match)
        if read is None:
            continue
        value, written, digits, unit = read
        begins = _sign(shown, match.start())
        if begins < match.start():
            value, written = -value, "-" + written
        percent = match["percent"] is not None
        all_numbers.append(Number(value, written, percent, digits, unit, begins, match.end()))
    return all_numbers


def last_number(text: str) -> str | None:
    """The last number of a text, as scorers read numbers, or None."""
    all_numbers = numbers(text)
    return all_numbers[-1].text if all_numbers else None


def is_operand(shown: str, number: Number) -> bool:
    """Whether a number of ``shown`` is part of an expression that is still to be computed, or of a
    term such as ``2x``.
    """
    before, after = shown[: number.begin].rstrip(), shown[number.end :]
    if re.search(r"[-+*/×·⋅÷^]$", before) and re.search(r"[\w)}\]]\s*[-+*/×·⋅÷^]$", before):
        return True
    if re.match(r"\s*(?:[+*×·⋅÷^!]|-(?=\s?[\d(A-Za-z])|/\s*[\d(])", after):
        return not re.match(r"\*+(?:\W|$)", after)
    letter = re.match(r"([A-Za-z])(?![A-Za-z])|\\[a-z]+|\(", after)
    return letter is not None and letter[0] not in _LETTER_UNITS


def same_number(first: Number, second: Number) -> bool:
    """Whether two numbers are equal.

    Exactly, but for three things: a percentage equals its share and its bare number (50%, 0.5 and
    50); a float of 15 digits and more equals what it was rounded from; and a decimal of 6 digits
    and more equals a fraction without finite decimals that it was rounded or cut from.
    """
    if first.percent == second.percent:
        return _equal(first, first.value, second, second.value)
    percent, other = (first, second) if first.percent else (second, first)
    return any(
        _equal(percent, value, other, other.value) for value in (percent.value, percent.value / 100)
    )


def computed(expression: str) -> Fraction | None:
    """The value of an expression of numbers, ``+ - * / ^`` and brackets; None if it is none, or too
    large.
    """
    shown = plain(expression)
    shown = re.sub(r"(?<=\d)[,_'\u202f](?=\d{3}(?!\d))", "", shown)
    shown = re.sub(r"[×·⋅]", "*", shown).replace("÷", "/").replace("^", "**")
    shown = shown.replace("{", "(").replace("}", ")").replace("[", "(").replace("]", ")").strip()
    if not shown or len(shown) > 200 or re.search(r"[^\d\s.+\-*/()]", shown):
        return None
    shown = re.sub(r"(?<![\d.])0+(?=\d)", "", shown)
    try:
        return _evaluated(ast.parse(shown, mode="eval").body, shown)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def exact(value: Fraction) -> Number:
    """A number that is written out exactly."""
    return Number(value, str(value), False, 0, Fraction(0), 0, 0)


# -- reading ---------------------------------------------------------------------------------------


def _read(match: re.Match[str]) -> tuple[Fraction, str, int, Fraction] | None:
    """Value, text, significant digits and unit of a match."""
    factor = _MAGNITUDES.get(match["magnitude"] or "", 1)
    written = "1" if match["plain"] is None else match["plain"]
    power = match[2] if match["plain"] is None else match["e"] or match["x"]
    if abs(exponent := int(power or 0)) > _MOST_DIGITS or len(written) > _MOST_DIGITS:
        return None
    if "/" in written:
        whole, _, fraction = written.rpartition(" ")
        above, below = map(int, fraction.split("/"))
        if below == 0:
            return None
        value = Fraction(above, below) + int(whole or 0)
        text = f"{value.numerator}/{value.denominator}" if whole else fraction
        value *= factor
        return value, str(value) if factor > 1 else text, 0, Fraction(0)
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", written):
        written = written.replace(".", "").replace(",", ".")
    written = re.sub(rf"[,'_ {_BLANK}]", "", written)
    scale = Fraction(10) ** exponent * factor
    value = Fraction(written) * scale
    decimals = len(written.partition(".")[2])
    is_exact = not decimals and exponent >= 0
    digits = 0 if is_exact else max(1, len(written.replace(".", "").lstrip("0")))
    text = str(value) if factor > 1 and value.denominator == 1 else written
    text += f"e{exponent}" if power is not None else ""
    return value, text, digits, Fraction(10) ** -decimals * scale


def _sign(shown: str, begin: int) -> int:
    """Where a number begins with the minus that belongs to it."""
    before = shown[:begin]
    match = re.search(r"(^|[^\w)\]}.%'\"°])\s*-\s*$", before)
    if match is None:
        return begin
    minus = before.rindex("-")
    if minus + 1 < begin and not re.search(r"[=:(≈]\s*-\s+$", before):
        return begin  # a dash, or a point of a list
    if re.search(r"[\w)\]}]\s+-$", before[: minus + 1]) and shown[begin - 1] != "-":
        return begin
    return minus


def _equal(first: Number, value: Fraction, second: Number, other: Fraction) -> bool:
    if value == other:
        return True
    difference = abs(value - other)
    if max(first.digits, second.digits) >= _FLOAT_DIGITS:
        return difference <= abs(other) / 10**12
    for decimal, its_value, target, target_value in (
        (first, value, second, other),
        (second, other, first, value),
    ):
        if decimal.digits >= _ENOUGH_DIGITS and not target.digits and _endless(target_value):
            if (its_value < 0) != (target_value < 0):
                return False
            short = abs(target_value) - abs(its_value)
            unit = decimal.unit * (abs(its_value / decimal.value) if decimal.value else 1)
            if -unit / 2 <= short < unit:
                return True
    return False


def _endless(value: Fraction) -> bool:
    """Whether a value has no finite decimals."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below != 1


def _evaluated(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            written = ast.get_source_segment(source, node)
            return Fraction(written or "")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand, source)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluated(operand, source)
        case ast.BinOp(left=left, op=op, right=right):
            first, second = _evaluated(left, source), _evaluated(right, source)
            match op:
                case ast.Add():
                    return first + second
                case ast.Sub():
                    return first - second
                case ast.Mult():
                    return first * second
                case ast.Div():
                    return first / second
                case ast.Pow():
                    return _power(first, second)
    raise ValueError("no arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or size * abs(exponent) > 4 * _MOST_DIGITS:
        raise ValueError("no power that can be written out")
    return base ** int(exponent)


def _vulgar(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    before = match.string[: match.start()]
    return f"{' ' if before[-1:].isdecimal() else ''}{above}/{below}"


def _fraction(match: re.Match[str]) -> str:
    whole, above, below = match[1], match[2] or match[4], match[3] or match[5]
    return f"{whole} {above}/{below}" if whole else f"{above}/{below}"
