"""``relexkit info``: what is inside a store, or which checkpoints a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from relexkit.commands.console import print_json, print_pairs, size_text
from relexkit.options import OfStore

if TYPE_CHECKING:
    from relexkit.store import TrajectoryStore


Options = OfStore


def run(options: Options) -> None:
    """Print what is there."""
    from relexkit.store import NotAStoreError, TrajectoryStore

    try:
        if options.store.startswith("hf://"):
            raise NotAStoreError("a hub repository")
        store = TrajectoryStore(options.store)
    except NotAStoreError:
        if not Path(options.store).is_dir() and "://" not in options.store:
            raise
        from relexkit.commands.info_source import print_source

        print_source(options.store, options.json)
        return
    print_info(store, options.json)


def print_info(store: TrajectoryStore, as_json: bool) -> None:
    """What a store holds."""
    from relexkit.gram_matrix.jumps import attempts, described
    from relexkit.store import describe_steps
    from relexkit.store.summary import summary

    decided = attempts(store)
    document = summary(store) | {"jumps": [attempt.document() for attempt in decided]}
    sizes, checkpoint_bytes = document["bytes"], document["checkpoint_bytes"]
    if as_json:
        print_json(document)
        return
    kept = "bit for bit" if store.exact else f"float deltas, {store.mantissa_bits} mantissa bits"
    log = sizes.get("updates", 0) + sizes.get("deltas", 0) + sizes.get("factors", 0)
    whole = checkpoint_bytes * max(1, len(store.steps))
    merged = "merged " if store.has_factors else ""
    base_text = f"base {size_text(sizes.get('base', 0))}"
    if store.reference is not None:
        base_text = f"base by reference, {size_text(document['base_bytes'])} not held"
    rows = [
        ("steps", describe_steps(store.steps)),
        ("parameters", f"{store.layout.num_parameters:,} in {len(store.layout.tensors)} tensors"),
        (
            "recorded as",
            (
                f"{', '.join(document['dtypes'])}, {' and '.join(document['encodings'])} encoding"
                f" ({kept})"
            ),
        ),
        ("source", f"{store.attributes['source']}; base {store.attributes['base']['description']}"),
        (
            "on disk",
            f"{size_text(sum(sizes.values()))}: steps {size_text(log)}, {base_text}",
        ),
        (
            "instead of",
            (
                f"{size_text(whole)} of {merged}checkpoints (the steps take"
                f" 1/{max(1, round(whole / max(1, log)))} of them)"
            ),
        ),
    ]
    if store.reference is not None:
        rows.append(("base", f"read from {store.reference.place}, checked by its checksums"))
    if document["tied"]:
        rows.append(("tied", ", ".join(f"{a} = {b}" for a, b in document["tied"].items())))
    if document["metrics"]:
        rows.append(("metrics", ", ".join(document["metrics"])))
    if decided:
        rows.append(("jumps", described(decided)))
    if document["files"]:
        held = ", ".join(f"{n} ({size_text(b)})" for n, b in document["files"].items())
        rows.append(("files", held))
    print_pairs(store.path, rows)
