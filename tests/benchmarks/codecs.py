"""Reading dense deltas of a real store by pipeline, codec, level and chunk size: speed and size.

    python tests/benchmarks/codecs.py RUN.zarr WORK [--repeats N]

Takes 2^22 columns of four steps from the middle of the run, writes them anew with each setting
(shards of 2^22), reads them whole, all settings in turn, and prints a table. Pipelines: relexkit's
direct reads (one thread), zarr's own, and zarrs (Rust).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from measure import remove, size_of
from zarr.codecs import BloscCodec, Crc32cCodec

from relexkit import TrajectoryStore
from relexkit.store.fastpath.shards import shard_reader

COLUMNS, ROWS = 2**22, 4
SETTINGS = [
    ("lz4", 1, 15),
    ("lz4", 1, 17),
    ("lz4", 1, 20),
    ("lz4", 5, 15),
    ("zstd", 1, 15),
    ("zstd", 1, 17),
    ("zstd", 5, 15),
]
PIPELINES = {
    "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


def write(work: Path, rows: np.ndarray, setting: tuple[str, int, int]) -> tuple[Path, float]:
    """An array with these settings, and the CPU seconds that writing took."""
    codec, level, chunk = setting
    path = work / f"{codec}-{level}-{chunk}"
    codecs = (BloscCodec(cname=codec, clevel=level, shuffle="bitshuffle"), Crc32cCodec())
    began = time.process_time()
    array = zarr.create_array(
        path,
        shape=rows.shape,
        dtype=rows.dtype,
        chunks=(1, 2**chunk),
        shards=(1, COLUMNS),
        compressors=codecs,
        fill_value=0,
    )
    array[:] = rows
    return path, time.process_time() - began


def read(path: Path, pipeline: str, out: np.ndarray) -> tuple[float, float]:
    """Wall and CPU seconds to decode every row."""
    with zarr.config.set({"codec_pipeline.path": PIPELINES.get(pipeline, PIPELINES["zarr"])}):
        array = zarr.open_array(path, mode="r")
        reader = shard_reader(array)
        assert reader is not None
        began, used = time.perf_counter(), time.process_time()
        for row in range(ROWS):
            if pipeline == "relexkit":
                reader.read(row, 0, COLUMNS, out[row])
            else:
                out[row] = array[row]
        return time.perf_counter() - began, time.process_time() - used


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    store = TrajectoryStore(given.store)
    first = len(store.steps) // 2
    rows = np.stack([store.read_row(0, first + row, 0, COLUMNS) for row in range(ROWS)])
    given.work.mkdir(parents=True, exist_ok=True)
    written = {setting: write(given.work, rows, setting) for setting in SETTINGS}
    seconds: dict[tuple[Any, str], list[tuple[float, float]]] = {}
    out = np.empty_like(rows)
    for repeat in range(given.repeats + 1):
        for setting, (path, _) in written.items():
            for pipeline in ("relexkit", "zarr", "zarrs"):
                found = read(path, pipeline, out)
                assert np.array_equal(out, rows), (setting, pipeline)
                if repeat:
                    seconds.setdefault((setting, pipeline), []).append(found)
    print(
        "| codec | level | chunk | size | write CPU s/GB | relexkit GB/s | zarr GB/s | zarrs GB/s |"
        " CPU s/GB of the three |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    size = rows.nbytes / 1e9
    for setting, (path, writing) in written.items():
        both = [seconds[setting, p] for p in ("relexkit", "zarr", "zarrs")]
        speeds = [f"{size / statistics.median(w for w, _ in found):.2f}" for found in both]
        used = " / ".join(f"{statistics.median(c for _, c in found) / size:.2f}" for found in both)
        codec, level, chunk = setting
        share = size_of(path) / rows.nbytes
        print(
            f"| {codec} | {level} | 2^{chunk} | {share:.3f} | {writing / size:.1f} |"
            f" {' | '.join(speeds)} | {used} |"
        )
    remove(*(path for path, _ in written.values()))


if __name__ == "__main__":
    main()
