"""The ``relexkit tokens`` command: the share of each class of tokens, and of single tokens, in the
update of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relexkit import RelexkitError, Table
from relexkit.extension import percent, print_json, print_table
from relexkit.options import Json, option
from relexkit.trainer.policy.loading import Trust


@dataclass(frozen=True, kw_only=True)
class Options(Json, Trust):
    """Options of ``relexkit tokens``."""

    run_folder: Path = option("run_folder", metavar="RUN")
    """folder of a run that was trained with token_shares: true"""
    until: int | None = option(default=None, metavar="STEP")
    """only rollouts of the steps up to this one"""
    top: int = 20
    """tokens with the largest shares"""


def answer(options: Options) -> Table:
    """The shares of tokens; the document has those of their classes too."""
    shares = token_shares(
        options.run_folder,
        until=options.until,
        top=options.top,
        trust_remote_code=options.trust_remote_code,
    )
    return Table(shares, shares["tokens"])


def run(options: Options) -> None:
    """Read the log once and print."""
    shares = answer(options).document
    if options.json:
        print_json(shares)
    else:
        print_shares(shares)


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


def print_shares(shares: dict[str, Any]) -> None:
    """Shares of the classes, and of the largest tokens."""
    from rich.table import Table

    headings = ("share", "with coefficients") if shares["weighted"] else ("share",)
    for title, first in (
        (f"Share of the update, {shares['rollouts']} rollouts", "class"),
        ("Largest tokens", "token"),
    ):
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, header_style="bold"
        )
        table.add_column(first)
        for heading in headings:
            table.add_column(heading, justify="right")
        if first == "class":
            for name, share in shares["classes"].items():
                more = [percent(shares["classes_weighted"][name])] if shares["weighted"] else []
                table.add_row("on both sides" if name == "shared" else name, percent(share), *more)
        else:
            for token in shares["tokens"]:
                more = [percent(token["share_weighted"])] if shares["weighted"] else []
                table.add_row(
                    f"{token['text']!r} ({token['class']})", percent(token["share"]), *more
                )
        print_table(table)
