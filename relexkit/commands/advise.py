"""``relexkit advise``: what to do next with a run, and why."""

from __future__ import annotations

import argparse

from relexkit.commands.console import print_json, show
from relexkit.commands.observer import add_pca, observer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit advise``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="advise as if the run had ended here"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )
    add_pca(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the advice."""
    from relexkit.assess.advice import advise
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(arguments.store)
    with observer(arguments) as observed:
        run_so_far = observed.observe(store).until(arguments.until)
    if observed.silent:
        return
    advice = advise(run_so_far.gram, run_so_far.metrics)
    if arguments.json:
        document = advice.document()
        if advice.next_command:
            document["next_command"] = advice.next_command.format(store=arguments.store)
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
    if advice.next_command:
        show(f"\nNext:\n  {advice.next_command.format(store=arguments.store)}")
