"""What every answer can do: a table, a picture, and a readable form where it is shown."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from relexkit.errors import RelexkitError
from relexkit.registry import drawing

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_SHOWN_ROWS = 20


class Result:
    """An answer with ``rows``, and sentences about them.

    A notebook shows the sentences above a table, a terminal the same as text.
    """

    def rows(self) -> list[dict[str, Any]]:
        """The answer as a table: one mapping of names to values a row, all with the same names."""
        raise NotImplementedError

    def sentences(self) -> Sequence[str]:
        """What to know beside the table, the most important first."""
        return ()

    def to_frame(self) -> pandas.DataFrame:
        """``rows`` as a pandas frame.

        Raises:
            RelexkitError: pandas is not installed.
        """
        return frame_of(self.rows())

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the answer on ``axes``, or on new ones; returns them.

        Raises:
            RelexkitError: no installed package draws it.
        """
        return drawing(type(self))(self, axes)

    def __repr__(self) -> str:
        rows = self.rows()
        size = f", {len(rows)} rows" if rows else ""
        lines = [f"{type(self).__name__}{size}", *self.sentences()]
        return "\n".join([*lines, *_text_table(rows[:_SHOWN_ROWS]), *_more(rows)])

    def _repr_html_(self) -> str:
        return html_of(type(self).__name__, self.sentences(), self.rows())


class Table(Result):
    """Rows and sentences of a command's answer, with the document that its ``--json`` prints."""

    def __init__(
        self, document: Any, rows: Sequence[Mapping[str, Any]], sentences: Sequence[str] = ()
    ):
        self.document = document
        self._rows, self._sentences = [dict(row) for row in rows], tuple(sentences)

    def rows(self) -> list[dict[str, Any]]:
        """See ``Result``."""
        return self._rows

    def sentences(self) -> Sequence[str]:
        """See ``Result``."""
        return self._sentences


def frame_of(rows: Any, index: Any = None) -> pandas.DataFrame:
    """A pandas frame.

    Raises:
        RelexkitError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise RelexkitError(
            "a frame needs the package pandas; install it with: pip install 'relexkit[notebook]'"
        ) from None
    return pandas.DataFrame(rows, index=index)


def html_of(title: str, sentences: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A title, sentences and a table for a notebook; every text is escaped."""
    parts = [f"<b>{html.escape(title)}</b>"]
    parts += [f"<div>{html.escape(sentence)}</div>" for sentence in sentences]
    if rows:
        heads = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in rows[0])
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell(v))}</td>" for v in row.values()) + "</tr>"
            for row in rows[:_SHOWN_ROWS]
        )
        parts.append(f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>")
    return "\n".join([*parts, *(f"<div>{line}</div>" for line in _more(rows))])


def cell(value: Any) -> str:
    """A value as people read it: four digits, empty where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return [
        "  ".join(
            text.ljust(width) if k == 0 else text.rjust(width)
            for k, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _more(rows: Sequence[Any]) -> list[str]:
    left = len(rows) - _SHOWN_ROWS
    return [f"... and {left} more; to_frame() has them all"] if left > 0 else []
