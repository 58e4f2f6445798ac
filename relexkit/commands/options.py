"""Options of a command from the fields of a dataclass: its names, defaults, types and docstrings.

A field ``refit_every: int | None = None`` becomes ``--refit-every N``, a ``Literal`` gives the
choices. What a field means is the string below it. An option that is not given is left to the
dataclass.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


def add_fields(parser: argparse.ArgumentParser, kind: type, names: Iterable[str]) -> None:
    """Add an option for the fields ``names`` of the dataclass ``kind``."""
    types, told = get_type_hints(kind), docstrings(kind)
    for field in _chosen(kind, names):
        known = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=(told[field.name] + known).replace("%", "%%"),
            **_reading(types[field.name]),
        )


def given(parsed: argparse.Namespace, kind: type[_T], names: Iterable[str]) -> _T:
    """The value of ``kind`` that the options of ``add_fields`` come to."""
    fields = _chosen(kind, names)
    return kind(**{f.name: getattr(parsed, f.name) for f in fields if f.name in parsed})


@functools.cache
def docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass and of those that it builds on."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


def _chosen(kind: Any, names: Iterable[str]) -> list[Field[Any]]:
    known = {field.name: field for field in fields(kind)}
    return [known[name] for name in names]


def _reading(kind: Any) -> dict[str, Any]:
    """How ``argparse`` reads a type, which may also be None."""
    if get_origin(kind) in (Union, UnionType):
        inner = [k for k in get_args(kind) if k is not NoneType and get_origin(k) is not Callable]
        kind = (
            inner[0] if len(inner) == 1 else Literal[tuple(a for k in inner for a in get_args(k))]
        )
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}
