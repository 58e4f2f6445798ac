"""``relexkit watch``: record checkpoints as they appear."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "source", metavar="DIR", help="folder that a trainer saves checkpoint-N, step_N, ... into"
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="RUN.zarr", help="the store to write or to continue"
    )
    parser.add_argument("--base", metavar="DIR", help="the base model (default: the run's step 0)")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="only steps that are multiples of N"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors that keep the base's values, or are left out if it lacks them (may be given"
        " again)",
    )
    parser.add_argument(
        "--continue",
        dest="continues",
        action="store_true",
        help="the run goes on from the store although no step is in both",
    )
    parser.add_argument(
        "--encoding",
        choices=("auto", "exact", "float"),
        default="auto",
        help="see `relexkit import`",
    )
    parser.add_argument(
        "--mantissa-bits",
        type=int,
        metavar="N",
        help="precision of float deltas, 1 to 23 (default: 10)",
    )
    parser.add_argument(
        "--format", metavar="NAME", help="format to take where several lie side by side"
    )
    parser.add_argument(
        "--step-map", metavar="MAP", help="optimizer steps per label, or a JSON file {label: step}"
    )
    parser.add_argument(
        "--delete-after",
        action="store_true",
        help="delete a checkpoint once its step reads back equal and a newer one is stored",
    )
    parser.add_argument(
        "--poll", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: 5)"
    )
    parser.add_argument(
        "--idle",
        type=float,
        metavar="SECONDS",
        help="stop when nothing came for so long (default: go on)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output at the end"
    )


def run(parsed: argparse.Namespace) -> None:
    """Watch until idle or interrupted."""
    from relexkit.commands.console import print_json, say, show
    from relexkit.ingest.watch import watch
    from relexkit.store import describe_steps

    store = watch(
        parsed.source,
        parsed.out,
        base=parsed.base,
        every=parsed.every,
        encoding=parsed.encoding,
        mantissa_bits=parsed.mantissa_bits,
        source_format=parsed.format,
        step_map=parsed.step_map,
        exclude=parsed.exclude,
        continues=parsed.continues,
        delete_after=parsed.delete_after,
        poll_seconds=parsed.poll,
        idle_seconds=parsed.idle,
        say=say,
    )
    if parsed.json:
        print_json({"path": store.path, "steps": [int(s) for s in store.steps]})
    else:
        show(f"{store.path}: {describe_steps(store.steps)}")
