"""What a store holds, in numbers and words."""

from __future__ import annotations

from typing import Any

from relexkit.store.reader import TrajectoryStore


def summary(store: TrajectoryStore) -> dict[str, Any]:
    """What ``relexkit info --json`` prints; ``bytes`` by top-level group, ``checkpoint_bytes`` of
    one recorded step as a checkpoint.
    """
    moving = [part for part in store.layout.parts if part.moves]
    bits = {"float32": 4}
    checkpoint_bytes = sum(part.numel * bits.get(part.dtype, 2) for part in moving)
    return {
        "path": store.path,
        "format_version": store.attributes["format_version"],
        "steps": [int(s) for s in store.steps],
        "num_parameters": store.layout.num_parameters,
        "num_tensors": len(store.layout.tensors),
        "tied": {t.name: t.tied_to for t in store.layout.tensors if t.tied_to},
        "dtypes": sorted({part.dtype for part in moving}),
        "encodings": sorted({part.encoding for part in moving}),
        "mantissa_bits": store.mantissa_bits,
        "exact": store.exact,
        "source": store.attributes["source"],
        "base": store.attributes["base"],
        "metrics": sorted(store.metric_names()),
        "files": {name: len(content) for name, content in sorted(store.files().items())},
        "bytes": store.num_bytes(),
        "checkpoint_bytes": checkpoint_bytes,
        "relexkit_version": store.attributes["relexkit_version"],
    }
