"""Two real processes that train a small model under DDP or FSDP2 and jump: one jump is taken back,
one stays.

    torchrun --nproc-per-node 2 tests/jump_processes.py FOLDER KIND         KIND: ddp or fsdp2

leaves ``FOLDER/s.zarr``, and ``FOLDER/weights.pt``: the whole weights before the jumps, after the
one that was taken back, and after the one that stayed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from relexkit import Recorder
from relexkit.assess.jump_decision import Decision
from relexkit.gram_matrix import Gram
from relexkit.record.jumping import Jumper


@dataclass(frozen=True)
class Always:
    """A rule that always jumps."""

    every: ClassVar[int] = 4
    shortest: ClassVar[int] = 1
    tested: ClassVar[bool] = True

    def decide(self, segment: Gram, most: int) -> Decision:
        """Jump three steps."""
        return Decision(3, "two-point", "always", {})


def wrapped(kind: str) -> Any:
    model = tiny_model()
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): (
            tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        ).clone()
        for name, tensor in model.state_dict().items()
    }


def main(folder: Path, kind: str) -> None:
    dist.init_process_group("gloo")
    model = wrapped(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(12).reshape(2, 6) % 15

    def sample(rewards: list[float]) -> tuple[None, np.ndarray]:
        with torch.no_grad():  # gathers the weights and leaves them so
            model(input_ids=tokens)
        return None, np.full((4, 2), rewards.pop(0))

    seen = []
    with Recorder(model, folder / "s.zarr") as recorder:
        jumper = Jumper(Always(), recorder, model)  # type: ignore[arg-type]
        step = 0
        for rewards in ([0.5, 0.1], [0.1, 0.5]):
            while not jumper.due(step, 100):
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                recorder.record(step, jumper.take_told())
            if not seen:
                seen.append(whole(model))
            step, _ = jumper.attempt(step, 100, lambda given=rewards: sample(given), print)
            seen.append(whole(model))
        jumped = model(input_ids=tokens).logits.detach()
        recorder.flush()
    if dist.get_rank() == 0:
        torch.save({"seen": seen, "logits": jumped}, folder / "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
