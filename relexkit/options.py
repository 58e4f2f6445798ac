"""Options of a command from the fields of a frozen dataclass: names, defaults, types, docstrings.

A field ``refit_every: int | None = None`` becomes ``--refit-every N``, a ``Literal`` gives the
choices, a ``bool`` a switch, a tuple takes several words, and a field whose type is a dataclass
stands for the options of that one. What a field means is the string below it. An option that is
not given is left to the dataclass.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


def option(*flags: str, default: Any = MISSING, **reading: Any) -> Any:
    """A field that differs from what its name and type say.

    Args:
        flags: spellings, ``-o`` and ``--out``; one without a dash makes it positional.
        default: without one, the option must be given.
        reading: what ``add_argument`` of ``argparse`` takes, such as ``metavar`` or ``choices``.
    """
    return field(default=default, metadata={"flags": flags, "reading": reading})


def group(kind: type, *names: str, heading: str | None = None) -> Any:
    """A field that holds a ``kind`` whose fields ``names`` (default: all) are options, too."""
    return field(default_factory=kind, metadata={"names": names, "heading": heading})


def custom(add: Callable[[Any], None], read: Callable[[argparse.Namespace], Any]) -> Any:
    """A field whose options are added to a parser, and read from what was parsed, by functions."""
    return field(metadata={"add": add, "read": read})


@dataclass(frozen=True, kw_only=True)
class Json:
    """Every command that prints results has this option."""

    json: bool = False
    """print one JSON document on standard output"""


@dataclass(frozen=True, kw_only=True)
class OfStore(Json):
    """Options of a command that asks something of a store."""

    store: str = option("store", metavar="RUN.zarr")
    """the trajectory store, a folder or a URL"""


@dataclass(frozen=True, kw_only=True)
class Wide:
    """Every command that prints a table with many columns has this option."""

    wide: bool = False
    """print every column, also those that the terminal has no room for"""


def add_options(parser: Any, kind: type, names: Sequence[str] = ()) -> None:
    """Add the options of the dataclass ``kind``, or those of its fields ``names``."""
    types, meanings = get_type_hints(kind), docstrings(kind)
    for one in _chosen(kind, names):
        if "add" in one.metadata:
            one.metadata["add"](parser)
        elif is_dataclass(types[one.name]):
            heading = one.metadata.get("heading")
            where = parser.add_argument_group(heading) if heading else parser
            add_options(where, types[one.name], one.metadata.get("names", ()))
        else:
            _add(parser, one, types[one.name], meanings.get(one.name, ""))


def read_options(parsed: argparse.Namespace, kind: type[_T], names: Sequence[str] = ()) -> _T:
    """The value of ``kind`` from the parsed options of ``add_options``."""
    types, values = get_type_hints(kind), dict[str, Any]()
    for one in _chosen(kind, names):
        if "read" in one.metadata:
            values[one.name] = one.metadata["read"](parsed)
        elif is_dataclass(types[one.name]):
            values[one.name] = read_options(parsed, types[one.name], one.metadata.get("names", ()))
        elif one.name in parsed:
            value = getattr(parsed, one.name)
            values[one.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


@functools.cache
def docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass and of those that it builds on."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for assigned, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(assigned, ast.AnnAssign) and isinstance(below, ast.Expr):
                name = ast.unparse(assigned.target)
                meanings[name] = " ".join(ast.literal_eval(below.value).split())
    return meanings


def _chosen(kind: Any, names: Sequence[str]) -> Iterable[Field[Any]]:
    """Fields of the dataclass itself before those that it builds on: the order of the help."""
    known = {one.name: one for one in fields(kind)}
    if names:
        return [known[name] for name in names]
    own = [name for base in kind.__mro__[:-1] for name in vars(base).get("__annotations__", {})]
    return [known[name] for name in dict.fromkeys(own) if name in known]


def _add(parser: Any, one: Field[Any], kind: Any, meaning: str) -> None:
    flags = one.metadata.get("flags") or (_flag(one, kind),)
    reading = {**_reading(kind, one.default), **one.metadata.get("reading", {})}
    if flags[0].startswith("-"):
        reading |= {"dest": one.name, "required": one.default is MISSING}
    elif one.default is not MISSING and "nargs" not in reading:
        reading["nargs"] = "?"
    help = (meaning + _default_text(one.default, meaning)).replace("%", "%%")
    parser.add_argument(*flags, default=argparse.SUPPRESS, help=help, **reading)


def _flag(one: Field[Any], kind: Any) -> str:
    negated = "no-" if kind is bool and one.default is True else ""
    return f"--{negated}{one.name.replace('_', '-')}"


def _default_text(default: Any, meaning: str) -> str:
    if default in (MISSING, None, ()) or isinstance(default, bool) or "(default" in meaning:
        return ""
    shown = default if isinstance(default, tuple) else (default,)
    return f" (default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in shown)})"


def _reading(kind: Any, default: Any) -> dict[str, Any]:
    """How ``argparse`` reads a type, which may also be None."""
    if kind is bool:
        return {"action": "store_false" if default is True else "store_true"}
    inner = [k for k in _alternatives(kind) if k is not NoneType and get_origin(k) is not Callable]
    if get_origin(inner[0]) is tuple:
        return {**_reading(get_args(inner[0])[0], None), "nargs": "+"}
    if get_origin(inner[0]) is Literal:
        return {"choices": tuple(word for k in inner for word in get_args(k))}
    metavar = {int: "N", float: "X", Path: "PATH"}.get(inner[0], "NAME")
    return {"type": inner[0], "metavar": metavar}


def _alternatives(kind: Any) -> Iterator[Any]:
    return iter(get_args(kind)) if get_origin(kind) in (Union, UnionType) else iter((kind,))
