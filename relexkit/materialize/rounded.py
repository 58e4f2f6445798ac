"""A checkpoint in another precision, without a store between."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from relexkit.checkpoints import Checkpoint, open_checkpoint
from relexkit.checkpoints.tied import equal_heads, with_tie
from relexkit.errors import CheckpointError
from relexkit.materialize.folders import check_output, is_finished, temporary_folder, write_files
from relexkit.store import ProgressCallback, blocks
from relexkit.version import __version__
from relexkit.weights.dtypes import (
    FLOAT_DTYPES,
    Rounding,
    bits_dtype,
    nonfinite_index,
    round_bits,
    to_float32,
)
from relexkit.weights.safetensors_io import SafetensorsFolderWriter, TensorInfo


def round_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    rounding: Rounding = "stochastic",
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write a checkpoint folder in another precision, stochastically rounded unless told otherwise.

    Tensors that are not float, and float tensors that ``dtype`` holds exactly, keep their values.
    One pass, flat memory.

    Raises:
        CheckpointError: the source is damaged or not finite.
        RelexkitError: something else is at ``out``, or a value does not fit ``dtype``.
    """
    check_output(dtype, rounding)
    folder, source = Path(out), Path(source).resolve()
    with closing(open_checkpoint(source)) as checkpoint:
        provenance = {
            "relexkit": __version__,
            "kind": "rounded",
            "source": str(source),
            "dtype": dtype,
            "rounding": rounding,
            "seed": seed,
            "weights": _weight_files(source),
        }
        if is_finished(folder, provenance):
            return folder
        _refuse_other_floats(source, checkpoint)
        tensors = {
            name: TensorInfo(info.shape, dtype if info.dtype in FLOAT_DTYPES else info.dtype)
            for name, info in checkpoint.tensors.items()
        }
        tied = equal_heads(checkpoint)  # rounded alike, so that they stay equal
        with temporary_folder(folder) as temporary:
            with closing(SafetensorsFolderWriter(temporary, tensors)) as writer:
                for done, (name, info) in enumerate(checkpoint.tensors.items(), 1):
                    moving = info.dtype in FLOAT_DTYPES
                    for begin, end in blocks(info.numel if moving else info.num_bytes):
                        bits = np.empty(end - begin, bits_dtype(info.dtype))
                        checkpoint.read_into(name, begin, bits)
                        if moving:
                            _refuse_nonfinite(source, name, begin, bits, info.dtype)
                        if moving and info.dtype != dtype:
                            values = to_float32(bits, info.dtype)
                            bits = round_bits(
                                values,
                                dtype,
                                rounding,
                                seed=seed,
                                tensor=tied.get(name, name),
                                start=begin,
                            )
                        writer.write(name, begin, bits)
                    if progress:
                        progress("rounding", done, len(tensors))
            files = checkpoint.files()
            if "config.json" in files:
                files["config.json"] = with_tie(files["config.json"], tensors, tied)
            write_files(temporary, files, [dtype], provenance, None)
    return folder


def _refuse_other_floats(source: Path, checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if info.dtype.startswith("float") and info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{source}: tensor {name!r} has dtype {info.dtype}; expected float32, bfloat16 or"
                " float16: convert it first"
            )


def _refuse_nonfinite(source: Path, name: str, begin: int, bits: np.ndarray, dtype: str) -> None:
    bad = nonfinite_index(bits, dtype)
    if bad is not None:
        raise CheckpointError(
            f"{source}: tensor {name!r} is NaN or infinite at element {begin + bad}; expected"
            " finite weights"
        )


def _weight_files(source: Path) -> list[list[str | int]]:
    """Name, size and time of every weight file below a folder: what tells a changed source from the
    same one.
    """
    paths = sorted(
        p for kind in ("*.safetensors", "*.bin", "*.pt", "*.distcp") for p in source.rglob(kind)
    )
    return [[str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
