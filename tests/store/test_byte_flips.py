"""One byte flipped anywhere in a store, derived arrays included: ``verify`` finds it, and nothing
that is read differs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from relexkit import Recorder, TrajectoryStore
from relexkit.errors import RelexkitError
from relexkit.gram_matrix import gram, randomized_gram
from relexkit.gram_matrix.compute.settings import Compute

KINDS = {
    "sparse": (torch.bfloat16, "exact"),
    "exact": (torch.float32, "exact"),
    "float": (torch.float32, "float"),
}
NUM_FLIPS = {"quick": 10, "all": 170}


def make(folder: Path, kind: str) -> Path:
    """A recorded store with sketches, metrics, a file, exact and randomized results."""
    dtype, encoding = KINDS[kind]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 9)).to(dtype)
    path = folder / "s.zarr"
    with Recorder(model, path, encoding=encoding) as recorder:
        for step in range(1, 6):
            with torch.no_grad():
                for weight in model.parameters():
                    weight += torch.randn_like(weight) * 0.1 * (torch.rand_like(weight) < 0.3)
            recorder.record(step, {"reward": step / 7})
    gram(TrajectoryStore(path))
    randomized_gram(TrajectoryStore(path), compute=Compute(components=2))
    return path


def observe(path: Path) -> dict[str, np.ndarray]:
    """All that a user can read."""
    store = TrajectoryStore(path)
    found = {"steps": store.steps, "checksums": store.checksums(), **store.metrics()}
    sketches = store.sketches()
    assert sketches is not None
    found["sketches"] = sketches
    found["gram"] = gram(store).matrices
    found["randomized"] = randomized_gram(store, compute=Compute(components=2)).matrices
    for part, spec in enumerate(store.layout.parts):
        for row in range(-1, len(store.steps)):
            found[f"{part} at {row}"] = store.read_state(part, row, 0, spec.numel)
    return found


def same_document(path: Path, before: bytes, after: bytes) -> bool:
    """A description in which a space became another one says the same."""
    if path.name != "zarr.json":
        return False
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def flip(content: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    changed[random.integers(len(content))] ^= int(random.integers(1, 256))
    return bytes(changed)


@pytest.mark.parametrize("extent", ["quick", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_found_and_never_read(tmp_path: Path, kind: str, extent: str) -> None:
    path, random = make(tmp_path, kind), np.random.default_rng(len(kind))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    contents = {file: file.read_bytes() for file in files}
    intact = observe(path)
    TrajectoryStore(path).verify()
    order = np.resize(random.permutation(len(files)), NUM_FLIPS[extent])
    problems = []
    for number in order:
        file = files[number]
        damaged = flip(contents[file], random)
        file.write_bytes(damaged)
        name = str(file.relative_to(path))
        try:
            TrajectoryStore(path).verify()
            if not same_document(file, contents[file], damaged):
                problems.append(f"{name}: verify finds nothing")
        except RelexkitError:
            pass
        try:
            found = observe(path)  # what is derived may be computed again, and kept
        except RelexkitError:
            found = intact
        for what, values in intact.items():
            if not np.array_equal(values, found[what], equal_nan=True) and not (
                what in ("gram", "randomized")
                and np.allclose(values, found[what], rtol=0, atol=1e-6 * np.abs(values).max())
            ):
                problems.append(f"{name}: {what} differs")
        for other in path.rglob("*"):
            if other.is_file() and other not in contents:
                other.unlink()
        for other, content in contents.items():
            if not other.exists() or other.read_bytes() != content:
                other.write_bytes(content)
    assert not problems, "\n".join(problems)
