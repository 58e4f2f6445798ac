"""The ``relexkit g2d`` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relexkit import Table
from relexkit.extension import print_json, print_table
from relexkit.options import Json, Wide, option
from relexkit.trainer.commands.configured import configured
from relexkit.trainer.config import G2DConfig, load_config
from relexkit.trainer.experiments.g2d import g2d
from relexkit.trainer.policy.loading import Trust

_LEAST = ("spread", "margin", "entropy", "mixed prompts", "pairs")
"""Columns that a narrow terminal goes without, the least important first."""


@dataclass(frozen=True, kw_only=True)
class Options(Json, Wide, Trust):
    """Options of ``relexkit g2d``."""

    run_folder: str = option("run_folder", metavar="RUN")
    """folder of a training run: config.yaml, run.zarr, rollouts/"""
    steps: tuple[int, ...] = option(metavar="K")
    """recorded steps to start from"""
    out: Path = option("-o", "--out", metavar="OUT")
    """where a folder for each K is written"""
    rollouts: Path | None = option(default=None, metavar="DIR")
    """another log of rollouts than RUN/rollouts"""
    config: str | None = option(default=None, metavar="CONFIG.yaml")
    """options by name; those given here win"""
    given: dict[str, str] = configured(G2DConfig)


def answer(options: Options) -> Table:
    """Make pairs, train and evaluate for every ``K``; what an earlier call has finished is kept."""
    config = load_config(options.config, options.given, G2DConfig)
    summaries = g2d(
        options.run_folder,
        options.steps,
        options.out,
        config,
        rollouts=options.rollouts,
        trust_remote_code=options.trust_remote_code,
    )
    return Table({"steps": summaries}, summaries)


def run(options: Options) -> None:
    """Print the summary of every ``K``."""
    document = answer(options).document
    if options.json:
        print_json(document)
    else:
        print_summaries(document["steps"], wide=options.wide)


def print_summaries(summaries: list[dict[str, Any]], *, wide: bool = False) -> None:
    """A row for every ``K``."""
    from rich.table import Table

    title = "G2D: accuracy [95 % interval]"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, header_style="bold"
    )
    headings = (
        "K",
        "pairs",
        "mixed prompts",
        "entropy",
        "margin",
        "spread",
        "before DPO",
        "after DPO",
        "difference",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        told = summary["informativeness"]
        low, high = summary["difference"]["interval"]
        table.add_row(
            str(summary["step"]),
            str(told["pairs"]),
            f"{told['mixed']} of {told['prompts']}",
            f"{told['entropy']:.3f}",
            f"{told['margin']:+.3f}",
            f"{told['accuracy_spread']:.3f}",
            _accuracy(summary["before"]),
            _accuracy(summary["after"]),
            f"{summary['difference']['accuracy']:+.3f} [{low:+.3f}, {high:+.3f}]",
        )
    print_table(table, least=_LEAST, wide=wide)


def _accuracy(summary: dict[str, Any]) -> str:
    low, high = summary["greedy"]["interval"]
    return f"{summary['greedy']['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
