"""``relexkit import --dry-run``: what an import would write."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import numpy as np

from relexkit.commands.console import print_json, print_pairs, size_text
from relexkit.ingest.estimate import estimate_import
from relexkit.store import describe_steps


def print_estimate(parsed: argparse.Namespace) -> None:
    """Print the estimate for the options of ``relexkit import``."""
    found = estimate_import(
        parsed.source,
        base=parsed.base,
        steps=parsed.steps,
        encoding=parsed.encoding,
        mantissa_bits=parsed.mantissa_bits,
        source_format=parsed.format,
        step_map=parsed.step_map,
        exclude=parsed.exclude,
    )
    if parsed.json:
        print_json(asdict(found))
        return
    took = (
        "seconds"
        if found.seconds is None
        else f"{found.seconds:.0f} s, if reading is as fast as for the sample"
    )
    rows = [
        ("steps", describe_steps(np.asarray(found.steps))),
        ("parameters", f"{found.num_parameters:,} in {found.num_tensors} tensors"),
        ("recorded as", f"{', '.join(found.dtypes)}, {' and '.join(found.encodings)} encoding"),
        (
            "store",
            (
                f"about {size_text(found.step_bytes + found.base_bytes)}: steps"
                f" {size_text(found.step_bytes)}, base {size_text(found.base_bytes)}"
            ),
        ),
        ("instead of", f"{size_text(found.checkpoint_bytes)} of weights"),
        ("time", took),
        ("from", f"a sample of {100 * found.sampled:.3g} % of the weights; nothing was written"),
        *(("note", note) for note in found.notes),
        *(("left out", f"{what}: {reason}") for what, reason in found.left_out.items()),
    ]
    print_pairs(parsed.source, rows)
