"""``relexkit verify``: every chunk of a store against its checksums."""

from __future__ import annotations

from relexkit.commands.console import print_json, progress_bar, show
from relexkit.options import OfStore

Options = OfStore


def run(options: Options) -> None:
    """Read everything; an error names the first damaged chunk."""
    from relexkit.store import TrajectoryStore, describe_steps

    store = TrajectoryStore(options.store)
    with progress_bar() as progress:
        store.verify(progress)
    if options.json:
        print_json({"path": store.path, "steps": [int(s) for s in store.steps], "verified": True})
    else:
        show(
            f"{store.path}: every chunk of {describe_steps(store.steps)} and of the base is intact"
        )
