"""``relexkit import``: checkpoints of a run into a trajectory store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from relexkit.commands.console import say
from relexkit.commands.info import print_info
from relexkit.commands.observer import working_together
from relexkit.options import Json, option

if TYPE_CHECKING:
    from relexkit.ingest.reading import Reading


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Json):
    """What is imported, and how: shared with ``relexkit watch``."""

    out: str = option("-o", "--out", metavar="RUN.zarr")
    """the store to write or to continue"""
    base: str | None = option(default=None, metavar="DIR")
    """the base model, a folder or hf://OWNER/NAME (default: the run's step 0)"""
    base_by_reference: bool = False
    """keep where the base is and its checksums, not its weights: it has to stay there"""
    format: str | None = option(default=None, metavar="F")
    """peft, huggingface, verl, dcp, deepspeed, sharded-safetensors, flat or weight-sync, where
    several lie side by side (default: the most precise one)"""
    step_map: str | None = option(default=None, metavar="MAP")
    """optimizer steps per label (2, 1/4), or a JSON file {label: step}"""
    exclude: tuple[str, ...] = option(
        default=(), action="append", nargs=None, type=str, metavar="PATTERN"
    )
    """tensors that keep the base's values, or are left out if it lacks them (may be given again)"""
    continues: bool = option("--continue", default=False)
    """the run goes on from the store although no step is in both"""
    encoding: Literal["auto", "exact", "float"] = "auto"
    """exact keeps every bit; auto: exact for 16 bits, float deltas for float32"""
    mantissa_bits: int | None = None
    """precision of float deltas, 1 to 23 (default: 10)"""

    def reading(self) -> Reading:
        """How the checkpoints are read and recorded."""
        from relexkit.ingest.reading import Reading

        return Reading(
            base=self.base,
            base_by_reference=self.base_by_reference,
            encoding=self.encoding,
            mantissa_bits=self.mantissa_bits,
            source_format=self.format,
            step_map=self.step_map,
            exclude=tuple(self.exclude),
        )


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Options of ``relexkit import``."""

    source: str = option("source", metavar="SRC")
    """folder with checkpoint-N, step_N, weight_vN ... inside, or hf://OWNER/NAME"""
    steps: str | None = option(default=None, metavar="A:B:C")
    """only steps from A to B, both included, in strides of C"""
    rewind: bool = False
    """the run was resumed and written anew: replace the recorded steps that differ"""
    dry_run: bool = False
    """write nothing; say what would be written, and how long it takes"""


def run(options: Options) -> None:
    """Import, and print what the store then holds."""
    with working_together() as (team, progress):
        if options.dry_run:
            if not team.rank:
                from relexkit.commands.dry_run import print_estimate

                print_estimate(options.source, options.steps, options.reading(), options.json)
            return
        from relexkit.ingest.importer import import_checkpoints

        result = import_checkpoints(
            options.source,
            options.out,
            **vars(options.reading()),
            steps=options.steps,
            rewind=options.rewind,
            continues=options.continues,
            gram=True,
            team=team,
            progress=progress,
        )
    if team.rank:
        return
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
    print_info(result.store, options.json)
