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
from importlib import import_module

from relexkit import interrupts
from relexkit.errors import RelexkitError, printable
from relexkit.version import __version__

COMMAND_MODULES = {
    "import": (
        "relexkit.commands.import_run",
        "import a run's checkpoints into a trajectory store; run again to add new steps",
    ),
    "info": (
        "relexkit.commands.info",
        "say what is inside a store, or which checkpoints a folder holds",
    ),
    "verify": (
        "relexkit.commands.verify",
        "read every chunk of a store and compare it with its checksums",
    ),
    "spectrum": (
        "relexkit.commands.spectrum",
        "principal directions of the updates, beside those of a walk without direction",
    ),
    "extrapolate": (
        "relexkit.commands.extrapolate",
        "write the predicted checkpoints of future steps",
    ),
    "checkout": (
        "relexkit.commands.checkout",
        "write a recorded step as a checkpoint; step 0 is the base",
    ),
    "round": (
        "relexkit.commands.round",
        "write any checkpoint in another precision, stochastically rounded",
    ),
    "backtest": (
        "relexkit.commands.backtest",
        "how every method would have done in the run's own past, and how far to trust it",
    ),
    "advise": ("relexkit.commands.advise", "say what to do next with a run, and why"),
    "linearity": (
        "relexkit.commands.linearity",
        "how straight every single weight's path is, beside a walk's; one pass",
    ),
    "report": (
        "analysis.report",
        "write one self-contained page about a run: advice, claims, figures, commands",
    ),
    "probe": (
        "trainer.experiments.outputs",
        "how linear the log-probabilities of texts are; generate from extrapolated logits",
    ),
    "sweep": (
        "trainer.experiments.sweep",
        "try predictions on a task, stop bad ones early, and recommend",
    ),
    "watch": (
        "relexkit.commands.watch",
        "import checkpoints as they appear, and delete them afterwards if asked to",
    ),
    "train": ("trainer.commands.train", "train a model by GRPO, recording its trajectory"),
    "g2d": (
        "trainer.experiments.g2d",
        "preference pairs from a run's rollouts, DPO from its recorded steps, evaluation",
    ),
    "tokens": ("trainer.commands.tokens", "which tokens carry the update, from a log of rollouts"),
    "evaluate": (
        "trainer.commands.evaluate",
        "accuracy of models on a task, with intervals: folders, or steps of a store",
    ),
    "demo": (
        "trainer.commands.demo",
        "train a small model, record, analyse, extrapolate: the whole story in minutes",
    ),
    "gram": (
        "relexkit.commands.gram",
        "compute the Gram matrices and keep them in the store: the one pass",
    ),
}
"""Every command: name -> (module with ``add_arguments(parser)`` and ``run(arguments)``, help)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = None
    try:
        with interrupts.raising():
            if given and given[0] in COMMAND_MODULES:
                parsed = _module_parser(given[0]).parse_args(given[1:])
            else:
                parsed = _parser().parse_args(given)
            parsed.run(parsed)
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    for name, (_, text) in COMMAND_MODULES.items():
        commands.add_parser(name, help=text)  # for the list; main() asks the owner for the options
    return parser


def _module_parser(name: str) -> argparse.ArgumentParser:
    module, text = COMMAND_MODULES[name]
    try:
        owner = import_module(module)
    except ModuleNotFoundError as error:
        raise RelexkitError(
            f"{name} needs the package {error.name}; install it with: pip install 'relexkit[train]'"
        ) from None
    parser = argparse.ArgumentParser(
        prog=f"relexkit {name}", description=text[0].upper() + text[1:] + "."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    owner.add_arguments(parser)
    parser.set_defaults(run=owner.run)
    return parser
