"""Stores of explicit deltas, without checkpoints: what the tests of the linear algebra put in is
what a pass reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relexkit import TrajectoryStore
from relexkit.store import About, StoreWriter, build_layout, create_store
from relexkit.store.encodings.bits import block_checksums, content_checksum


def store_of(
    path: Path,
    deltas: Mapping[str, np.ndarray],
    steps: np.ndarray,
    part_numel: int = 2**25,
    metrics: Mapping[str, np.ndarray] | None = None,
) -> TrajectoryStore:
    """A float32 store of ``deltas`` (name -> ``[T, D]``, rounded to float32) at ``steps``, about a
    base of zeros.

    ``metrics``: name -> ``[T]``, NaN where nothing is logged.
    """
    specs = [(name, (delta.shape[1],), "float32") for name, delta in deltas.items()]
    layout = build_layout(specs, {"float32": "float"}, part_numel={"float": part_numel})
    create_store(
        path,
        layout,
        lambda part, begin, end: np.zeros(end - begin, np.uint32),
        About(source="test", base="zeros", mantissa_bits=23),
    )
    with StoreWriter(path) as writer:
        for row, step in enumerate(steps):
            writer.begin(int(step))
            for part, spec in enumerate(layout.parts):
                values = np.zeros(spec.numel, np.float32)
                for segment in layout.segments_in(part):
                    piece = deltas[segment.tensor.name][
                        row, segment.start : segment.start + segment.numel
                    ]
                    values[segment.offset : segment.offset + segment.numel] = piece
                writer.write_row(part, values, content_checksum(block_checksums(values)))
            logged = {name: float(values[row]) for name, values in (metrics or {}).items()}
            writer.commit({name: value for name, value in logged.items() if np.isfinite(value)})
    return TrajectoryStore(path)


def as_stored(delta: np.ndarray) -> np.ndarray:
    """What a store of 23 mantissa bits keeps: float32, as float64."""
    return delta.astype(np.float32).astype(np.float64)
