"""Memory and processor time of import, Gram matrices and extrapolation on checkpoints with the
tensors of a published model, made for it and removed.

    python tests/benchmarks/known_model.py WORK [--model llama-3.2-1b] [--steps 3] [--changed 0.005]
    [--all-at STEP] [--dtype bfloat16]

Weights are normal numbers and updates of 16-bit weights one unit in the last place, at a share
``--changed`` of the weights; at ``--all-at`` every weight changes. Float32 weights all change at
every step. Each command is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measure import remove, run

BLOCK = 2**22


@dataclass(frozen=True)
class Llama:
    """What fixes the tensors of a Llama with tied embeddings; from its published config.json."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    key_width: int

    def shapes(self) -> dict[str, list[int]]:
        """Names and shapes in the order of its file."""
        h, m, k = self.hidden, self.inner, self.key_width
        of_layer = {
            "input_layernorm": [h],
            "mlp.down_proj": [h, m],
            "mlp.gate_proj": [m, h],
            "mlp.up_proj": [m, h],
            "post_attention_layernorm": [h],
            "self_attn.k_proj": [k, h],
            "self_attn.o_proj": [h, h],
            "self_attn.q_proj": [h, h],
            "self_attn.v_proj": [k, h],
        }
        layers = {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(self.layers)
            for name, shape in of_layer.items()
        }
        embedding = {"model.embed_tokens.weight": [self.vocabulary, h]}
        return {**embedding, **layers, "model.norm.weight": [h]}


MODELS = {
    "llama-3.2-1b": Llama(128256, 2048, 8192, 16, 512),  # meta-llama/Llama-3.2-1B
    "smollm2-135m": Llama(49152, 576, 1536, 30, 192),  # HuggingFaceTB/SmolLM2-135M
}


def make(out: Path, model: Llama, steps: int, changed: float, all_at: int, dtype: str) -> None:
    """Write ``out/base`` and ``out/run/checkpoint-N``, block by block."""
    import numpy as np

    shapes = model.shapes()
    size = {"bfloat16": 2, "float32": 4}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + int(np.prod(shape)) * size
        code = {"bfloat16": "BF16", "float32": "F32"}[dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(2 * BLOCK).astype(np.float32) * np.float32(0.02)
    values = normal if size == 4 else (normal.view(np.uint32) >> 16).astype(np.uint16)

    def blocks() -> Iterator[tuple[int, int]]:
        for begin in range(0, position // size, BLOCK):
            yield begin, min(BLOCK, position // size - begin)

    def fresh(begin: int, count: int) -> np.ndarray:
        first = begin * 7919 % BLOCK
        return values[first : first + count].copy()

    def updated(bits: np.ndarray, step: int) -> np.ndarray:
        if size == 4:
            first = int(rng.integers(BLOCK))
            bits += normal[first : first + len(bits)] * np.float32(5e-5)
        elif step == all_at:
            bits ^= np.uint16(1)
        else:
            bits[rng.integers(0, len(bits), int(changed * len(bits)))] ^= np.uint16(1)
        return bits

    previous = None
    for step in range(steps + 1):
        folder = out / "run" / f"checkpoint-{step}" if step else out / "base"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": dtype}))
        path = folder / "model.safetensors"
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for begin, count in blocks():
                if previous is None:
                    file.write(fresh(begin, count).tobytes())
                else:
                    old = np.fromfile(previous, values.dtype, count, offset=start + begin * size)
                    file.write(updated(old, step).tobytes())
        previous = path
    print(position // size)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--changed", type=float, default=0.005)
    parser.add_argument("--all-at", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only-make", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    made, store, out = (given.work / name for name in ("made", "made.zarr", "made-predicted"))
    if given.only_make:
        model = MODELS[given.model]
        make(made, model, given.steps, given.changed, given.all_at, given.dtype)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    remove(made, store, out)
    maker = [sys.executable, __file__, *sys.argv[1:], "--only-make"]
    try:
        count = int(subprocess.run(maker, check=True, capture_output=True, text=True).stdout)
        print(f"{given.model}: {count:,} parameters, {given.steps} steps, {given.dtype}")
        relexkit = (sys.executable, "-m", "relexkit")
        log = given.work / "commands.log"
        encoding = ("--encoding", "float") if given.dtype == "float32" else ()
        commands = {
            "import": ("import", made / "run", "-o", store, "--base", made / "base", *encoding),
            "spectrum": ("spectrum", store),
            "extrapolate": ("extrapolate", store, "--to", str(2 * given.steps), "-o", out),
        }
        for name, words in commands.items():
            cost = run([*relexkit, *words], log, [store if name == "import" else out])
            print(
                f"| {name} | {cost.peak_bytes / 2**20:.0f} MiB"
                f" | {cost.cpu_seconds:.1f} s of processor time | {cost.wall_seconds:.0f} s"
                f" | left {cost.left_bytes / 1e6:.0f} MB | load {os.getloadavg()[0]:.0f} |",
                flush=True,
            )
    finally:
        remove(made, store, out)


if __name__ == "__main__":
    main()
