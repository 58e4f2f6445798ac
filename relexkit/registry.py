"""How commands, plots and drawings are registered by relexkit itself and by installed packages.

A package adds to it by an entry point of the group ``relexkit.extensions`` that names an
``Extension``; relexkit knows no such package by name.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, NoReturn

from relexkit.errors import RelexkitError
from relexkit.options import add_options, read_options

ENTRY_POINTS = "relexkit.extensions"


@dataclass(frozen=True)
class Command:
    """A command of ``relexkit``.

    Attributes:
        module: has a frozen dataclass ``Options``, whose fields are the options of the command
            (``relexkit.options``), ``run(options)``, and in a package that adds commands
            ``answer(options)``, which returns what ``run`` prints. Loaded when the command is
            given.
        help: what it does, as a sentence without its capital and its full stop.
        group: heading under which the overview lists it.
        examples: what may follow the command's name.
    """

    module: str
    help: str
    group: str = "other commands"
    examples: tuple[str, ...] = ()

    def load(self, name: str) -> ModuleType:
        """The module.

        Raises:
            RelexkitError: a package that the command needs is not installed.
        """
        try:
            return import_module(self.module)
        except ModuleNotFoundError as error:
            raise RelexkitError(
                f"{name} needs the package {error.name}; install it with:"
                " pip install 'relexkit[train]'"
            ) from None


@dataclass(frozen=True)
class Extension:
    """What a package adds.

    Attributes:
        commands: by name.
        plots: ``module:function`` that draws what ``--plot`` of the command of that name asks for.
        drawings: ``module:table`` of functions ``(answer, axes or None) -> axes`` by the name of
            the type of the answer.
    """

    commands: Mapping[str, Command]
    plots: Mapping[str, str] = field(default_factory=dict)
    drawings: str | None = None


@functools.cache
def extensions() -> tuple[Extension, ...]:
    """What the installed packages add, by their names."""
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return tuple(point.load() for point in points)


def call(name: str, *given: Any, **options: Any) -> Any:
    """The command ``name`` of an installed package as a function: returns its answer instead of
    printing it.

    Args:
        given: what the command takes without a name, such as the run.
        options: those of the command with ``_`` for ``-``; a sequence for those that take several
            values, True for a flag. None and False are as if not given.

    Raises:
        TypeError: the command does not take that.
        RelexkitError: as the command.
    """
    owner = _command(name).load(name)
    parser = _Parser(prog=f"relexkit.{name}", allow_abbrev=False)
    add_options(parser, owner.Options)
    parsed = parser.parse_args([*_words(parser, options), *map(str, given)])
    return owner.answer(read_options(parsed, owner.Options))


class _Parser(argparse.ArgumentParser):
    """Raises an error for the caller instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise TypeError(f"{self.prog}: {message}")


def _words(parser: argparse.ArgumentParser, options: Mapping[str, Any]) -> list[str]:
    """Options as one types them, each value joined to its option so that it may begin with ``-``;
    ``--`` ends them.
    """
    words: list[str] = []
    for name, value in options.items():
        flag = next(
            (f for a in parser._actions for f in a.option_strings if f in _spelt(name)), None
        )
        if flag is None:
            known = [a.dest for a in parser._actions if a.option_strings and a.dest != "help"]
            raise TypeError(f"{parser.prog} takes no {name}; expected {', '.join(known)}")
        if value is None or value is False:
            continue
        if isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag] if value is True else [f"{flag}={value}"]
    return [*words, "--"] if words else words


def _spelt(name: str) -> tuple[str, str]:
    return f"--{name.rstrip('_')}", f"--{name.rstrip('_').replace('_', '-')}"


def _command(name: str) -> Command:
    for extension in extensions():
        if name in extension.commands:
            return extension.commands[name]
    raise KeyError(name)


def function_of(name: str) -> Callable[..., Any]:
    """``call`` of a command that an installed package adds, with its help.

    Raises:
        KeyError: no installed package has it.
    """
    command = _command(name)

    def function(*given: Any, **options: Any) -> Any:
        return call(name, *given, **options)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"""{command.help[0].upper() + command.help[1:]}.

    Takes what ``relexkit {name} --help`` lists, with ``_`` for ``-``.
    """
    return function


def plot(name: str) -> Callable[..., Any]:
    """The function that draws what ``--plot`` of a command asks for.

    Raises:
        RelexkitError: no installed package draws it.
    """
    for extension in extensions():
        if name in extension.plots:
            return _at(extension.plots[name])
    raise RelexkitError(
        f"--plot: no installed package draws the figures of {name}; install relexkit again"
    )


def drawing(kind: type) -> Callable[..., Any]:
    """The function that draws an answer of a type, or of one that it builds on.

    Raises:
        RelexkitError: no installed package draws it.
    """
    tables = [_at(e.drawings) for e in extensions() if e.drawings is not None]
    for base in kind.__mro__:
        for table in tables:
            if base.__name__ in table:
                return table[base.__name__]
    raise RelexkitError(
        f"no installed package draws an answer of type {kind.__name__}; install relexkit again"
    )


def _at(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
