"""The ``relexkit tokens`` command: the share of each class of tokens, and of single tokens, in the
update of a run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from relexkit import RelexkitError
from relexkit.extension import percent, print_json, print_table
from relexkit.trainer.commands.trust import add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``relexkit tokens``."""
    parser.add_argument(
        "run_folder",
        type=Path,
        metavar="RUN",
        help="folder of a run that was trained with token_shares: true",
    )
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="only rollouts of the steps up to this one"
    )
    parser.add_argument(
        "--top",
        type=int,
        default=20,
        metavar="N",
        help="tokens with the largest shares (default: 20)",
    )
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> None:
    """Read the log once and print."""
    found = token_shares(
        arguments.run_folder,
        until=arguments.until,
        top=arguments.top,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        print_json(found)
    else:
        _print_tables(found)


def token_shares(
    run_folder: Path,
    *,
    until: int | None = None,
    top: int = 20,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Shares of ``sum |A| |v|`` over the rollouts of a run (``trainer.credit.token_share``):
    ``classes`` and ``tokens``.

    Memory: the columns that are needed, of all rollouts.

    Raises:
        RelexkitError: nothing was measured, or no rollout is that early.
    """
    import pyarrow.compute as pc

    from relexkit.trainer.config import load_config
    from relexkit.trainer.credit.token_share import (
        TokenClasses,
        class_shares,
        largest_tokens,
        token_masses,
    )
    from relexkit.trainer.loop.rollout_log import read_rollouts
    from relexkit.trainer.policy.setup import load_tokenizer

    names = ["step", "completion_ids", "advantage", "token_norms", "token_weights"]
    table = read_rollouts(run_folder / "rollouts", columns=names)
    if until is not None:
        table = table.filter(pc.less_equal(table.column("step"), until))
    if not len(table):
        raise RelexkitError(
            f"{run_folder}: no rollouts up to step {until}; expected a later --until"
        )
    if table.column("token_norms").null_count:
        raise RelexkitError(
            f"{run_folder}: rollouts without token norms; train with token_shares: true to have"
            " them"
        )
    final = run_folder / "final"
    tokenizer = load_tokenizer(
        str(final) if final.is_dir() else load_config(run_folder / "config.yaml").model,
        trust_remote_code=trust_remote_code,
    )
    classes = TokenClasses(tokenizer)
    column = {name: table.column(name).to_pylist() for name in names}
    weighted = not table.column("token_weights").null_count
    masses = token_masses(
        column["completion_ids"],
        column["advantage"],
        column["token_norms"],
        column["token_weights"] if weighted else None,
    )
    return {
        "rollouts": len(table),
        "weighted": weighted,
        "classes": class_shares(masses, classes),
        "classes_weighted": class_shares(masses, classes, weighted=True) if weighted else None,
        "tokens": [
            {
                "id": token,
                "text": classes.text(token),
                "class": classes[token],
                "share": share,
                "share_weighted": with_weights if weighted else None,
            }
            for token, share, with_weights in largest_tokens(masses, top)
        ],
    }


def _print_tables(found: dict[str, Any]) -> None:
    from rich.table import Table

    headings = ("share", "with coefficients") if found["weighted"] else ("share",)
    for title, first in (
        (f"Share of the update, {found['rollouts']} rollouts", "class"),
        ("Largest tokens", "token"),
    ):
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, header_style="bold"
        )
        table.add_column(first)
        for heading in headings:
            table.add_column(heading, justify="right")
        if first == "class":
            for name, share in found["classes"].items():
                more = [percent(found["classes_weighted"][name])] if found["weighted"] else []
                table.add_row("on both sides" if name == "shared" else name, percent(share), *more)
        else:
            for token in found["tokens"]:
                more = [percent(token["share_weighted"])] if found["weighted"] else []
                table.add_row(
                    f"{token['text']!r} ({token['class']})", percent(token["share"]), *more
                )
        print_table(table)
