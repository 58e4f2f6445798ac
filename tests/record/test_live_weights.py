"""Weights of sharded and wrapped models, one whole tensor at a time. FSDP is in test_callback.py,
with two processes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relexkit import TrajectoryStore, checkout
from relexkit.record.live_weights import (
    describe_weights,
    frozen_names,
    named_weights,
    plain_name,
    whole_weights,
)


def test_prefixes_of_wrappers_are_left_out() -> None:
    assert (
        plain_name(
            "_orig_mod.module._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.norm.weight"
        )
        == "layers.0.norm.weight"
    )


def test_a_module_of_the_model_keeps_a_name_that_resembles_a_wrapper() -> None:
    model = torch.nn.ModuleDict(
        {"attention_module": torch.nn.Linear(2, 2), "deep": torch.nn.ModuleDict()}
    )
    model["deep"]["module"] = torch.nn.Linear(2, 2)
    assert list(named_weights(model)) == list(model.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch.jit
def test_a_compiled_model_and_its_plain_one_have_the_same_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert (
        list(named_weights(torch.compile(model)))
        == list(named_weights(model))
        == list(model.state_dict())
    )


def test_shared_parameters_come_once_and_frozen_ones_are_known() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    assert [name for name, _, _ in describe_weights(model)] == ["a.weight", "a.bias", "b.bias"]
    assert frozen_names(model) == {"a.bias"}
    assert {name: tensor.tolist() for name, tensor in whole_weights(model)} == {
        name: tensor.tolist() for name, tensor in named_weights(model).items()
    }


DEEPSPEED = """
import os, sys, warnings
warnings.simplefilter("ignore")
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import torch.multiprocessing as mp
from pathlib import Path

def main(rank, folder, stage, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    import deepspeed
    import torch.distributed as dist
    from relexkit import Recorder
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({{"embed": torch.nn.Embedding(7, 5), "still": torch.nn.Linear(5, 5)}})
    model["norm"] = torch.nn.LayerNorm(5)
    model["still"].requires_grad_(False)
    model.forward = lambda x: model["norm"](model["still"](model["embed"](x))).float().square().sum()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    settings = {{
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {{"stage": stage, "stage3_param_persistence_threshold": 0}}, "bf16": {{"enabled": True}},
    }}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=True)
    recorder = Recorder(engine.module, folder / "s.zarr", encoding="exact")
    for step in range(1, 4):
        engine.backward(engine(torch.tensor([[1, 2, 3 + rank]])))
        engine.step()
        recorder.record(step)
    recorder.close()
    engine.save_checkpoint(str(folder / "saved"), tag="last")
    dist.barrier()

if __name__ == "__main__":
    mp.spawn(main, (Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]), nprocs=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float32_masters_of_deepspeed_are_recorded(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    script = tmp_path / "script.py"
    script.write_text(DEEPSPEED.format())
    command = [sys.executable, str(script), str(tmp_path), str(stage), str(29600 + stage)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    read = (
        "import sys, torch; from deepspeed.utils.zero_to_fp32 import"
        " get_fp32_state_dict_from_zero_checkpoint as read; torch.save(read(sys.argv[1], 'last'),"
        " sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", read, str(tmp_path / "saved"), str(tmp_path / "masters.pt")],
        check=True,
        capture_output=True,
    )
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert store.steps.tolist() == [1, 2, 3]
    written = load_file(checkout(store, 3, tmp_path / "out") / "model.safetensors")
    masters = torch.load(tmp_path / "masters.pt")
    assert set(written) - set(masters) <= {
        "still.weight",
        "still.bias",
    }  # stage 1 saves no masters of what is frozen
    for name, tensor in masters.items():
        assert torch.equal(written[name].float(), tensor.float()), name
        assert name.startswith("still") or written[name].dtype == torch.float32
    base = load_file(checkout(store, 0, tmp_path / "base") / "model.safetensors")
    assert not torch.equal(base["embed.weight"], written["embed.weight"])
