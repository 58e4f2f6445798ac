"""Random damage to small checkpoints of every format, in a process of its own that may use little
memory.

    python tests/fuzz_readers.py FOLDER --count 10000 [--formats verl dcp] [--seed 0]

After each change the checkpoint is opened and every tensor is read. It must be read or refused with
a ``CheckpointError``, in a second or two, within the memory that is allowed, and without touching
anything: an audit hook watches for calls that a reader has no use for. Prints one line of JSON:
format -> how many were refused and how many were read.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import write_checkpoint
from safetensors.torch import save_file
from sharded import write_dcp, write_shards, write_verl, write_zero
from versions import write_pull_version, write_skyrl_version

from relexkit.checkpoints import Checkpoint, open_checkpoint, open_run
from relexkit.checkpoints.chain import ChainedRun
from relexkit.checkpoints.version_run import WeightSyncRun
from relexkit.errors import CheckpointError, StoreError
from relexkit.ingest.importer import import_checkpoints
from relexkit.store import TrajectoryStore
from relexkit.weights.dtypes import FLOAT_DTYPES, bits_dtype

MEMORY_BYTES = 2**29
"""Address space that one format's readings may take beyond what the process has when they begin."""
SECONDS = 20
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "socket.connect",
    "ctypes.dlopen",
    "pickle.find_class",
)

TENSORS = {
    "model.embed_tokens.weight": torch.arange(40.0).reshape(10, 4),
    "model.layers.0.mlp.weight": torch.ones(3, 5).bfloat16(),
    "model.norm.weight": torch.ones(4),
    "model.position_ids": torch.arange(6),
}

WRITERS: dict[str, Callable[[Path], None]] = {
    "safetensors": lambda folder: write_checkpoint(folder, TENSORS),
    "safetensors-index": lambda folder: write_checkpoint(folder, TENSORS, layout="sharded"),
    "bin": lambda folder: write_checkpoint(folder, TENSORS, layout="bin"),
    "verl": lambda folder: write_verl(folder, TENSORS, (2,)),
    "dcp": lambda folder: write_dcp(folder, TENSORS, 2),
    "sharded-safetensors": lambda folder: write_shards(folder, TENSORS, 2),
    "zero-2": lambda folder: write_zero(folder, TENSORS, 2, stage=2),
    "zero-3": lambda folder: write_zero(folder, TENSORS, 2, stage=3),
    "peft": lambda folder: write_adapter(folder, safe=True),
    "peft-bin": lambda folder: write_adapter(folder, safe=False),
    "weight-sync": lambda folder: write_chain(folder, "xor"),
    "weight-sync-overwrite": lambda folder: write_chain(folder, "overwrite"),
    "weight-sync-skyrl": lambda folder: write_chain(folder, "skyrl"),
    "store": lambda folder: write_store(folder),
}


def write_adapter(folder: Path, *, safe: bool) -> None:
    """A LoRA adapter with a pattern and a whole tensor, as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": torch.ones(shape)
        for name, shape in (
            ("layers.0.q.lora_A.weight", (2, 5)),
            ("layers.0.q.lora_B.weight", (3, 2)),
            ("norm.weight", (4,)),
            ("layers.1.q.lora_A.weight", (1, 5)),
            ("layers.1.q.lora_B.weight", (3, 1)),
        )
    }
    if safe:
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {r"^layers\.1.*q$": 1},
        "use_rslora": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_chain(folder: Path, kind: str) -> None:
    """Two weight-sync versions of a base that lies beside them."""
    if (folder / "base").exists():
        return
    write_checkpoint(folder / "base", TENSORS)
    states = [
        {n: t * (1 + s / 8) if t.is_floating_point() else t for n, t in TENSORS.items()}
        for s in range(3)
    ]
    for number in (1, 2):
        pair = states[number - 1 : number + 1]
        if kind == "skyrl":
            write_skyrl_version(folder, number, *pair)
        else:
            write_pull_version(folder, number, *pair, encoding=kind)


def write_store(folder: Path) -> None:
    """A small trajectory store with sparse, dense and fixed parts."""
    if (folder / "zarr.json").exists():
        return
    run = folder.with_name(f"{folder.name}-run")
    for step in (0, 1, 2):
        moved = {n: t + step * 1e-3 if t.is_floating_point() else t for n, t in TENSORS.items()}
        write_checkpoint(run / f"checkpoint-{step}", moved)
    import_checkpoints(run, folder)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A copy with a few bytes changed, sometimes also cut, repeated or with a number that lies."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(changed))
        kind = chance.random()
        if kind < 0.7:
            changed[at] = chance.randrange(256)
        elif kind < 0.8:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind < 0.9:
            number = chance.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data)))
            width = chance.choice((4, 8))
            changed[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind < 0.95:
            del changed[at : at + chance.randrange(1, 64)]
        else:
            changed[at:at] = changed[at : at + chance.randrange(1, 64)]
        if not changed:
            break
    return bytes(changed)


def read_all(folder: Path) -> None:
    """Open a checkpoint and read every element of it, as the import does, by blocks; or a store,
    and check it.
    """
    if (folder / "zarr.json").exists():
        TrajectoryStore(folder).verify()
        return
    if (folder / "base").exists():
        read_chain(folder)
        return
    read_elements(open_checkpoint(folder))


def read_chain(folder: Path) -> None:
    """Both versions over their base; one that is left out counts as refused."""
    run = open_run(folder)
    assert isinstance(run, WeightSyncRun)
    if len(run.steps) < 2:
        raise CheckpointError(next(iter(run.left_out.values())))
    with closing(open_checkpoint(folder / "base")) as base:
        chained = ChainedRun(run, base)
        for step in run.steps:
            read_elements(chained.checkpoint(step))


def read_elements(checkpoint: Checkpoint) -> None:
    """Every element, and the files beside."""
    try:
        checkpoint.files()
        checkpoint.metrics()
        for name, info in checkpoint.tensors.items():
            total = info.numel if info.dtype in FLOAT_DTYPES else info.num_bytes
            out = np.empty(min(total, 2**16), bits_dtype(info.dtype))
            for begin in range(0, min(total, 2**20), 2**16):
                checkpoint.read_into(name, begin, out[: min(2**16, total - begin)])
    finally:
        checkpoint.close()


def fuzz(name: str, folder: Path, count: int, seed: int) -> dict[str, int]:
    """Damage one file at a time; returns how many were refused and how many were read."""
    WRITERS[name](folder)
    read_all(folder)
    originals = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    chance = random.Random(f"{seed}:{name}")
    outcome = {"refused": 0, "read": 0}
    for _ in range(count):
        path = chance.choice(list(originals))
        path.write_bytes(damaged(originals[path], chance))
        signal.alarm(SECONDS)
        try:
            read_all(folder)
            outcome["read"] += 1
        except (CheckpointError, StoreError):
            outcome["refused"] += 1
        finally:
            signal.alarm(0)
        path.write_bytes(originals[path])
    return outcome


def limit_memory() -> None:
    """Let the process grow by ``MEMORY_BYTES`` from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--formats", nargs="+", default=list(WRITERS), choices=WRITERS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in given.formats:  # before the watch begins: writing makes folders
        WRITERS[name](given.folder / "warm" / name)
        read_all(given.folder / "warm" / name)
        (given.folder / name).mkdir(parents=True)
        WRITERS[name](given.folder / name)
    limit_memory()
    watched = {"on": False}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watched["on"] and event.startswith(FORBIDDEN):
            sys.stderr.write(f"forbidden: {event} {arguments}\n")
            raise SystemExit(3)

    sys.addaudithook(watch)
    outcomes = {}
    for name in given.formats:
        WRITERS[name] = lambda folder: None
        watched["on"] = True
        outcomes[name] = fuzz(name, given.folder / name, given.count, given.seed)
        watched["on"] = False
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
