"""The ``relexkit g2d`` command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from relexkit.extension import print_json, print_table
from relexkit.trainer.commands.train import add_options, given_options
from relexkit.trainer.commands.trust import add_trust
from relexkit.trainer.config import G2DConfig, load_config
from relexkit.trainer.experiments.g2d import g2d


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``relexkit g2d``: where from, where to, then options by the names of
    ``trainer.config.G2DConfig``.
    """
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        help="folder of a training run: config.yaml, run.zarr, rollouts/",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        required=True,
        metavar="K",
        help="recorded steps to start from",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT")
    parser.add_argument(
        "--rollouts", type=Path, metavar="DIR", help="another log of rollouts than RUN/rollouts"
    )
    parser.add_argument(
        "--config", metavar="CONFIG.yaml", help="options by name; those given here win"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_trust(parser)
    add_options(parser, G2DConfig)


def run(arguments: argparse.Namespace) -> None:
    """Make pairs, train and evaluate for every ``K``; what an earlier call has finished is kept."""
    config = load_config(arguments.config, given_options(arguments, G2DConfig), G2DConfig)
    found = g2d(
        arguments.run_folder,
        arguments.steps,
        arguments.out,
        config,
        rollouts=arguments.rollouts,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        print_json({"steps": found})
    else:
        _print_table(found)


def _print_table(found: list[dict[str, Any]]) -> None:
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
    for summary in found:
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
    print_table(table)


def _accuracy(summary: dict[str, Any]) -> str:
    low, high = summary["greedy"]["interval"]
    return f"{summary['greedy']['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
