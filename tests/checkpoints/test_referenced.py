"""What a store keeps of a base whose tensors have other names, or lie inside others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from runs import raw_bits, write_checkpoint

from relexkit import TrajectoryStore
from relexkit.checkpoints import open_checkpoint
from relexkit.checkpoints.model_names import OnDisk, Place
from relexkit.checkpoints.referenced import reference_to
from relexkit.checkpoints.view import CheckpointView
from relexkit.ingest.columns import base_reader
from relexkit.store import About, Reference, build_layout, create_store


def test_a_view_of_a_view_is_traced_to_the_folder(tmp_path: Path) -> None:
    """Two experts fused in one tensor, under a prefix that the steps do not have."""
    fused = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4)
    norm = torch.full((5,), 2.0, dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "base", {"model.experts": fused, "norm": norm})
    opened = open_checkpoint(tmp_path / "base")
    bare = CheckpointView(opened, stored={"experts": "model.experts", "norm": "norm"})
    places = {f"experts.{e}": Place("experts", 12 * e, (3, 4)) for e in range(2)}
    base = CheckpointView(
        OnDisk(bare, places), stored={"norm": "norm", "e0": "experts.0", "e1": "experts.1"}
    )
    reference = reference_to(opened, str(tmp_path / "base"), base)
    expected = {"e0": ("model.experts", 0), "e1": ("model.experts", 12)}
    assert reference == Reference(place=str(tmp_path / "base"), tensors=expected)

    order = [(name, info.shape, info.dtype) for name, info in base.tensors.items()]
    layout = build_layout(order, {"bfloat16": "sparse"})
    about = About(source="test", base="base", reference=reference)
    create_store(tmp_path / "s.zarr", layout, base_reader(base, layout), about)
    opened.close()
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert store.reference == reference
    np.testing.assert_array_equal(
        store.read_base(0, 0, 29), np.concatenate([raw_bits(norm), raw_bits(fused)])
    )
    store.verify()
