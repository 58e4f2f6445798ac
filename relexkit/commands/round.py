"""``relexkit round``: any checkpoint in another precision."""

from __future__ import annotations

import argparse

from relexkit.commands.console import print_json, progress_bar, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit round``."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder in any known format")
    parser.add_argument("-o", "--out", required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add_rounding(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def run(parsed: argparse.Namespace) -> None:
    """Write the folder."""
    from relexkit.materialize import round_checkpoint

    with progress_bar() as progress:
        folder = round_checkpoint(
            parsed.source,
            parsed.out,
            dtype=parsed.dtype,
            rounding=parsed.rounding,
            seed=parsed.seed,
            progress=progress,
        )
    if parsed.json:
        print_json(
            {
                "folder": str(folder),
                "dtype": parsed.dtype,
                "rounding": parsed.rounding,
                "seed": parsed.seed,
            }
        )
    else:
        show(f"{folder}: {parsed.dtype}, {parsed.rounding} rounding")


def add_rounding(parser: argparse.ArgumentParser) -> None:
    """``--rounding`` and ``--seed``."""
    parser.add_argument("--rounding", choices=("stochastic", "nearest"), default="stochastic")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the stochastic rounding (default: 0)"
    )
