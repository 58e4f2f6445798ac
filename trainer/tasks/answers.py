"""Whether a completion gives the reference answer: numbers as numbers, lists item by item,
mathematics as mathematics, everything else as text.

A completion gives one answer: what stands in its last ``<answer>`` tag, else in its last
``\\boxed``, else after its last ``####``, else after its last "answer is" or "Answer:", else what
its last sentence states. What is written around the answer does not matter, but several candidates
are no answer, and neither is an expression of the question, or one that is still to be computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from relexkit.trainer.tasks.mathematics import same_expression
from relexkit.trainer.tasks.numerals import (
    Number,
    computed,
    exact,
    is_operand,
    numbers,
    plain,
    same_number,
)

_MARKER = re.compile(
    r"\banswer\b(?:\s+(?:to|of|for)\b[^.\n]{0,80}?)?\s*(?:\b(?:is|was|would\s+be)\b|[:=]|→)+[\s:]*",
    re.IGNORECASE,
)
_CUE = re.compile(
    r"=|≈|→|:\s|\\approx\b"
    r"|\b(?:is|are|was|were|be|equals?|gives?|gets?|therefore|thus|hence|so|choose|pick)\b",
    re.IGNORECASE,
)
_COPULA = re.compile(r"\s+(?:is|are|was|were)\s+", re.IGNORECASE)
_POINTS_BACK = re.compile(r"(?:the|a|an|my|our|correct|right|what|where|who)\b", re.IGNORECASE)
_POINTS_AHEAD = re.compile(
    r"(?:it|this|that|he|she|they|i|we|the|my|our|answer|so|therefore|thus|hence)\b", re.IGNORECASE
)
_REASON = re.compile(r",?\s+(?:which|because|since|where|who|as)\b.*", re.IGNORECASE | re.DOTALL)
_NEGATED = re.compile(r"(?:\bnot|n't|\bnever|\bnor|\bneither)\b(?:\s+\w+){0,2}\s*$", re.IGNORECASE)
_JOINED = re.compile(
    r"\s*(?:[A-Za-z%°]{0,12}\s*(?:,\s*)?"
    r"(?:\b(?:and|or|nor|to|through|versus|vs)\b\.?|[,;|/&~<>:-])?)\s*(?:\b(?:and|or)\b)?\s*",
)
_BOOLEANS = {"yes", "no", "true", "false"}
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_FUNCTIONS = re.compile(
    r"\\[a-zA-Z]+|\b(?:sin|cos|tan|log|ln|exp|sqrt|abs|pi|mod|gcd|min|max|inf|floor|ceil)\b"
)


def gives_answer(completion: str, answer: str, question: str = "") -> bool:
    """Whether the answer that ``completion`` gives is ``answer``.

    Args:
        answer: a number, LaTeX or other mathematics, a list of these, or text.
        question: what was asked. An expression copied from it is no answer. If it is given and the
            reference is a number, an expression that is still to be computed is none either.

    Time limits of a comparison as mathematics are signals, which only the main thread receives.
    """
    given = given_answer(completion)
    if _same_text(completion, answer) or _same_text(given, answer):
        return True
    number = _quantity(answer)
    if number is not None:
        return _states_number(given, number, question)
    value = computed(answer)
    if value is not None:
        return _states_number(given, _Quantity(exact(value), ""), "") and not _echoes(
            given, answer, question
        )
    stated = _stated(given)
    items = _items(answer)
    if items is not None:
        return any(_same_items(_items(shown), items) for shown in _shorter(stated))
    if looks_like_mathematics(answer):
        return any(
            _same_mathematics(shown, answer) and not _echoes(shown, answer, question)
            for shown in _shorter(stated)
        )
    return _says(given, answer)


def given_answer(completion: str) -> str:
    """What a completion marks as its answer, or all of it where nothing is marked."""
    text = completion.strip()
    tagged = tag_content(text)
    if tagged is not None:
        text = tagged
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip()
    markers = list(_MARKER.finditer(_unmarked(text)))
    if markers:
        after = _unmarked(text)[markers[-1].end() :].strip()
        if after:
            return _sentences(after)[0]
    return text


def reference_answer(text: str) -> str:
    """The answer of a worked solution: what follows its last ``####``, or stands in its last
    ``\\boxed``; else all of it.
    """
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return _last_boxed(text) or text


def tag_content(text: str) -> str | None:
    """What stands in the last ``<answer>`` tag, or after one that was never closed; None
    without.
    """
    whole = re.findall(r"<answer>(.*?)</answer>", text, re.IGNORECASE | re.DOTALL)
    if whole:
        return whole[-1].strip()
    opened = re.split(r"<answer>", text, flags=re.IGNORECASE)
    return opened[-1].strip() if len(opened) > 1 else None


def looks_like_mathematics(text: str) -> bool:
    """Whether text is LaTeX or a formula: no words but names of functions, and something that is
    more than one letter or one word.
    """
    shown = text.strip().strip("$")
    if re.search(r"\\[a-zA-Z]{2,}|\$", text):
        return True
    rest = _FUNCTIONS.sub(" ", shown)
    if re.search(r"[A-Za-z]{3,}|[:?@#&\"]|[A-Za-z]'", rest):
        return False
    return bool(re.search(r"[\d+*/^=<>≤≥√π∞]|\w\(|[A-Za-z]-[A-Za-z\d]", shown))


# -- numbers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Quantity:
    number: Number
    unit: str


def _quantity(text: str) -> _Quantity | None:
    """A text that is nothing but a number, with a unit or ``x =`` perhaps."""
    shown = plain(re.sub(r"^\s*\$?\s*[A-Za-z]\w{0,2}\s*=", "", text)).strip()
    shown = re.sub(r"[.\s]+$", "", shown)
    all_numbers = numbers(shown)
    if len(all_numbers) != 1 or all_numbers[0].begin or is_operand(shown, all_numbers[0]):
        return None
    unit = shown[all_numbers[0].end :].strip()
    if not re.fullmatch(r"(?:[A-Za-z°µΩ%]+[²³]?(?:\^\{?\d\}?)?[\s/·.]*){0,3}", unit):
        return None
    return _Quantity(all_numbers[0], re.sub(r"\W", "", unit).lower().removesuffix("s"))


def _states_number(given: str, wanted: _Quantity, question: str) -> bool:
    whole = _quantity(given)
    if whole is not None:
        if wanted.unit and whole.unit and wanted.unit != whole.unit:
            return False
        written = re.search(r"\d\s*/\s*\d", plain(given)) is not None
        return same_number(whole.number, wanted.number) and not (
            written and _in_question(given, question)
        )
    lines = [plain(line).strip() for line in given.splitlines() if line.strip()]
    sentences = [s for s in _sentences(given) if numbers(s)]
    if not sentences:
        return _computes(given, wanted, question)
    bare = [numbers(line)[0] for line in lines[-2:] if _quantity(line) is not None]
    if len(bare) == 2 and not same_number(*bare):
        return False  # a list, one a line
    shown = plain(sentences[-1])
    all_numbers = numbers(shown)
    last = all_numbers[-1]
    cue = [match.end() for match in _CUE.finditer(shown) if match.end() <= last.begin]
    begin = cue[-1] if cue else 0
    tail = shown[begin:]
    if is_operand(shown, last) or any(
        is_operand(shown, n) for n in all_numbers if n.begin >= begin
    ):
        return _computes(tail, wanted, question)
    if _NEGATED.search(shown[: last.begin]):
        return False
    for number in all_numbers[:-1]:
        between = shown[number.end : last.begin]
        if number.begin >= begin and _JOINED.fullmatch(between):
            return same_number(number, last) and same_number(last, wanted.number)
    return same_number(last, wanted.number)


def _computes(shown: str, wanted: _Quantity, question: str) -> bool:
    """Whether an expression is an answer with the wanted value. One that is copied from the
    question is no answer, nor, where the question is known, one that is still to be computed.
    """
    shown = shown.strip().rstrip(".!").strip("$ ")
    if re.search(r"[\d)}]\s*(?:[-+*/^×·⋅÷]|\\times|\\cdot|\\div)", plain(shown)) and question:
        return False
    if _in_question(shown, question):
        return False
    value = computed(shown)
    if value is not None:
        return same_number(exact(value), wanted.number)
    return looks_like_mathematics(shown) and same_expression(shown, str(wanted.number.value))


# -- lists and mathematics -------------------------------------------------------------------------


def _items(text: str) -> tuple[str, list[str]] | None:
    """Brackets and items of a list of numbers or formulas, None for anything else."""
    shown = re.sub(r"\\(?:left|right)\b", "", text).strip().rstrip(".").strip()
    shown = re.sub(r"^\$+|\$+$|^\\\(|\\\)$", "", shown).strip()
    shown = shown.replace("\\{", "{").replace("\\}", "}")
    kind = ""
    if shown[:1] in _BRACKETS and shown[-1:] in ")]}" and _closes_at_the_end(shown):
        kind, shown = shown[0] + shown[-1], shown[1:-1]
    items = _split(shown)
    if len(items) < 2 or not all(
        _quantity(item) is not None
        or looks_like_mathematics(item)
        or re.fullmatch(r"[A-Za-z]", item)
        for item in items
    ):
        return None
    return kind, items


def _split(text: str) -> list[str]:
    """At commas, semicolons, ``and`` and ``or`` outside of brackets."""
    parts, depth, begin = [], 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]|[,;]|\s(?:and|or)\s", text):
        sign = match[0].strip()
        if sign in _BRACKETS:
            depth += 1
        elif sign in (")", "]", "}"):
            depth -= 1
        elif depth == 0:
            parts.append(text[begin : match.start()])
            begin = match.end()
    parts.append(text[begin:])
    return [part.strip().strip("$").strip() for part in parts if part.strip(" $")]


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _same_items(first: tuple[str, list[str]] | None, second: tuple[str, list[str]]) -> bool:
    if first is None or len(first[1]) != len(second[1]):
        return False
    if "{}" in (first[0], second[0]):
        if {first[0], second[0]} - {"{}", ""}:
            return False
        left = list(second[1])
        for item in first[1]:
            match = next((other for other in left if _same_item(item, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    return first[0] == second[0] and all(map(_same_item, first[1], second[1]))


def _same_item(first: str, second: str) -> bool:
    if _same_text(first, second):
        return True
    one, other = _quantity(first), _quantity(second)
    if one is not None and other is not None:
        return same_number(one.number, other.number)
    return _same_mathematics(first, second)


def _same_mathematics(shown: str, answer: str) -> bool:
    if not looks_like_mathematics(shown) or _items(shown) is not None:
        return False
    if same_expression(shown, answer):
        return True
    if ("=" in shown) == ("=" in answer):
        return False
    return same_expression(shown.rpartition("=")[2], answer.rpartition("=")[2])


# -- text ------------------------------------------------------------------------------------------


def _same_text(first: str, second: str) -> bool:
    return _text(first) == _text(second) != ""


def _text(text: str) -> str:
    shown = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", _unmarked(text))
    shown = " ".join(shown.split()).strip(" \"'“”‘’$.!?").casefold()
    shown = re.sub(r"^(?:the|an?)\s+(?=\w)", "", shown)
    shown = re.sub(r"^\(([a-z])\)$|^([a-z])[).:]$", r"\1\2", shown)
    return shown.strip()


def _says(given: str, answer: str) -> bool:
    """Whether the last sentence says the text: after ``is`` or a colon, or before ``is the``."""
    sentences = _sentences(_unmarked(given))
    if not sentences:
        return False
    last = sentences[-1]
    wanted = _text(answer)
    if wanted in _BOOLEANS:
        lead = _lead(last) or _lead(sentences[0])
        if lead is not None:
            return lead == wanted
    if re.fullmatch(r"[a-z]", wanted):
        option = re.match(
            r"(?:option\s+)?\(?([A-Za-z])(?:\)|[.:](?=\s|$))", given.strip(), re.IGNORECASE
        )
        if option is not None:
            return option[1].casefold() == wanted
    return any(_same_text(shown, answer) for shown in _shorter(_stated(last)))


def _lead(sentence: str) -> str | None:
    match = re.match(r"(\w+)(?:[,.;:!]|$)", sentence)
    return match[1].casefold() if match and match[1].casefold() in _BOOLEANS else None


def _stated(given: str) -> str:
    """What the last sentence states: what stands after its last cue, or before ``is the``."""
    sentences = _sentences(_unmarked(given))
    if not sentences:
        return ""
    last = sentences[-1]
    copula = _COPULA.search(last)
    if (
        copula is not None
        and _POINTS_BACK.match(last[copula.end() :])
        and not _POINTS_AHEAD.match(last)
    ):
        return last[: copula.start()]
    segments = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", last)
    if len(segments) == 1:
        return "".join(segments[0])
    cues = [match.end() for match in _CUE.finditer(last) if match[0] != "="]
    return last[cues[-1] :].strip() if cues and last[cues[-1] :].strip() else last


def _shorter(stated: str) -> list[str]:
    """The statement as it is, and without the reason that follows it."""
    return list(dict.fromkeys((stated, _REASON.sub("", stated))))


def _sentences(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [
        sentence.strip()
        for line in lines
        for sentence in re.split(r"(?<=[^.\s][.!?])\s+(?=[^a-z\s])", line)
        if sentence.strip()
    ]


def _unmarked(text: str) -> str:
    """Without the marks of bold type and code."""
    return re.sub(r"(?<![\w)\]}])\*\*(?!\s)|(?<=\S)\*\*(?![\w({\[.-])|__|`", "", text)


def _last_boxed(text: str) -> str | None:
    boxed = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                boxed = text[match.end() : place].strip()
                break
    return boxed


# -- the question ----------------------------------------------------------------------------------


def _echoes(shown: str, answer: str, question: str) -> bool:
    return _in_question(shown, question) and _squeezed(shown) != _squeezed(answer)


def _in_question(shown: str, question: str) -> bool:
    """Whether an expression stands in the question as it is."""
    piece = _squeezed(shown)
    if not question or not re.search(r"[-+*/^=!({\\]", piece):
        return False
    return (
        re.search(rf"(?<![\w.]){re.escape(piece)}(?![\w])", _squeezed(question)) is not None
        or re.search(rf"{re.escape(piece)}(?!\w)", _squeezed(question)) is not None
    )


def _squeezed(text: str) -> str:
    shown = re.sub(r"[×·⋅]", "*", plain(text))
    return re.sub(r"[\s$" + "\u202f" + "]", "", shown).rstrip(".?!:=")
