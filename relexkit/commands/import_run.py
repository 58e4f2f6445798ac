"""``relexkit import``: checkpoints of a run into a trajectory store."""

from __future__ import annotations

import argparse
from importlib import import_module

from relexkit.commands.console import progress_bar, say
from relexkit.commands.info import print_info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit import``."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with checkpoint-N, step_N, weight_vN ... inside, or hf://OWNER/NAME",
    )
    parser.add_argument(
        "--format",
        metavar="F",
        help="peft, huggingface, verl, dcp, deepspeed, sharded-safetensors, flat or weight-sync",
    )
    parser.add_argument(
        "--step-map",
        metavar="MAP",
        help="optimizer steps per label (2, 1/4), or a JSON file {label: step}",
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="RUN.zarr", help="the store to write or to continue"
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="the base model, a folder or hf://OWNER/NAME (default: the run's step 0)",
    )
    parser.add_argument(
        "--steps", metavar="A:B:C", help="only steps from A to B, both included, in strides of C"
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
        "--rewind",
        action="store_true",
        help="the run was resumed and written anew: replace the recorded steps that differ",
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
        help="exact keeps every bit; auto: exact for 16 bits, float deltas for float32",
    )
    parser.add_argument(
        "--mantissa-bits",
        type=int,
        metavar="N",
        help="precision of float deltas, 1 to 23 (default: 10)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; say what would be written, and how long it takes",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def run(parsed: argparse.Namespace) -> None:
    """Import, and print what the store then holds."""
    from relexkit.ingest.importer import import_checkpoints

    if parsed.dry_run:
        import_module("relexkit.commands.dry_run").print_estimate(parsed)
        return
    with progress_bar() as progress:
        result = import_checkpoints(
            parsed.source,
            parsed.out,
            base=parsed.base,
            steps=parsed.steps,
            encoding=parsed.encoding,
            mantissa_bits=parsed.mantissa_bits,
            source_format=parsed.format,
            step_map=parsed.step_map,
            exclude=parsed.exclude,
            rewind=parsed.rewind,
            continues=parsed.continues,
            progress=progress,
        )
    for note in result.notes:
        say(note)
    for what, reason in result.left_out.items():
        say(f"{what} left out: {reason}")
    if result.already:
        say(f"{len(result.already)} steps were recorded already")
    if "config.json" not in result.store.attributes["files"]:
        say(
            "no config.json was found: written checkpoints will need one before they load with"
            " from_pretrained"
        )
    print_info(result.store, parsed.json)
