"""What exact and randomized passes have in common: over the parts of a store, shared among
processes, added up by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from relexkit.errors import StoreError
from relexkit.gram_matrix.compute.device import Engine
from relexkit.gram_matrix.compute.distributed import Team
from relexkit.gram_matrix.onepass import Pass, Sums, Tick
from relexkit.store import TrajectoryStore


def moving_parts(store: TrajectoryStore) -> list[int]:
    """Parts that have deltas.

    Raises:
        StoreError: no step is recorded.
    """
    if not len(store.steps):
        raise StoreError(f"{store.path}: holds no steps; import or record some first")
    return [p for p, part in enumerate(store.layout.parts) if part.moves and part.numel]


@dataclass(frozen=True)
class Work:
    """What the passes over all parts of a store share."""

    store: TrajectoryStore
    engine: Engine
    team: Team
    budget: int


def run_shared(work: Work, part: int, kernel: Any, num_rows: int, old: int, tick: Tick) -> Sums:
    """One pass over a part, its columns divided among the processes; every process gets the
    sums.
    """
    one = Pass(
        store=work.store,
        part=part,
        kernel=kernel,
        num_rows=num_rows,
        old=old,
        spans=work.team.spans(work.store.layout.parts[part].numel)[0],
        budget=work.budget,
        engine=work.engine,
        tick=tick,
    )
    with work.team.together():
        sums = one.run()
    return added_up(work.team, sums)


def added_up(team: Team, sums: Sums) -> Sums:
    """The sums of all processes, in every one."""
    return Sums([team.sum(product) for product in sums.products], team.sum(sums.counts))


def assemble(
    store: TrajectoryStore, arrays: dict[int, list[np.ndarray]], counts: dict[int, np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Arrays ``[S, ...]`` and counts ``[S, 3, T]`` of parts -> summed over parts, ``[N, ...]`` and
    ``[3, N, T]``.
    """
    tensors = store.layout.moving_tensors
    row_of = {tensor.name: row for row, tensor in enumerate(tensors)}
    some, num_steps = next(iter(arrays.values())), next(iter(counts.values())).shape[2]
    totals = [np.zeros((len(tensors), *array.shape[1:])) for array in some]
    total_counts = np.zeros((3, len(tensors), num_steps), np.int64)
    for part, part_arrays in arrays.items():
        rows = [row_of[s.tensor.name] for s in store.layout.segments_in(part)]
        for total, array in zip(totals, part_arrays, strict=True):
            total[rows] += array  # a tensor has at most one segment in a part
        total_counts[:, rows] += counts[part].transpose(1, 0, 2)
    dense = [row for row, t in enumerate(tensors) if not store.encoding(t.part).is_log]
    total_counts[2, dense] = -1
    return totals, total_counts
