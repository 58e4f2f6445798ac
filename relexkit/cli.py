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

import relexkit.interrupts as interrupts  # as an attribute it would be asked of all extensions
from relexkit.commands import EXTENSION
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
                _parser().parse_args(given)  # says the help, the version, or what is wrong
            owner = commands()[given[0]].load(given[0])
            parsed = command_parser(given[0], owner).parse_args(given[1:])
            owner.run(read_options(parsed, owner.Options))
            sys.stdout.flush()  # a full disk or a closed pipe shows here, and not at the very end
    except BrokenPipeError:  # whoever read the output has seen enough
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


def commands() -> dict[str, Command]:
    """Every command by name, in the order of the help: relexkit's own, then those of extensions."""
    return {n: c for e in (EXTENSION, *extensions()) for n, c in e.commands.items()}


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, RelexkitError):
        place = f"{error.filename}: " if error.filename else ""
        return printable(f"{place}{error.strerror or error}")
    return printable(" ".join(str(error).split()))


# -- parsing ---------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relexkit",
        description=(
            "Trajectory stores, spectra and extrapolated checkpoints of RL runs of language models."
        ),
    )
    parser.add_argument("--version", action="version", version=f"relexkit {__version__}")
    listed = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands().items():
        listed.add_parser(name, help=command.help)  # main() asks its module for the options
    return parser


def command_parser(name: str, owner: ModuleType) -> argparse.ArgumentParser:
    """The options of a command, whose module is ``owner``."""
    about = commands()[name].help
    parser = argparse.ArgumentParser(
        prog=f"relexkit {name}",
        description=about[0].upper() + about[1:] + ".",
        epilog=getattr(owner, "EPILOG", None),
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_options(parser, owner.Options)
    return parser
