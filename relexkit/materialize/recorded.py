"""A recorded step back into a checkpoint folder, bit for bit where the store is exact."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from relexkit.gram_matrix.compute.distributed import ALONE, Team
from relexkit.materialize.folders import FolderJob, PendingFolders, is_finished
from relexkit.materialize.versions import WeightSync, write_versions
from relexkit.store import ProgressCallback, TrajectoryStore
from relexkit.store.encodings.bits import content_checksum
from relexkit.version import __version__
from relexkit.weights.layout import Segment


def checkout(
    store: TrajectoryStore,
    step: int,
    out: str | Path,
    *,
    sync: WeightSync | None = None,
    team: Team = ALONE,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write a recorded step as a checkpoint folder ``out``: bit for bit if the store is exact.
    Returns the folder.

    With ``sync`` it is written as a version ``out/weight_v{N}`` that an inference engine pulls.

    Every process of ``team`` makes this call: each writes shards of its own, the first one the
    rest, and versions alone.

    Step 0 is the base. Float deltas give the weights to the store's mantissa bits, in the recorded
    dtype. From a store of adapters these are the merged weights, rounded stochastically (seed 0)
    where the base is less precise than the adapter.

    Raises:
        StoreError: the step is not recorded, or a chunk is damaged.
        RelexkitError: something else is at ``out``.
    """
    row = -1 if step == 0 else store.row_of(step)
    if sync is not None:

        def make(scratch: Path) -> list[Path]:
            return [checkout(store, step, scratch / f"step-{step}", progress=progress)]

        checkout_alone = partial(checkout, store)
        return team.share(lambda: write_versions(sync, Path(out), checkout_alone, make)[0].folder)
    content = f"{content_checksum(store.checksums()[row].tolist()):08x}" if row >= 0 else "base"
    exact = (
        "bit for bit"
        if store.exact or step == 0
        else f"to {store.mantissa_bits} mantissa bits of the delta"
    )
    provenance = {
        "relexkit": __version__,
        "kind": "recorded",
        "step": step,
        "exact": exact,
        "content": content,
        "base": store.attributes["base"],
        "source": store.attributes["source"],
    }
    folder = Path(out)
    with team.together():
        if team.share(lambda: is_finished(folder, provenance)):
            return folder
        with PendingFolders(store, [FolderJob(folder, provenance, None)], None, team) as folders:
            for segment, bits in recorded_bits(store, step, progress, folders.needed):
                folders.write(0, segment, bits)
            folders.write_fixed()
    return folder


def recorded_bits(
    store: TrajectoryStore,
    step: int,
    progress: ProgressCallback | None = None,
    only: Collection[str] | None = None,
) -> Iterator[tuple[Segment, np.ndarray]]:
    """Pieces of the float tensors at a recorded step, 0 for the base, with their bits in the
    recorded dtype; of those named ``only``, or all. One pass over the step's part of the store.

    Raises:
        StoreError: the step is not recorded, or a chunk is damaged.
    """
    row = -1 if step == 0 else store.row_of(step)
    for part, spec in enumerate(store.layout.parts):
        for begin, end in store.windows(part) if spec.moves else ():
            segments = store.layout.segments_in(part, begin, end)
            wanted = [s for s in segments if only is None or s.tensor.name in only]
            if wanted:
                state = store.read_state(part, row, begin, end)
            for segment in wanted:
                low = segment.offset - begin
                yield segment, state[low : low + segment.numel]
            if progress:
                progress("writing", end, spec.numel)
