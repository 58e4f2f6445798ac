"""A live model into a store: against what the model held, across restarts, failures and several
processes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from relexkit import (
    Recorder,
    RelexkitError,
    StoreError,
    TrajectoryStore,
    checkout,
    gram,
    import_checkpoints,
    spectrum,
)
from relexkit.store.encodings.table import ENCODINGS
from relexkit.weights.safetensors_io import SafetensorsFile

SIZES = (7, 300, 1)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two layers, one of them shared, a float and an integer buffer."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.first = torch.nn.Linear(SIZES[0], SIZES[1])
    model.second = torch.nn.Linear(SIZES[1], SIZES[2])
    model.again = model.first
    model.register_buffer("scale", torch.tensor([1.5]))
    model.register_buffer("count", torch.tensor([3], dtype=torch.int64))
    return model.to(dtype)


def move(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=generator) * 1e-2
            parameter += change.to(parameter.dtype)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith("again")
    }


def stored_weights(store: TrajectoryStore, step: int, folder: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(checkout(store, step, folder) / "model.safetensors")
    found = {}
    for name, info in file.tensors.items():
        raw = (
            np.empty(info.num_bytes, np.uint8)
            if info.dtype == "int64"
            else np.empty(info.numel, np.uint16 if info.dtype == "bfloat16" else np.uint32)
        )
        file.read_into(name, 0, raw)
        found[name] = raw
    return found


def bits(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.int64:
        return tensor.view(torch.uint8).numpy()
    return (
        tensor.reshape(-1)
        .view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
        .numpy()
        .view(np.uint16 if tensor.dtype == torch.bfloat16 else np.uint32)
    )


@pytest.mark.parametrize(
    ("dtype", "encoding"), [(torch.float32, "exact"), (torch.bfloat16, "float")]
)
def test_every_recorded_step_comes_back_bit_for_bit(tmp_path, dtype, encoding):
    model = small_model(dtype=dtype)
    held = {0: weights(model)}
    with Recorder(model, tmp_path / "run.zarr", encoding=encoding) as recorder:
        for step in (1, 2, 5):
            move(model, step)
            assert recorder.record(step, {"reward": step / 10})
            held[step] = weights(model)  # the recorder may still be writing, from its own copy
            move(model, 100 + step)
            move(model, 100 + step)
    store = TrajectoryStore(tmp_path / "run.zarr")
    store.verify()
    np.testing.assert_allclose(store.metrics()["reward"], [0.1, 0.2, 0.5])
    assert store.exact
    for step, expected in held.items():
        found = stored_weights(store, step, tmp_path / f"step-{step}")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(
                found[name], bits(tensor), err_msg=f"{name} at step {step}"
            )


def test_float_deltas_are_those_of_the_weights_to_the_stated_bits(tmp_path):
    model = small_model()
    base = weights(model)
    with Recorder(model, tmp_path / "run.zarr", mantissa_bits=10) as recorder:
        deltas = []
        for step in range(1, 5):
            move(model, step)
            recorder.record(step)
            now = weights(model)
            deltas.append(
                torch.cat(
                    [(now[name] - base[name]).reshape(-1) for name in base if name != "count"]
                ).double()
            )
    expected = torch.stack(deltas)
    found = gram(TrajectoryStore(tmp_path / "run.zarr")).scoped("global").matrices[0]
    # each delta is off by at most 2^-11 of itself, an entry of the Gram matrix by twice that
    np.testing.assert_allclose(found, (expected @ expected.T).numpy(), rtol=2**-10)


def test_only_multiples_of_every_are_recorded(tmp_path):
    model = small_model()
    with Recorder(model, tmp_path / "run.zarr", every=3) as recorder:
        assert [recorder.record(step) for step in range(1, 8)] == [
            False,
            False,
            True,
            False,
            False,
            True,
            False,
        ]
        recorder.flush()
        assert recorder.store.steps.tolist() == [3, 6]


def test_a_resumed_run_replaces_what_came_after_its_state(tmp_path):
    def record(
        path: Path, steps: range, model: torch.nn.Module, resume_from: int | None = None
    ) -> None:
        with Recorder(model, path, resume_from=resume_from) as recorder:
            for step in steps:
                move(model, step)
                recorder.record(step, {"reward": float(step)})

    whole, parted = small_model(), small_model()
    record(tmp_path / "whole.zarr", range(1, 7), whole)
    record(tmp_path / "parted.zarr", range(1, 4), parted)
    state = {name: tensor.clone() for name, tensor in parted.state_dict().items()}
    with Recorder(parted, tmp_path / "parted.zarr", resume_from=3) as recorder:
        for step in (4, 5):
            move(parted, 1000 + step)  # another way, which is lost
            recorder.record(step)
    gram(TrajectoryStore(tmp_path / "parted.zarr"))  # its cache must not outlive the steps
    parted.load_state_dict(state)
    record(tmp_path / "parted.zarr", range(4, 7), parted, resume_from=3)
    stores = [TrajectoryStore(tmp_path / name) for name in ("whole.zarr", "parted.zarr")]
    stores[1].verify()
    np.testing.assert_array_equal(stores[0].checksums(), stores[1].checksums())
    np.testing.assert_array_equal(stores[0].metrics()["reward"], stores[1].metrics()["reward"])
    # of the cache the first three steps are used again, so the products differ in their rounding
    one, other = (gram(store).matrices for store in stores)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(one).max())


def test_resuming_with_other_weights_or_another_model_changes_nothing(tmp_path):
    model = small_model()
    with Recorder(model, tmp_path / "run.zarr") as recorder:
        for step in (1, 2):
            move(model, step)
            recorder.record(step)
    with pytest.raises(RelexkitError, match="does not hold the weights of step 1"):
        Recorder(model, tmp_path / "run.zarr", resume_from=1)
    with pytest.raises(RelexkitError, match="does not hold the weights of the base"):
        Recorder(model, tmp_path / "run.zarr", resume_from=0)
    with pytest.raises(StoreError, match="step 7 is not recorded"):
        Recorder(model, tmp_path / "run.zarr", resume_from=7)
    with pytest.raises(RelexkitError, match=r"2 steps from 1 to 2 exists there; resume"):
        Recorder(model, tmp_path / "run.zarr")
    with pytest.raises(RelexkitError, match="the model lacks tensors 'scale'"):
        Recorder(torch.nn.Linear(2, 2), tmp_path / "run.zarr", resume_from=2)
    assert TrajectoryStore(tmp_path / "run.zarr").steps.tolist() == [1, 2]
    Recorder(model, tmp_path / "run.zarr", resume_from=2).close()  # and no lock was left


def test_a_weight_that_is_not_finite_stops_the_recording_at_the_last_good_step(tmp_path):
    model = small_model()
    recorder = Recorder(model, tmp_path / "run.zarr")
    move(model, 1)
    recorder.record(1)
    with torch.no_grad():
        model.second.weight[0, 2] = float("nan")
    recorder.record(2)
    with pytest.raises(
        RelexkitError, match=r"step 2: tensor 'second.weight' is NaN or infinite at element 2"
    ):
        recorder.record(3)
    with pytest.raises(RelexkitError, match="step 2"):
        recorder.close()
    store = TrajectoryStore(tmp_path / "run.zarr")
    store.verify()
    assert store.steps.tolist() == [1]


def test_an_error_inside_calls_no_process_that_may_be_gone(tmp_path: Path) -> None:
    def gone(value: object) -> list[object]:
        raise AssertionError("waits for the others")

    recorder = Recorder(small_model().float(), tmp_path / "run.zarr")
    recorder.record(1, metrics_follow=True)
    recorder._processes.size, recorder._processes.gather = 2, gone  # type: ignore[method-assign]
    recorder.__exit__(KeyboardInterrupt)
    assert TrajectoryStore(tmp_path / "run.zarr").steps.tolist() == []


SEVERAL = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path[:0] = {tests!r}
from relexkit import Recorder, RelexkitError
from relexkit.store.encodings.table import ENCODINGS
from test_recorder import move, small_model

ENCODINGS["float"].part_numel = 1000
dist.init_process_group("gloo")

def record(kind):
    model = small_model()
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
    else:
        model = model.float()
    recorder = Recorder(model, f"{{sys.argv[1]}}/{{kind}}.zarr")
    for step in (1, 2, 3):
        whole = small_model()
        for done in range(1, step + 1):
            move(whole, done)
        values = dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if kind == "sharded":
                    from torch.distributed.tensor import distribute_tensor
                    parameter.copy_(distribute_tensor(values[name].data, parameter.device_mesh, parameter.placements))
                else:
                    parameter.copy_(values[name])
                    if kind == "failing" and step == 2 and dist.get_rank() == 1:
                        parameter.fill_(float("inf"))
        try:
            recorder.record(step, {{"reward": step / 10}})
        except RelexkitError as error:
            print(f"rank {{dist.get_rank()}}: {{error}}", flush=True)
            sys.exit(0)
    recorder.close()

for kind in ("sharded", "replicated", "failing"):
    record(kind)
dist.destroy_process_group()
"""


def torchrun(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        code,
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The stores of two processes, by the way they hold the model, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "record.py"
    script.write_text(SEVERAL.format(tests=[str(Path(__file__).parents[n]) for n in (0, 1)]))
    done = torchrun(str(script), str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_processes_stop_together_and_the_failed_step_does_not_exist(of_two):
    """One process had a bad weight in a part of its own."""
    folder, printed = of_two
    store = TrajectoryStore(folder / "failing.zarr")
    store.verify()
    assert store.steps.tolist() == [1]
    assert "rank 0: process 1: step 2" in printed
    assert "rank 1: step 2: tensor" in printed


@pytest.mark.parametrize("kind", ["sharded", "replicated"])
def test_two_processes_write_the_store_of_one(of_two, tmp_path, monkeypatch, kind):
    two = TrajectoryStore(of_two[0] / f"{kind}.zarr")
    two.verify()
    monkeypatch.setattr(ENCODINGS["float"], "part_numel", 1000)
    model = small_model()
    with Recorder(model, tmp_path / "one.zarr") as recorder:
        for step in (1, 2, 3):
            move(model, step)
            recorder.record(step, {"reward": step / 10})
    one = TrajectoryStore(tmp_path / "one.zarr")
    assert one.layout == two.layout
    assert len(one.layout.parts) > 3
    np.testing.assert_array_equal(one.checksums(), two.checksums())
    np.testing.assert_array_equal(one.metrics()["reward"], two.metrics()["reward"])
    np.testing.assert_allclose(one.sketches(), two.sketches(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(
        one.metrics()["live_r2"][-1], two.metrics()["live_r2"][-1], rtol=1e-6
    )


def test_live_statistics_stand_beside_the_reward_and_go_on_after_a_restart(tmp_path):
    model, held = small_model(), []
    with Recorder(model, tmp_path / "whole.zarr") as recorder:
        for step in range(1, 7):
            move(model, step)
            recorder.record(step, {"reward": step / 10})
            held.append(weights(model))
    whole = TrajectoryStore(tmp_path / "whole.zarr")
    metrics = whole.metrics()
    assert {"reward", "live_variance_1", "live_variance_2", "live_straightness", "live_r2"} == set(
        metrics
    )
    matrices = gram(whole)
    for count in (3, 6):
        exact = spectrum(matrices.until(count), scope="global").scopes[0]
        assert abs(metrics["live_variance_1"][count - 1] - exact.explained_variance_ratio[0]) < 0.05
        assert abs(metrics["live_r2"][count - 1] - exact.r2[0]) < 0.05
    model = small_model()
    with Recorder(model, tmp_path / "cut.zarr") as recorder:
        for step in range(1, 6):
            move(model, step)
            recorder.record(step)
    model = small_model()
    for step in (1, 2, 3):
        move(model, step)
    with Recorder(model, tmp_path / "cut.zarr", resume_from=3) as recorder:
        for step in (4, 5, 6):
            move(model, step)
            recorder.record(step)
    cut = TrajectoryStore(tmp_path / "cut.zarr")
    np.testing.assert_array_equal(cut.sketches(), whole.sketches())
    for name in ("live_variance_1", "live_straightness", "live_r2"):
        np.testing.assert_array_equal(cut.metrics()[name], metrics[name])


def test_a_recorder_without_a_sketch(tmp_path):
    model = small_model()
    with Recorder(model, tmp_path / "run.zarr", sketch=False) as recorder:
        move(model, 1)
        recorder.record(1, {"reward": 0.5})
    store = TrajectoryStore(tmp_path / "run.zarr")
    assert store.metric_names() == ["reward"]
    assert store.sketches() is None


@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_fused_experts_keep_the_models_own_names_load_and_are_not_mixed_with_an_import(
    tmp_path: Path,
) -> None:
    """transformers 5 fuses the experts in memory and writes them one by one."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        num_key_value_heads=1,
        vocab_size=30,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with Recorder(model, tmp_path / "s.zarr", encoding="exact") as recorder:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        recorder.record(1)
    model.save_pretrained(tmp_path / "run/checkpoint-2")
    written = AutoModelForCausalLM.from_pretrained(
        checkout(TrajectoryStore(tmp_path / "s.zarr"), 1, tmp_path / "out")
    )
    tokens = torch.arange(6)[None]
    assert torch.equal(written(tokens).logits, model(tokens).logits)
    with pytest.raises(
        RelexkitError, match=r"lacks tensors 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"
    ):
        import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base")
