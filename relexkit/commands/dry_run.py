"""``relexkit import --dry-run``: what an import would write."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from relexkit.commands.console import print_json, print_pairs, size_text
from relexkit.ingest.estimate import estimate_import
from relexkit.ingest.reading import Reading
from relexkit.store import describe_steps


def print_estimate(source: str, steps: str | None, reading: Reading, as_json: bool) -> None:
    """Print the estimate for an import of ``source``; see ``estimate_import``."""
    estimate = estimate_import(source, steps=steps, reading=reading)
    if as_json:
        print_json(asdict(estimate))
        return
    took = (
        "seconds"
        if estimate.seconds is None
        else f"{estimate.seconds:.0f} s, if reading is as fast as for the sample"
    )
    rows = [
        ("steps", describe_steps(np.asarray(estimate.steps))),
        ("parameters", f"{estimate.num_parameters:,} in {estimate.num_tensors} tensors"),
        (
            "recorded as",
            f"{', '.join(estimate.dtypes)}, {' and '.join(estimate.encodings)} encoding",
        ),
        (
            "store",
            (
                f"about {size_text(estimate.step_bytes + estimate.base_bytes)}: steps"
                f" {size_text(estimate.step_bytes)}, base {size_text(estimate.base_bytes)}"
            ),
        ),
        ("instead of", f"{size_text(estimate.checkpoint_bytes)} of weights"),
        ("time", took),
        ("from", f"a sample of {100 * estimate.sampled:.3g} % of the weights; nothing was written"),
        *(("note", note) for note in estimate.notes),
        *(("left out", f"{what}: {reason}") for what, reason in estimate.left_out.items()),
    ]
    print_pairs(source, rows)
