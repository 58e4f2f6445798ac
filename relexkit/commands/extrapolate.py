"""``relexkit extrapolate``: the predicted checkpoints of future steps."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from relexkit.commands.console import print_json, progress_bar
from relexkit.commands.observer import add_pca, observer
from relexkit.commands.round import add_rounding
from relexkit.errors import RelexkitError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit extrapolate``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--to", type=_step, nargs="+", required=True, metavar="STEP", help="target steps"
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="folder for OUT/step-STEP/"
    )
    parser.add_argument("--until", type=int, metavar="T_CUT", help="use only steps up to this one")
    parser.add_argument(
        "--method",
        default="relex",
        help=(
            "relex, reconstruct, least-squares, least-squares-origin, "
            "two-point, first-update, hold, average, model or drift (default: relex)"
        ),
    )
    parser.add_argument(
        "--rank", type=int, default=1, help="principal directions to keep (default: 1)"
    )
    parser.add_argument("--fit", choices=("linear", "polynomial", "sinusoid"), default="linear")
    parser.add_argument("--degree", type=int, default=2, help="of the polynomial (default: 2)")
    parser.add_argument(
        "--window", type=int, metavar="W", help="use only the last W recorded steps"
    )
    parser.add_argument(
        "--refit-every",
        type=int,
        metavar="F",
        help="autoregressive: refit after every F predicted steps",
    )
    parser.add_argument(
        "--axis",
        choices=("step", "row"),
        default="step",
        help="fit against step numbers, or row numbers as the released RELEX scripts do",
    )
    parser.add_argument(
        "--anchor",
        type=int,
        metavar="STEP",
        help="two-point: the earlier point (default: the base)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="first-update: multiple of the first delta (default: target / first step)",
    )
    parser.add_argument(
        "--scope",
        choices=("tensor", "layer", "module", "global"),
        help="what shares one fit (default: tensor; model and drift: global)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply the predicted displacement (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the output (default: as recorded)",
    )
    parser.add_argument(
        "--adapter",
        type=_rank,
        nargs="?",
        const=0,
        metavar="RANK",
        help="from a store of PEFT adapters: write an adapter, of this rank or one that fits",
    )
    add_rounding(parser)
    add_pca(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def run(parsed: argparse.Namespace) -> None:
    """Write a folder for each target."""
    from relexkit.materialize import extrapolate
    from relexkit.materialize.adapters import extrapolate_adapter
    from relexkit.predict.extrapolators import step_text
    from relexkit.predict.fits import Options
    from relexkit.store import TrajectoryStore

    options = Options(
        rank=parsed.rank,
        fit=parsed.fit,
        degree=parsed.degree,
        window=parsed.window,
        refit_every=parsed.refit_every,
        axis=parsed.axis,
        anchor=parsed.anchor,
        alpha=parsed.alpha,
    )
    store = TrajectoryStore(parsed.store)
    if parsed.adapter is not None:
        with progress_bar() as progress:
            adapters = extrapolate_adapter(
                store,
                parsed.to,
                parsed.out,
                rank=parsed.adapter or None,
                until=parsed.until,
                method=parsed.method,
                options=options,
                scope=parsed.scope,
                scale=parsed.scale,
                progress=progress,
            )
        if parsed.json:
            print_json([asdict(a) | {"folder": str(a.folder)} for a in adapters])
            return
        for a in adapters:
            there = " (was there already)" if a.already else ""
            print(
                f"step {step_text(a.target)}: {a.folder}, rank {a.rank}, relative error"
                f" {a.error:.1e}{there}"
            )
        return
    with observer(parsed) as observed:
        written = extrapolate(
            store,
            parsed.to,
            parsed.out,
            until=parsed.until,
            method=parsed.method,
            options=options,
            scope=parsed.scope,
            scale=parsed.scale,
            dtype=parsed.dtype,
            rounding=parsed.rounding,
            seed=parsed.seed,
            progress=observed.progress,
            **observed.arguments(store, parsed.until),
        )
    if observed.silent:
        return
    if parsed.json:
        print_json(
            [{"target": p.target, "folder": str(p.folder), "already": p.already} for p in written]
        )
        return
    for p in written:
        print(
            f"step {step_text(p.target)}: {p.folder}"
            + (" (was there already)" if p.already else "")
        )


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise RelexkitError(
            f"--adapter {text!r} is not a rank; expected a whole number from 1 upwards, or nothing"
        )
    return int(text)


def _step(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RelexkitError(
            f"--to {text!r} is not a number; expected an optimizer step such as 500"
        ) from None
