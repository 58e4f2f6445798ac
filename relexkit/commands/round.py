"""``relexkit round``: any checkpoint in another precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relexkit.commands.console import print_json, progress_bar, show
from relexkit.materialize import Output
from relexkit.options import Json, group, option


@dataclass(frozen=True, kw_only=True)
class Options(Json):
    """Options of ``relexkit round``."""

    source: str = option("source", metavar="SRC")
    """a checkpoint folder in any known format"""
    out: str = option("-o", "--out", metavar="DIR")
    """the folder to write"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """of the output"""
    output: Output = group(Output, "rounding", "seed")


def run(options: Options) -> None:
    """Write the folder."""
    from relexkit.materialize import round_checkpoint

    output = options.output
    with progress_bar() as progress:
        folder = round_checkpoint(
            options.source,
            options.out,
            dtype=options.dtype,
            rounding=output.rounding,
            seed=output.seed,
            progress=progress,
        )
    if options.json:
        print_json(
            {
                "folder": str(folder),
                "dtype": options.dtype,
                "rounding": output.rounding,
                "seed": output.seed,
            }
        )
    else:
        show(f"{folder}: {options.dtype}, {output.rounding} rounding")
