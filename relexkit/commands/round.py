"""``relexkit round``: any checkpoint in another precision."""

from __future__ import annotations

import argparse

from relexkit.commands.console import print_json, progress_bar, show
from relexkit.commands.options import add_fields, given

ROUNDING = ("rounding", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit round``."""
    from relexkit.materialize import Output

    parser.add_argument("source", metavar="SRC", help="a checkpoint folder in any known format")
    parser.add_argument("-o", "--out", required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add_fields(parser, Output, ROUNDING)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def run(parsed: argparse.Namespace) -> None:
    """Write the folder."""
    from relexkit.materialize import Output, round_checkpoint

    output = given(parsed, Output, ROUNDING)
    with progress_bar() as progress:
        folder = round_checkpoint(
            parsed.source,
            parsed.out,
            dtype=parsed.dtype,
            rounding=output.rounding,
            seed=output.seed,
            progress=progress,
        )
    if parsed.json:
        print_json(
            {
                "folder": str(folder),
                "dtype": parsed.dtype,
                "rounding": output.rounding,
                "seed": output.seed,
            }
        )
    else:
        show(f"{folder}: {parsed.dtype}, {output.rounding} rounding")
