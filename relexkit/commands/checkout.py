"""``relexkit checkout``: a recorded step as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from relexkit.commands.console import print_json, show
from relexkit.commands.observer import working_together
from relexkit.commands.sync import Sync
from relexkit.options import OfStore, group, option


@dataclass(frozen=True, kw_only=True)
class Options(OfStore):
    """Options of ``relexkit checkout``."""

    step: int = option(metavar="STEP")
    """the recorded step, or 0 for the base"""
    out: str = option("-o", "--out", metavar="DIR")
    """the folder to write"""
    adapter: bool = False
    """from a store of PEFT adapters: the adapter, not merged weights"""
    sync: Sync = group(Sync)


def run(options: Options) -> None:
    """Write the folder."""
    from relexkit.materialize import checkout
    from relexkit.materialize.adapters import checkout_adapter
    from relexkit.store import TrajectoryStore

    store = TrajectoryStore(options.store)
    sync = options.sync.chosen(adapter=options.adapter)
    with working_together() as (team, progress):
        if options.adapter:
            folder = team.share(lambda: checkout_adapter(store, options.step, options.out))
        else:
            folder = checkout(
                store, options.step, options.out, sync=sync, team=team, progress=progress
            )
    if team.rank:
        return
    exact = (store.exact and (options.adapter or not store.has_factors)) or options.step == 0
    if options.json:
        print_json({"step": options.step, "folder": str(folder), "exact": exact})
    else:
        kept = "bit for bit" if exact else f"to {store.mantissa_bits} mantissa bits of the delta"
        if store.has_factors and options.step and not options.adapter:
            kept = "merged; --adapter writes the adapter itself"
        show(f"step {options.step}: {folder} ({kept})")
