"""``relexkit watch``: record checkpoints as they appear."""

from __future__ import annotations

from dataclasses import dataclass

from relexkit.commands.import_run import SourceOptions
from relexkit.options import option


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Options of ``relexkit watch``."""

    source: str = option("source", metavar="DIR")
    """folder that a trainer saves checkpoint-N, step_N, ... into"""
    every: int = 1
    """only steps that are multiples of N"""
    delete_after: bool = False
    """delete a checkpoint once its step reads back equal and a newer one is stored"""
    poll: float = option(default=5.0, metavar="SECONDS")
    """between two looks"""
    idle: float | None = option(default=None, metavar="SECONDS")
    """stop when nothing came for so long (default: go on)"""


def run(options: Options) -> None:
    """Watch until idle or interrupted."""
    from relexkit.commands.console import print_json, say, show
    from relexkit.ingest.watch import watch
    from relexkit.store import describe_steps

    store = watch(
        options.source,
        options.out,
        **vars(options.reading()),
        every=options.every,
        continues=options.continues,
        delete_after=options.delete_after,
        poll_seconds=options.poll,
        idle_seconds=options.idle,
        say=say,
    )
    if options.json:
        print_json({"path": store.path, "steps": [int(s) for s in store.steps]})
    else:
        show(f"{store.path}: {describe_steps(store.steps)}")
