"""The ``relexkit`` command: parse, call one function, print.

Results go to standard output (with ``--json`` one JSON document and nothing else), progress and
messages to standard error. Exit status: 0 done, 1 a stated error in one line, 2 wrong usage, 130
interrupted, 143 terminated. Heavy modules load inside the commands.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import relexkit.interrupts as interrupts  # as an attribute it would be asked of all extensions
from relexkit.commands import EXTENSION
from relexkit.commands.help import Parser, meant, overview
from relexkit.errors import RelexkitError, printable
from relexkit.options import add_options, read_options
from relexkit.registry import Command, extensions
from relexkit.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = None
    try:
        with interrupts.raising():
            if not given or given[0] not in commands():
                return _without_command(given)
            owner = commands()[given[0]].load(given[0])
            parsed = command_parser(given[0], owner).parse_args(given[1:])
            owner.run(read_options(parsed, owner.Options))
            sys.stdout.flush()  # a full disk or a closed pipe shows here, and not at the very end
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RelexkitError, OSError) as error:
        if parsed is not None and parsed.debug:
            raise
        if not getattr(error, "said_elsewhere", False):
            print(f"relexkit: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        status = interrupts.status_of(interruption)
        print(interrupts.sentence(status - 128), file=sys.stderr)
        return status
    return 0


def complete() -> None:
    """Answer a shell that asks how the words of a command go on; ends the process."""
    import argcomplete

    words = os.environ["COMP_LINE"].split()
    parser = argparse.ArgumentParser(prog="relexkit")
    listed = parser.add_subparsers()
    for name, command in commands().items():
        if name in words[1:2]:
            listed.add_parser(name, parents=[command_parser(name, command.load(name))], **_BARE)
        else:
            listed.add_parser(name, help=command.help)
    argcomplete.autocomplete(parser)


_BARE: Any = {"add_help": False, "conflict_handler": "resolve"}


def commands() -> dict[str, Command]:
    """Every command by name, in the order of the help: relexkit's own, then those of extensions."""
    return {n: c for e in (EXTENSION, *extensions()) for n, c in e.commands.items()}


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, RelexkitError):
        place = f"{error.filename}: " if error.filename else ""
        return printable(f"{place}{error.strerror or error}")
    return printable(" ".join(str(error).split()))


# -- parsing ---------------------------------------------------------------------------------------


def _without_command(given: Sequence[str]) -> int:
    """The help, the version, or what is wrong with the first word."""
    first = given[0] if given else ""
    if first in ("-h", "--help", "help"):
        print(overview(commands()), end="")
        return 0
    if first == "--version":
        print(f"relexkit {__version__}")
        return 0
    wrong = f"no command {first!r}{meant(first, [*commands()])}" if given else "no command is given"
    print(
        f"usage: relexkit COMMAND [options]\nrelexkit: error: {printable(wrong)}\n"
        "relexkit --help lists the commands",
        file=sys.stderr,
    )
    raise SystemExit(2)


def command_parser(name: str, owner: ModuleType) -> Parser:
    """The options of a command, whose module is ``owner``."""
    parser = Parser(name, commands()[name])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_options(parser, owner.Options)
    parser.one_spelling()
    return parser
