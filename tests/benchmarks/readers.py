"""Peak memory of the readers on generated checkpoints of two sizes: flat in the model's size.

    python tests/benchmarks/readers.py FOLDER [--parameters 1e8 1e9] [--formats safetensors verl dcp
    zero-3]

Each checkpoint is written (float32, four ranks where there are ranks), read once from end to end by
blocks in a process of its own, as an import reads it, and deleted. Prints a line of JSON for each:
the process's peak memory, its share that is no page of a file, the same of a process that only
loads the package, and seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import measure

WORLD = 4
BLOCK = 2**20
READ = f"""
import sys
from contextlib import closing
from pathlib import Path
import numpy as np
from relexkit.checkpoints import open_checkpoint
out = np.empty({BLOCK}, np.uint32)
if len(sys.argv) > 1:
    with closing(open_checkpoint(Path(sys.argv[1]))) as checkpoint:
        for name, info in checkpoint.tensors.items():
            for begin in range(0, info.numel, {BLOCK}):
                checkpoint.read_into(name, begin, out[: min({BLOCK}, info.numel - begin)])
"""
WRITE = """
import sys
sys.path[:0] = sys.argv[1:3]
import readers
readers.write(sys.argv[3], sys.argv[4], float(sys.argv[5]))
"""


def write(kind: str, folder: str, num_parameters: float) -> None:
    """Write one checkpoint; runs in a process of its own."""
    import torch
    from safetensors.torch import save_file
    from sharded import rank_of, write_dcp_states
    from synthetic import model_config, tensor_shapes
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    shapes = tensor_shapes(model_config(num_parameters, 24))
    out = Path(folder)
    out.mkdir(parents=True)

    def local(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape[0] // WORLD, *shape[1:])

    def whole(shape: tuple[int, ...], part: torch.Tensor) -> DTensor:
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )

    if kind == "safetensors":
        names = list(shapes)
        cut = [names[i::WORLD] for i in range(WORLD)]
        files = [f"model-{i + 1:05d}-of-{WORLD:05d}.safetensors" for i in range(WORLD)]
        for file, group in zip(files, cut, strict=True):
            save_file({n: torch.randn(shapes[n]) for n in group}, out / file)
        weight_map = {n: file for file, group in zip(files, cut, strict=True) for n in group}
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    elif kind == "verl":
        for rank in range(WORLD):
            with rank_of(rank, WORLD):
                state = {n: whole(s, local(s)) for n, s in shapes.items()}
                torch.save(state, out / f"model_world_size_{WORLD}_rank_{rank}.pt")
    elif kind == "dcp":
        parts = {
            s: local(s) for s in set(shapes.values())
        }  # every chunk is saved apart, so they may share memory
        write_dcp_states(out, WORLD, lambda: {n: whole(s, parts[s]) for n, s in shapes.items()})
    else:
        numel = {n: torch.Size(s).numel() for n, s in shapes.items()}
        for rank in range(WORLD):
            flat = torch.randn(sum(-(-count // WORLD) for count in numel.values()))
            state = {"zero_stage": 3, "partition_count": WORLD, "fp32_flat_groups": [flat]}
            torch.save(
                {"optimizer_state_dict": state},
                out / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
            described = {
                "module": {},
                "buffer_names": [],
                "param_shapes": [{n: torch.Size(s) for n, s in shapes.items()}],
            }
            torch.save(described, out / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e8, 1e9])
    parser.add_argument("--formats", nargs="+", default=["safetensors", "verl", "dcp", "zero-3"])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    log, here = given.folder / "log", Path(__file__).resolve().parent
    empty = measure.run([sys.executable, "-c", READ], log)
    for kind in given.formats:
        for count in given.parameters:
            folder = given.folder / f"{kind}-{count:g}"
            measure.run(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-c",
                    WRITE,
                    here,
                    here.parent,
                    kind,
                    folder,
                    str(count),
                ],
                log,
            )
            size = measure.size_of(folder)
            cost = measure.run([sys.executable, "-c", READ, folder], log)
            shutil.rmtree(folder)
            line = {
                "format": kind,
                "parameters": count,
                "checkpoint_bytes": size,
                "seconds": round(cost.wall_seconds, 1),
                "peak_mb": round(cost.peak_bytes / 1e6),
                "anonymous_mb": round((cost.peak_anonymous_bytes or 0) / 1e6),
                "package_alone_mb": round(empty.peak_bytes / 1e6),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
