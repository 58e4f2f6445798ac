"""``relexkit checkout``: a recorded step as a checkpoint."""

from __future__ import annotations

import argparse

from relexkit.commands.console import print_json, progress_bar, show
from relexkit.commands.sync import add_sync, read_sync


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``relexkit checkout``."""
    parser.add_argument("store", metavar="RUN.zarr")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("-o", "--out", required=True, metavar="DIR")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="from a store of PEFT adapters: the adapter, not merged weights",
    )
    add_sync(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on standard output"
    )


def run(parsed: argparse.Namespace) -> None:
    """Write the folder."""
    from relexkit.materialize import checkout
    from relexkit.materialize.adapters import checkout_adapter
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(parsed.store)
    sync = read_sync(parsed)
    with progress_bar() as progress:
        if parsed.adapter:
            folder = checkout_adapter(store, parsed.step, parsed.out)
        else:
            folder = checkout(store, parsed.step, parsed.out, sync=sync, progress=progress)
    exact = (store.exact and (parsed.adapter or not store.has_factors)) or parsed.step == 0
    if parsed.json:
        print_json({"step": parsed.step, "folder": str(folder), "exact": exact})
    else:
        kept = "bit for bit" if exact else f"to {store.mantissa_bits} mantissa bits of the delta"
        if store.has_factors and parsed.step and not parsed.adapter:
            kept = "merged; --adapter writes the adapter itself"
        show(f"step {parsed.step}: {folder} ({kept})")
