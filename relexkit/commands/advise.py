"""``relexkit advise``: what to do next with a run, and why."""

from __future__ import annotations

from dataclasses import dataclass

from relexkit.commands.console import print_json, progress_bar, show
from relexkit.commands.observer import OfGram, observer
from relexkit.options import option


@dataclass(frozen=True, kw_only=True)
class Options(OfGram):
    """Options of ``relexkit advise``."""

    until: int | None = option(default=None, metavar="STEP")
    """advise as if the run had ended here"""
    since: int | None = option(default=None, metavar="STEP")
    """use only the steps after this one, relative to it, up to the next jump"""


def run(options: Options) -> None:
    """Print the advice."""
    from relexkit.assess.advice import advise
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(options.store)
    with observer(options.compute) as observed:
        run_so_far = observed.observe(store, options.until, options.since)
    if observed.silent:
        return
    with progress_bar():
        advice = advise(run_so_far.gram, run_so_far.metrics)
    store_so_far = options.store + ("" if options.until is None else f" --until {options.until}")
    command = advice.next_command and advice.next_command.format(store=store_so_far)
    if options.json:
        document = advice.document() | {"next_command": command}
        print_json({"steps": run_so_far.gram.steps.tolist(), **document})
        return
    show(advice.headline)
    for heading, sentences in (
        ("Why", advice.reasons),
        ("What would change this", advice.would_change),
    ):
        show(f"\n{heading}:")
        for sentence in sentences:
            show(f"  - {sentence}")
    if command:
        show(f"\nNext:\n  {command}")
