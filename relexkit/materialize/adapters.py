"""A store of adapters back into adapters: a recorded one bit for bit, a predicted one at a rank
that holds the prediction.

A prediction is a weighted sum of products, whose rank can be as large as the sum of the ranks;
extrapolating ``A`` and ``B`` themselves would be something else. Its best approximation at one rank
comes from the singular values of the sum, without its dense form, and the error that is left is
stated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints.formats.peft import PREFIX, WEIGHTS
from relexkit.checkpoints.formats.peft_config import CONFIG
from relexkit.errors import RelexkitError, StoreError
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.gram_matrix.factors import compress, singular_values, stacked_sum
from relexkit.materialize.folders import PROVENANCE, is_finished, temporary_folder
from relexkit.materialize.output import Written
from relexkit.materialize.planning import plan
from relexkit.materialize.sums import stream_sums
from relexkit.predict.extrapolators import step_text
from relexkit.predict.prediction import Prediction
from relexkit.store import TrajectoryStore, blocks
from relexkit.store.encodings.bits import BLOCK, content_checksum
from relexkit.weights.layout import Factors, TensorSpec
from relexkit.weights.safetensors_io import SafetensorsFolderWriter, TensorInfo

LARGEST_ERROR = 1e-3
"""Relative error of the whole delta that a rank chosen by itself may leave."""


def checkout_adapter(store: TrajectoryStore, step: int, out: str | Path) -> Path:
    """Write the adapter of a recorded step as a PEFT folder: factors bit for bit, whole tensors as
    precisely as they are kept.

    Whole tensors that no recorded step moved are the base's and left out. Memory: one tensor.

    Raises:
        StoreError: the store holds no adapters, the step is not recorded, or a chunk is damaged.
        RelexkitError: something else is at ``out``.
    """
    _refuse_without_factors(store)
    row = store.row_of(step)
    provenance = {
        "relexkit": store.attributes["relexkit_version"],
        "kind": "recorded adapter",
        "step": step,
        "content": f"{content_checksum(store.checksums()[row].tolist()):08x}",
        "base": store.attributes["base"],
        "source": store.attributes["source"],
    }
    folder = Path(out)
    if is_finished(folder, provenance):
        return folder
    adapted, whole = _adapted(store), _whole_tensors(store)
    tensors = {_whole_key(t.name, store): TensorInfo(t.shape, t.dtype) for t in whole}
    for tensor, spec in adapted:
        tensors |= {
            key: TensorInfo(shape, spec.dtype)
            for key, shape in zip(*_stored_as(tensor, spec), strict=True)
        }

    def write(writer: SafetensorsFolderWriter) -> None:
        for tensor, spec in adapted:
            bits = store.read_factor_bits(tensor.part, row)
            cut = spec.rows * spec.rank
            left, right = (
                bits[:cut].reshape(spec.rows, spec.rank),
                bits[cut:].reshape(spec.rank, spec.columns),
            )
            _write_pair(writer, tensor, spec, left, right)
        for tensor in whole:
            for start, state in _recorded(store, tensor, row):
                writer.write(_whole_key(tensor.name, store), start, state)

    _write_folder(folder, tensors, write, store.files()[CONFIG], provenance)
    return folder


def extrapolate_adapter(
    store: TrajectoryStore,
    to: Sequence[float],
    out: str | Path,
    prediction: Prediction,
    rank: int,
    compute: Compute,
) -> list[Written]:
    """``extrapolate`` to adapters in float32, of ``rank`` in every target module; 0 for the
    smallest that leaves a relative error of at most ``LARGEST_ERROR``.

    Whole tensors (``modules_to_save``) are predicted as they are.
    """
    _refuse_without_factors(store)
    if rank < 0:
        raise RelexkitError(f"--adapter {rank} is not a rank; expected 1 or more, or 0 to choose")
    plans = plan(store, to, prediction, compute)
    written = []
    for planned in plans:
        folder = Path(out) / f"step-{step_text(planned.target)}"
        chosen, error = _choose_rank(store, planned.weights, rank or None)
        provenance = {
            **planned.provenance,
            "kind": "extrapolated adapter",
            "adapter_rank": chosen,
            "adapter_error": float(f"{error:.3g}"),
        }
        already = is_finished(folder, provenance)
        if not already:
            budget = compute.memory_budget_bytes
            _write_predicted(store, folder, planned.weights, chosen, provenance, budget)
        written.append(Written(planned.target, folder, already, chosen, error))
        if compute.progress:
            compute.progress("adapters", len(written), len(to))
    return written


def _choose_rank(
    store: TrajectoryStore, weights: np.ndarray, rank: int | None
) -> tuple[int, float]:
    """The wanted rank, or the smallest one whose error is small; and its relative error over all
    adapted tensors.
    """
    row_of = _rows(store)
    squares = [
        singular_values(*stacked_sum(store, tensor.part, weights[row_of[tensor.name]])) ** 2
        for tensor, _ in _adapted(store)
    ]
    most = max(len(s) for s in squares)
    total = sum(float(s.sum()) for s in squares)
    tails = np.array([sum(float(s[keep:].sum()) for s in squares) for keep in range(most + 1)])
    errors = np.sqrt(tails / total) if total else np.zeros(most + 1)
    if rank is None:
        rank = max(1, int(np.flatnonzero(errors <= LARGEST_ERROR)[0]))
    return rank, float(errors[min(rank, most)])


def _write_predicted(
    store: TrajectoryStore,
    folder: Path,
    weights: np.ndarray,
    rank: int,
    provenance: Mapping[str, Any],
    budget: int,
) -> None:
    adapted, whole, row_of = _adapted(store), _whole_tensors(store), _rows(store)
    specs = {
        t.name: Factors(
            rows=s.rows, columns=s.columns, rank=rank, scale=1.0, dtype="float32", kind=s.kind
        )
        for t, s in adapted
    }
    tensors = {_whole_key(t.name, store): TensorInfo(t.shape, "float32") for t in whole}
    for tensor, _ in adapted:
        keys, shapes = _stored_as(tensor, specs[tensor.name])
        tensors |= {
            key: TensorInfo(shape, "float32") for key, shape in zip(keys, shapes, strict=True)
        }

    def write(writer: SafetensorsFolderWriter) -> None:
        for tensor, _ in adapted:
            left, right = compress(
                *stacked_sum(store, tensor.part, weights[row_of[tensor.name]]), rank
            )
            padding = rank - left.shape[1]
            left, right = (
                np.pad(left, ((0, 0), (0, padding))),
                np.pad(right, ((0, padding), (0, 0))),
            )
            bits = [
                np.ascontiguousarray(factor, np.float32).view(np.uint32) for factor in (left, right)
            ]
            _write_pair(writer, tensor, specs[tensor.name], *bits)
        names = {t.name for t in whole}
        if names:
            stream_sums(
                store,
                weights[None],
                lambda _, segment, values: (
                    writer.write(
                        _whole_key(segment.tensor.name, store),
                        segment.start,
                        values.view(np.uint32),
                    )
                    if segment.tensor.name in names
                    else None
                ),
                budget,
                None,
            )

    config = json.loads(store.files()[CONFIG])
    config |= {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    config["init_lora_weights"] = True
    _write_folder(
        folder, tensors, write, (json.dumps(config, indent=2) + "\n").encode(), provenance
    )


def _refuse_without_factors(store: TrajectoryStore) -> None:
    if not store.has_factors:
        raise StoreError(
            f"{store.path}: holds whole checkpoints, no adapters; expected a store of PEFT adapters"
        )


def _rows(store: TrajectoryStore) -> dict[str, int]:
    return {tensor.name: row for row, tensor in enumerate(store.layout.moving_tensors)}


def _adapted(store: TrajectoryStore) -> list[tuple[TensorSpec, Factors]]:
    pairs = [(t, store.layout.parts[t.part].factors) for t in store.layout.moving_tensors]
    return [(tensor, spec) for tensor, spec in pairs if spec is not None]


def _whole_tensors(store: TrajectoryStore) -> list[TensorSpec]:
    """Tensors that the adapters hold whole: those that are not factors and that some step moved."""

    touched = {
        part
        for part, spec in enumerate(store.layout.parts)
        if spec.factors is None and store.encoding(part).touched(store, part)
    }
    return [
        t
        for t in store.layout.moving_tensors
        if any(s.part in touched for s in store.layout.segments_of(t))
    ]


def _whole_key(name: str, store: TrajectoryStore) -> str:
    """Name in the file of a whole tensor; PEFT puts the bias of an adapted module one level
    deeper.
    """
    module, _, end = name.rpartition(".")
    adapted = end == "bias" and any(t.name == f"{module}.weight" for t, _ in _adapted(store))
    return f"{PREFIX}{module}.base_layer.bias" if adapted else f"{PREFIX}{name}"


def _stored_as(tensor: TensorSpec, spec: Factors) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names and shapes in the file of the ``A`` and the ``B`` of a tensor."""
    module = PREFIX + tensor.name.removesuffix(".weight")
    if spec.kind == "embedding":
        return [f"{module}.lora_embedding_{side}" for side in "AB"], [
            (spec.rank, spec.rows),
            (spec.columns, spec.rank),
        ]
    keys = [f"{module}.lora_{side}.weight" for side in "AB"]
    if spec.kind == "transposed":
        return keys, [(spec.rank, spec.rows), (spec.columns, spec.rank)]
    ones = (1,) * (len(tensor.shape) - 2)
    return keys, [(spec.rank, *tensor.shape[1:]), (spec.rows, spec.rank, *ones)]


def _write_pair(
    writer: SafetensorsFolderWriter,
    tensor: TensorSpec,
    spec: Factors,
    left: np.ndarray,
    right: np.ndarray,
) -> None:
    a, b = (left.T, right.T) if spec.kind in ("embedding", "transposed") else (right, left)
    for key, factor in zip(_stored_as(tensor, spec)[0], (a, b), strict=True):
        writer.write(key, 0, np.ascontiguousarray(factor).ravel())


def _recorded(
    store: TrajectoryStore, tensor: TensorSpec, row: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of a recorded tensor: index of the first element, bits."""
    for segment in store.layout.segments_of(tensor):
        numel = store.layout.parts[segment.part].numel
        aligned = segment.offset // BLOCK * BLOCK
        for low, high in blocks(segment.offset + segment.numel - aligned):
            begin, end = aligned + low, min(aligned + high, numel)
            state = store.read_state(segment.part, row, begin, min(-(-end // BLOCK) * BLOCK, numel))
            first = max(begin, segment.offset)
            yield segment.start + first - segment.offset, state[first - begin : end - begin]


def _write_folder(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    write: Callable[[SafetensorsFolderWriter], None],
    config: bytes,
    provenance: Mapping[str, Any],
) -> None:
    with temporary_folder(folder) as temporary:
        with closing(SafetensorsFolderWriter(temporary, tensors, max_shard_bytes=2**62)) as writer:
            write(writer)
        os.replace(temporary / "model.safetensors", temporary / WEIGHTS)
        (temporary / CONFIG).write_bytes(config)
        (temporary / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
