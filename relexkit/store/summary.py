"""What a store holds, in numbers and words."""

from __future__ import annotations

from typing import Any

from relexkit.store.reader import TrajectoryStore
from relexkit.weights.dtypes import bits_dtype


def summary(store: TrajectoryStore) -> dict[str, Any]:
    """What ``relexkit info --json`` prints; ``bytes`` by top-level group, ``checkpoint_bytes`` of
    one recorded step as a checkpoint, ``base_bytes`` of the base, ``base_reference`` where it is if
    the store does not hold it.
    """
    reference = store.reference
    moving = [part for part in store.layout.parts if part.moves]
    checkpoint_bytes = sum(part.numel * bits_dtype(part.dtype).itemsize for part in moving)
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
        "base_reference": None if reference is None else reference.place,
        "base_bytes": sum(p.numel * bits_dtype(p.dtype).itemsize for p in store.layout.parts),
        "metrics": sorted(store.metric_names()),
        "files": {name: len(content) for name, content in sorted(store.files().items())},
        "bytes": store.num_bytes(),
        "checkpoint_bytes": checkpoint_bytes,
        "relexkit_version": store.attributes["relexkit_version"],
    }
