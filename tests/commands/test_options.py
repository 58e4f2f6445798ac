"""Options of a command from the fields of a dataclass."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from relexkit.cli import commands
from relexkit.options import Json, add_options, group, option, read_options


@dataclass(frozen=True, kw_only=True)
class Inner:
    rank: int = 1
    """how many"""
    left_out: float = 0.5
    """not an option of the command"""


@dataclass(frozen=True, kw_only=True)
class Example(Json):
    source: str = option("source", metavar="SRC")
    """where from"""
    out: Path = option("-o", "--out")
    """where to"""
    kind: Literal["a", "b"] | Literal["c"] | None = None
    """which"""
    to: tuple[float, ...] = ()
    """several, 100 % of them"""
    exclude: tuple[str, ...] = option(default=(), action="append", nargs=None, type=str)
    """again and again"""
    halving: bool = True
    """stop early"""
    goes_on: bool = option("--continue", default=False)
    """whatever happens"""
    inner: Inner = group(Inner, "rank")


def read(*words: str) -> Example:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Example)
    return read_options(parser.parse_args([*words]), Example)


def test_what_is_not_given_is_left_to_the_dataclass() -> None:
    assert read("run", "-o", "there") == Example(source="run", out=Path("there"))


def test_every_kind_of_field() -> None:
    given = "run --out x --kind c --to 1 2.5 --exclude a --exclude b --no-halving --continue"
    expected = Example(
        source="run",
        out=Path("x"),
        kind="c",
        to=(1.0, 2.5),
        exclude=("a", "b"),
        halving=False,
        goes_on=True,
        inner=Inner(rank=3),
        json=True,
    )
    assert read(*given.split(), "--rank", "3", "--json") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run", "-o/--out"),
        ("run -o x --kind d", "invalid choice: 'd'"),
        ("run -o x --left-out 1", "--left-out"),
        ("run -o x --rank one", "invalid int"),
    ],
)
def test_what_cannot_be_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)) as refused:
        read(*words.split())
    assert message in str(refused.value) + capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_of_every_command_has_its_line_of_help(name: str) -> None:
    owner = commands()[name].load(name)
    parser = argparse.ArgumentParser()
    add_options(parser, owner.Options)
    assert [action.dest for action in parser._actions if not action.help] == []
