"""``relexkit verify``: every chunk of a store against its checksums."""

from __future__ import annotations

import argparse

from relexkit.commands.console import print_json, progress_bar, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit verify``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def run(parsed: argparse.Namespace) -> None:
    """Read everything; an error names the first damaged chunk."""
    from relexkit.store import TrajectoryStore, describe_steps

    store = TrajectoryStore(parsed.store)
    with progress_bar() as progress:
        store.verify(progress)
    if parsed.json:
        print_json({"path": store.path, "steps": [int(s) for s in store.steps], "verified": True})
    else:
        show(
            f"{store.path}: every chunk of {describe_steps(store.steps)} and of the base is intact"
        )
