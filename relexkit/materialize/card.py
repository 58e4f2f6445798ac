"""README.md of a predicted checkpoint, from what its plan says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from relexkit.predict.extrapolators import step_text
from relexkit.predict.fits import Options


def model_card(provenance: Mapping[str, Any], variance: float | None, metadata: str) -> str:
    """README.md of a predicted checkpoint: what it is and how it was made, below the front matter
    ``metadata``.
    """
    steps, base = provenance["steps"], provenance["base"]
    options = [f.name for f in fields(Options) if provenance.get(f.name) is not None]
    said = ", ".join(
        f"{name} {provenance[name]}"
        for name in options
        if name != "degree" or provenance["fit"] == "polynomial"
    )
    rows = {
        "base": f"{base['description']} (sha256 `{base['sha256']}`)",
        "source": provenance["source"],
        "steps used": f"{len(steps)}, from {steps[0]} to {steps[-1]}",
        "target step": step_text(provenance["target"]),
        "method": provenance["method"] + (f" ({said})" if said else ""),
        "fitted per": provenance["scope"],
        "scale": f"{provenance['scale']:g}",
        "dtype, rounding": (
            f"{provenance['dtype']}, {provenance['rounding']} (seed {provenance['seed']})"
        ),
        "relexkit": provenance["relexkit"],
    }
    if variance is not None and variance == variance:  # NaN: nothing moved
        rows["variance on each tensor's first direction"] = f"{100 * variance:.1f} %"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    target = step_text(provenance["target"])
    return (
        f"---\n{metadata}---\n\n# Extrapolated checkpoint, step {target}\n\n"
        f"These weights were not trained: they were predicted from the updates of steps {steps[0]}"
        f" to {steps[-1]}. Evaluate them before use.\n\n| | |\n|---|---|\n{table}\n"
    )
