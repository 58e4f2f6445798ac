"""How commands and plots are registered by relexkit itself and by installed packages.

A package adds to it by an entry point of the group ``relexkit.extensions`` that names an
``Extension``; relexkit knows no such package by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from relexkit.errors import RelexkitError

ENTRY_POINTS = "relexkit.extensions"


@dataclass(frozen=True)
class Command:
    """A command of ``relexkit``.

    Attributes:
        module: has a frozen dataclass ``Options``, whose fields are the options of the command
            (``relexkit.commands.options``), ``run(options)``, and ``EPILOG`` if there is more to
            say below its help; loaded when the command is given.
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
    """

    commands: Mapping[str, Command]
    plots: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def extensions() -> tuple[Extension, ...]:
    """What the installed packages add, by their names."""
    found = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return tuple(point.load() for point in found)


def plot(name: str) -> Callable[..., Any]:
    """The function that draws what ``--plot`` of a command asks for.

    Raises:
        RelexkitError: no installed package draws it.
    """
    for extension in extensions():
        if name in extension.plots:
            module, _, function = extension.plots[name].partition(":")
            return getattr(import_module(module), function)
    raise RelexkitError(
        f"--plot: no installed package draws the figures of {name}; install relexkit again"
    )
