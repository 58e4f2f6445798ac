"""What a step of a run takes, by the ways to keep one checkpoint as its difference from the one
before: bytes, and processor seconds to write and to get back.

    python tests/benchmarks/storage.py RUN RUN.zarr WORK [--steps N]

RUN has ``bfloat16/checkpoint-1`` to ``checkpoint-(N + 1)``, one ``model.safetensors`` each;
RUN.zarr is its store. Ways: the store's own log, ``zstd --patch-from`` (the command), XOR and
zstd as weight-sync deltas have it, and ZipNN's byte delta where that package can be imported. Every
result is compared bit for bit with the checkpoint. Random access: all but ours need the checkpoint
before; ours replays from the base.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard
from measure import remove, run, size_of

from relexkit import TrajectoryStore
from relexkit.store import StoreWriter, create_store
from relexkit.store.create import About
from relexkit.store.encodings.bits import block_checksums, changes, content_checksum


class Took(NamedTuple):
    """Bytes that were kept, and processor seconds to write and to get back."""

    num_bytes: int
    write: float
    back: float


def zstd_patch(before: Path, after: Path, work: Path) -> Took:
    """The command, with a window over the whole file."""
    patch, restored, log = work / "patch.zst", work / "restored", work / "log"
    common = ["zstd", "-q", "-f", "-T1", "--long=31", f"--patch-from={before}"]
    write = run([*common, "-1", after, "-o", patch], log, [patch])
    back = run([*common, "-d", patch, "-o", restored], log)
    assert restored.read_bytes() == after.read_bytes()
    return Took(write.left_bytes, write.cpu_seconds, back.cpu_seconds)


def in_memory(
    encode: Callable[[bytes, bytes], bytes], decode: Callable[[bytes, bytes], bytes]
) -> Callable[[Path, Path, Path], Took]:
    """A way from bytes to bytes."""

    def took(before: Path, after: Path, work: Path) -> Took:
        old, new = before.read_bytes(), after.read_bytes()
        began = time.process_time()
        kept = encode(old, new)
        between = time.process_time()
        restored = decode(old, kept)
        ended = time.process_time()
        assert restored == new
        return Took(len(kept), between - began, ended - between)

    return took


def _xor(old: bytes, new: bytes) -> bytes:
    return (np.frombuffer(old, np.uint8) ^ np.frombuffer(new, np.uint8)).tobytes()


xor_zstd = in_memory(
    lambda old, new: zstandard.ZstdCompressor(level=1).compress(_xor(old, new)),
    lambda old, kept: _xor(old, zstandard.ZstdDecompressor().decompress(kept)),
)


def zipnn(before: Path, after: Path, work: Path) -> Took:
    """Its byte delta of two files in memory."""
    from zipnn import ZipNN

    def codec() -> ZipNN:
        return ZipNN(bytearray_dtype="bfloat16", delta_compressed_type="byte", threads=1)

    return in_memory(
        lambda old, new: bytes(codec().compress(new, delta_second_data=old)),
        lambda old, kept: bytes(codec().decompress(kept, delta_second_data=old)),
    )(before, after, work)


def ours(store: TrajectoryStore, row: int, work: Path) -> Took:
    """A step of the store written anew and read back, without its base."""
    layout, place = store.layout, work / "one.zarr"
    states = {
        p: store.read_state(p, row, 0, layout.parts[p].numel) for p in range(len(layout.parts))
    }
    news = {p: store.read_state(p, row + 1, 0, layout.parts[p].numel) for p in states}
    remove(place)
    create_store(place, layout, lambda p, b, e: states[p][b:e], About(source="", base=""))
    with StoreWriter(place) as writer:
        began = time.process_time()
        writer.begin(1)
        for part, state in states.items():
            columns, old, new = changes(state, news[part])
            checksum = content_checksum(block_checksums(news[part]))
            writer.write_sparse(part, columns, (new - old).view(f"i{state.itemsize}"), checksum)
        writer.commit()
        between = time.process_time()
    kept = TrajectoryStore(place)
    num_bytes = kept.num_bytes()["updates"] - sum(
        size_of(p) for p in (place / "updates").rglob("zarr.json")
    )
    again = time.process_time()
    for part, state in states.items():
        columns, differences = kept.read_update(part, 0, 0, len(state))
        state[columns] += differences.view(state.dtype)
    ended = time.process_time()
    assert all(np.array_equal(states[p], news[p]) for p in states)
    return Took(num_bytes, between - began, ended - again)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    store = TrajectoryStore(given.store)
    files = [
        given.run / "bfloat16" / f"checkpoint-{n + 1}" / "model.safetensors"
        for n in range(given.steps + 1)
    ]
    ways: dict[str, Callable[[int], Took]] = {
        "relexkit": lambda n: ours(store, n, given.work),
        "zstd --patch-from": lambda n: zstd_patch(files[n], files[n + 1], given.work),
        "XOR, zstd": lambda n: xor_zstd(files[n], files[n + 1], given.work),
    }
    if importlib.util.find_spec("zipnn") is not None:
        ways["ZipNN"] = lambda n: zipnn(files[n], files[n + 1], given.work)
    size = size_of(files[0])
    print("| | bytes of a step | of the checkpoint | write, CPU s | back, CPU s |")
    print("|---|---|---|---|---|")
    for name, way in ways.items():
        took = [way(n) for n in range(given.steps)]
        middle = [statistics.median(t[i] for t in took) for i in range(3)]
        spread = [f"{min(t[i] for t in took):.2f} to {max(t[i] for t in took):.2f}" for i in (1, 2)]
        print(
            f"| {name} | {middle[0]:,.0f} | 1/{size / middle[0]:.0f} | {middle[1]:.2f}"
            f" ({spread[0]}) | {middle[2]:.2f} ({spread[1]}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
