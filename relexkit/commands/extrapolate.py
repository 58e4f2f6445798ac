"""``relexkit extrapolate``: the predicted checkpoints of future steps."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace

from relexkit.commands.console import print_json
from relexkit.commands.observer import add_pca, observer
from relexkit.commands.options import add_fields, given
from relexkit.errors import RelexkitError

PREDICTION = ("until", "method", "scope", "scale")
OUTPUT = ("dtype", "rounding", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit extrapolate``."""
    from relexkit.materialize import Output
    from relexkit.predict.extrapolators import METHODS
    from relexkit.predict.fits import Options
    from relexkit.predict.prediction import Prediction

    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument(
        "--to", type=_step, nargs="+", required=True, metavar="STEP", help="target steps"
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="folder for OUT/step-STEP/"
    )
    add_fields(parser, Prediction, PREDICTION)
    add_fields(parser, Options, [field.name for field in fields(Options)])
    add_fields(parser, Output, OUTPUT)
    parser.add_argument(
        "--adapter",
        type=_rank,
        nargs="?",
        const=0,
        metavar="RANK",
        help="from a store of PEFT adapters: write an adapter, of this rank or one that fits",
    )
    add_pca(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )
    parser.epilog = "methods: " + "; ".join(f"{name}, {m.about}" for name, m in METHODS.items())


def run(parsed: argparse.Namespace) -> None:
    """Write a folder for each target."""
    from relexkit.materialize import Output, extrapolate
    from relexkit.predict.extrapolators import step_text
    from relexkit.predict.fits import Options
    from relexkit.predict.prediction import Prediction
    from relexkit.store import TrajectoryStore

    options = given(parsed, Options, [field.name for field in fields(Options)])
    prediction = replace(given(parsed, Prediction, PREDICTION), options=options)
    output = replace(given(parsed, Output, OUTPUT), adapter=parsed.adapter)
    store = TrajectoryStore(parsed.store)
    with observer(parsed) as observed:
        compute = observed.decided(store, prediction.until)
        written = extrapolate(
            store, parsed.to, parsed.out, prediction, output=output, compute=compute
        )
    if observed.silent:
        return
    if parsed.json:
        print_json(
            [
                {k: v for k, v in asdict(w).items() if v is not None} | {"folder": str(w.folder)}
                for w in written
            ]
        )
        return
    for w in written:
        rank = "" if w.rank is None else f", rank {w.rank}, relative error {w.error:.1e}"
        there = " (was there already)" if w.already else ""
        print(f"step {step_text(w.target)}: {w.folder}{rank}{there}")


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
