"""Trajectory stores made on the fly, without checkpoints: any number of parameters and steps, in
flat memory.

The deltas of a tensor are a few smooth paths along random directions, a walk and white noise,
rounded to 10 mantissa bits (float rows); or, for the sparse log, a bfloat16 base of which a share
of the weights moves by a unit at each step.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from relexkit import TrajectoryStore
from relexkit.store import About, StoreWriter, blocks, build_layout, create_store
from relexkit.store.encodings.bits import block_checksums, content_checksum
from relexkit.weights.dtypes import round_to_mantissa_bits

_CUT = 2**18


def make_store(
    path: Path,
    num_parameters: int,
    num_steps: int,
    *,
    dtype: str = "float32",
    largest: int = 2**24,
    density: float = 0.005,
    seed: int = 0,
) -> TrajectoryStore:
    """Write a store of tensors of at most ``largest`` elements; returns it. Memory: one part and
    one row of it.
    """
    store = base_store(path, num_parameters, dtype=dtype, largest=largest, seed=seed)
    layout, sparse = store.layout, dtype != "float32"
    with StoreWriter(path) as writer:
        parts = enumerate(layout.parts) if sparse else ()
        states = {p: store.read_base(p, 0, part.numel) for p, part in parts}
        for step in range(1, num_steps + 1):
            writer.begin(step)
            for part, spec in enumerate(layout.parts):
                if sparse:
                    columns, differences = sparse_step(seed, part, spec.numel, step, density)
                    states[part][columns] += differences.view(np.uint16)
                    writer.write_sparse(part, columns, differences, _checksum(states[part]))
                else:
                    row = float_row(seed, part, spec.numel, step, num_steps)
                    writer.write_row(part, row, _checksum(row))
            writer.commit()
    return TrajectoryStore(path)


def base_store(
    path: Path,
    num_parameters: int,
    *,
    dtype: str = "float32",
    largest: int = 2**24,
    seed: int = 0,
) -> TrajectoryStore:
    """A store like that of ``make_store`` without steps."""
    shutil.rmtree(path, ignore_errors=True)
    sizes = [min(largest, num_parameters - begin) for begin in range(0, num_parameters, largest)]
    encoding = "float" if dtype == "float32" else "sparse"
    names = [
        (f"model.layers.{i}.mlp.up_proj.weight", (size,), dtype) for i, size in enumerate(sizes)
    ]
    layout = build_layout(names, {dtype: encoding})
    scale = {"float32": np.uint32, "bfloat16": np.uint16}[dtype]

    def base(part: int, begin: int, end: int) -> np.ndarray:
        cuts = [_base_bits(seed, part, cut) for cut in range(begin // _CUT, -(-end // _CUT))]
        offset = begin - begin // _CUT * _CUT
        return np.concatenate(cuts)[offset : offset + end - begin].astype(scale)

    create_store(
        path,
        layout,
        base,
        About(source="made up", base="made up", mantissa_bits=10),
    )
    return TrajectoryStore(path)


def _checksum(values: np.ndarray) -> int:
    return content_checksum(
        [c for begin, end in blocks(len(values)) for c in block_checksums(values[begin:end])]
    )


def _base_bits(seed: int, part: int, cut: int) -> np.ndarray:
    return np.random.default_rng([seed, part, cut, 0]).integers(
        0x3C00, 0x3D00, _CUT, dtype=np.uint16
    )


def float_row(seed: int, part: int, numel: int, step: int, num_steps: int) -> np.ndarray:
    """The delta of a step, float32 ``[numel]``: two fixed directions with smooth coefficients, and
    noise of the step's own.

    Normal numbers come from one table read at places that depend on seed, part, stretch and step:
    drawing them afresh would take longer than everything that is measured.
    """
    row = np.empty(numel, np.float32)
    time = np.float32(step / num_steps)
    for cut, begin in enumerate(range(0, numel, _CUT)):
        width = min(_CUT, numel - begin)
        line, bend, noise = (_normal(seed, part, cut, kind, width) for kind in (0, 1, 2 + step))
        row[begin : begin + width] = (
            time * line + np.float32(0.4) * np.sin(3 * time) * bend + np.float32(0.2) * noise
        ) * _SCALE
    return round_to_mantissa_bits(row, 10)


_SCALE = np.float32(1e-4)
_TABLE = np.random.default_rng(0).standard_normal(2**23, np.float32)


def _normal(*place: int) -> np.ndarray:
    """A stretch of the table; ``place`` ends with its length."""
    begin = int(np.random.default_rng(place[:-1]).integers(0, len(_TABLE) - place[-1]))
    return _TABLE[begin : begin + place[-1]]


def sparse_step(
    seed: int, part: int, numel: int, step: int, density: float
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and differences of bits of a step. Weights that hover at a rounding boundary move
    most, as in real runs: every column has a rate of its own.
    """
    random = np.random.default_rng([seed, part, step])
    restless = np.random.default_rng([seed, part]).integers(
        0, numel, max(1, int(10 * density * numel))
    )
    columns = np.unique(random.choice(restless, max(1, int(density * numel)), replace=False))
    return columns.astype(np.int32), random.choice(np.array([-1, 1], np.int16), len(columns))
