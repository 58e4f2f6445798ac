"""Make ``zero/``: checkpoints of a module of 80 parameters that DeepSpeed itself wrote, and what
its own tool reads from them.

    pip install 'relexkit[interop]' && python tests/data/make_zero.py

Two gloo processes on CPU, bfloat16 with float32 masters, two parameter groups, a tied head, frozen
parameters, a buffer. The committed files are from DeepSpeed 0.19.8 and PyTorch 2.13.0.
``reference.safetensors`` is the answer of
``deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
OUT = Path(__file__).parent / "zero"


class Model(torch.nn.Module):
    """An embedding that is also the head, a frozen layer, a norm, and a buffer; odd sizes, so that
    partitions are padded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(7, 5)
        self.frozen = torch.nn.Linear(5, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.lm_head = torch.nn.Linear(5, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("ids", torch.arange(4))
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """A loss."""
        return self.lm_head(self.norm(self.frozen(self.embed_tokens(ids)))).float().square().mean()


def train(rank: int, stage: int, folder: str) -> None:
    """Two steps of one rank, then a checkpoint."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29600 + stage),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_SIZE": str(WORLD),
    }
    import deepspeed

    torch.manual_seed(0)
    model = Model()
    groups = [
        {"params": [model.embed_tokens.weight], "weight_decay": 0.1},
        {"params": list(model.norm.parameters()), "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=True
    )
    for _ in range(2):
        engine.backward(engine(torch.tensor([[1, 2, 3 + rank]])))
        engine.step()
    engine.save_checkpoint(folder, tag="global_step2")
    dist.barrier()


def main() -> None:
    """Write every stage and its reference."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import save_file

    for stage in (1, 2, 3):
        folder = OUT / f"stage{stage}"
        shutil.rmtree(folder, ignore_errors=True)
        mp.spawn(train, (stage, str(folder)), nprocs=WORLD)
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), "global_step2")
        save_file(
            {n: t.detach().contiguous().clone() for n, t in state.items()},
            folder / "reference.safetensors",
        )
        for script in folder.glob("*.py"):
            script.unlink()


if __name__ == "__main__":
    main()
