"""Weight-sync versions for the tests, and a receiver, from the descriptions of the formats: nothing
here uses relexkit.

slime's ``docs/en/advanced/delta-weight-sync.md`` and SGLang's ``/pull_weights`` (``weight_v``),
SkyRL's ``delta_checkpoint.py`` (``delta-``).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
import xxhash
import zstandard
from runs import Run, Weights, write_checkpoint
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

CHECKSUMS: dict[str, Callable[[bytes], str]] = {
    "xxh3-128": lambda data: xxhash.xxh3_128(data).hexdigest(),
    "blake3": lambda data: blake3.blake3(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
}


def raw(tensor: torch.Tensor) -> np.ndarray:
    """Bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def frame(old: np.ndarray, new: np.ndarray, encoding: str) -> np.ndarray:
    """The compressed delta of two arrays of bytes."""
    if encoding == "xor":
        content = (old ^ new).tobytes()
    else:
        at = np.flatnonzero(old != new)
        content = (
            np.array([len(at)], "<u4").tobytes() + at.astype("<u4").tobytes() + new[at].tobytes()
        )
    return np.frombuffer(zstandard.ZstdCompressor(level=1).compress(content), np.uint8)


def changed_tensors(old: Weights, new: Weights, encoding: str) -> dict[str, np.ndarray]:
    """Frames of the tensors that changed."""
    pairs = {name: (raw(old[name]), raw(new[name])) for name in new}
    return {
        name: frame(a, b, encoding) for name, (a, b) in pairs.items() if not np.array_equal(a, b)
    }


def write_pull_version(
    folder: Path,
    number: int,
    old: Weights | None,
    new: Weights,
    *,
    base: int | None = None,
    encoding: str = "xor",
    checksum: str = "xxh3-128",
    files: int = 2,
) -> Path:
    """``weight_v{N:06d}``: deltas against ``old``, or a whole checkpoint if that is None."""
    place = folder / f"weight_v{number:06d}"
    place.mkdir(parents=True)
    if old is None:
        write_checkpoint(place, new)
        return place
    frames = changed_tensors(old, new, encoding)
    names = list(frames)
    weight_map = {}
    count = min(files, len(names))
    for index in range(count):
        file = f"model-{index:05d}-of-{count:05d}.safetensors"
        mine = names[index::count]
        sums = {name: CHECKSUMS[checksum](raw(new[name]).tobytes()) for name in mine}
        save_file({name: frames[name] for name in mine}, place / file, metadata=sums)
        weight_map |= dict.fromkeys(mine, file)
    metadata = {
        "version": f"{number:06d}",
        "base_version": f"{number - 1 if base is None else base:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    index_file = place / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return place


def write_skyrl_version(
    folder: Path, number: int, old: Weights, new: Weights, *, older: bool = False
) -> Path:
    """``delta-{N:08d}`` with its manifest; ``older`` has the sha256 of earlier releases."""
    place = folder / f"delta-{number:08d}"
    place.mkdir(parents=True)
    frames = changed_tensors(old, new, "xor")
    file = "delta-rank00000-file000000.safetensors"
    records = []
    for name, compressed in frames.items():
        content = raw(new[name]).tobytes()
        record = {
            "name": name,
            "dtype": str(new[name].dtype).removeprefix("torch."),
            "shape": list(new[name].shape),
            "uncompressed_num_bytes": len(content),
            "compressed_num_bytes": len(compressed),
            "payload_file": file,
            "payload_key": name,
        }
        if older:
            record["sha256"] = CHECKSUMS["sha256"](content)
        else:
            record["checksum"] = CHECKSUMS["xxh3-128"](content)
            record["checksum_algorithm"] = "xxh3-128"
        records.append(record)
    if frames:
        save_file(frames, place / file)
    manifest = {
        "version": number,
        "base_version": number - 1,
        "tensors": records,
        "payload_files": [file] if frames else [],
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def write_versions(folder: Path, run: Run, *, layout: str = "pull", **options: Any) -> Path:
    """The whole of a run as versions 1, 2, ...; the base is version 0."""
    steps = [0, *run.steps]
    for number, (earlier, step) in enumerate(pairwise(steps), 1):
        write = write_pull_version if layout == "pull" else write_skyrl_version
        write(folder, number, run.weights[earlier], run.weights[step], **options)
    return folder


def pull(source: Path, base: Path, target: int) -> dict[str, np.ndarray]:
    """What an engine has after ``/pull_weights``: the bytes of every tensor at version ``target``.

    Begins with the newest whole version, or the base, applies what follows, and compares every
    checksum.
    """

    def index(number: int) -> Mapping[str, Any]:
        path = source / f"weight_v{number:06d}" / "model.safetensors.index.json"
        return json.loads(path.read_text()) if path.is_file() else {"metadata": {}}

    start = target
    while start and "delta_encoding" in index(start)["metadata"]:
        start -= 1
    seed = source / f"weight_v{start:06d}" if start else base
    state = {
        name: raw(tensor)
        for path in sorted(seed.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    for number in range(start + 1, target + 1):
        metadata = index(number)["metadata"]
        assert int(metadata["version"]) == number
        assert int(metadata["base_version"]) == number - 1
        assert metadata["compression_format"] == "zstd"
        for path in sorted((source / f"weight_v{number:06d}").glob("*.safetensors")):
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    content = np.frombuffer(
                        zstandard.ZstdDecompressor().decompress(file.get_tensor(name).tobytes()),
                        np.uint8,
                    )
                    if metadata["delta_encoding"] == "xor":
                        state[name] = state[name] ^ content
                    else:
                        count = int(content[:4].view("<u4")[0])
                        at = content[4 : 4 + 4 * count].view("<u4")
                        state[name][at] = content[4 + 4 * count :]
                    found = CHECKSUMS[metadata["checksum_format"]](state[name].tobytes())
                    assert found == file.metadata()[name], f"version {number}, {name}"
    return state
