"""The options by which commands that write checkpoints write weight-sync versions instead."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from relexkit.errors import RelexkitError

if TYPE_CHECKING:
    from relexkit.materialize import WeightSync


def add_sync(parser: argparse.ArgumentParser) -> None:
    """``--as``, ``--against`` and ``--version``."""
    parser.add_argument(
        "--as",
        dest="written_as",
        choices=("folder", "weight-sync"),
        default="folder",
        help="a folder, or a version that an inference engine pulls (default: folder)",
    )
    parser.add_argument(
        "--against",
        metavar="BASE",
        help="weight-sync: what the engine has, a folder or a recorded step (0: the base)",
    )
    parser.add_argument(
        "--version",
        type=int,
        metavar="N",
        help="weight-sync: number of the version (default: after the last in OUT, or 1)",
    )


def read_sync(parsed: argparse.Namespace) -> WeightSync | None:
    """What these options ask for; None for folders.

    Raises:
        RelexkitError: they contradict one another.
    """
    from relexkit.materialize import WeightSync

    if parsed.written_as == "folder":
        if parsed.against is not None or parsed.version is not None:
            raise RelexkitError(
                "--against and --version belong to --as weight-sync; add it or leave them out"
            )
        return None
    if getattr(parsed, "adapter", None):
        raise RelexkitError("--as weight-sync holds whole weights; leave --adapter out")
    if parsed.against is None:
        raise RelexkitError(
            "--as weight-sync needs --against: the folder that the engine was started with, or the"
            " number of the recorded step that it has"
        )
    if Path(parsed.against).is_dir():
        return WeightSync(parsed.against, parsed.version)
    if not parsed.against.isdecimal():
        raise RelexkitError(
            f"--against {parsed.against} is neither a folder nor a step; expected one of them"
        )
    return WeightSync(int(parsed.against), parsed.version)
