"""The glossary's words in the page: each is explained where it stands."""

from __future__ import annotations

import functools
import html
import re
from pathlib import Path

_LEFT_OUT = {"run", "step", "line", "group", "base", "target", "part", "scale", "delta", "null"}
"""Too common in plain English to be marked at every place."""


@functools.cache
def glossary() -> dict[str, str]:
    """Meanings by word, from the table of the documentation's glossary."""
    text = Path(__file__).with_name("glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE)[1:]
    return {
        word.strip(): meaning.replace("`", "")
        for words, meaning in rows
        for word in words.split(",")
    }


@functools.cache
def _pattern() -> re.Pattern[str]:
    words = sorted(set(glossary()) - _LEFT_OUT, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, words))})(e?s)?(?![\w-])")


def explained(text: str) -> str:
    """``text`` as HTML, the first use of every word of the glossary with its meaning."""
    seen: set[str] = set()

    def mark(match: re.Match[str]) -> str:
        word = match[1]
        if word in seen:
            return match[0]
        seen.add(word)
        meaning = html.escape(glossary()[word], quote=True)
        return f'<span class="term" tabindex="0" data-meaning="{meaning}">{match[0]}</span>'

    parts = re.split(r"(https?://\S+[^\s.,;)]|arXiv:\d{4}\.\d{5}|`[^`]+`)", text)
    return "".join(
        _linked(part) if index % 2 else _pattern().sub(mark, html.escape(part))
        for index, part in enumerate(parts)
    )


def _linked(part: str) -> str:
    if part.startswith("`"):
        return f"<code>{html.escape(part[1:-1])}</code>"
    address = part if part.startswith("http") else f"https://arxiv.org/abs/{part[6:]}"
    return f'<a href="{html.escape(address, quote=True)}">{html.escape(part)}</a>'
