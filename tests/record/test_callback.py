"""The callback in transformers' Trainer and TRL, against the checkpoints that they save
themselves.
"""

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from relexkit import RelexkitError, StoreError, TrajectoryStore, checkout, import_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and TRL, about themselves


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Files that the trainers left open are closed, with a warning, here and not in another
    test.
    """
    yield
    gc.collect()


def small_model(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=30,
            tie_word_embeddings=True,
        )
    )


def small_trainer(
    folder: Path, callback: Any, *more: Any, model: Any = None, **options: Any
) -> Any:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = [
        {
            "input_ids": [i % 30, i * 7 % 30, (i * 3 + 1) % 30],
            "labels": [i % 30, i * 7 % 30, (i * 3 + 1) % 30],
        }
        for i in range(64)
    ]
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **options,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        seed=1,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(
        model=model or small_model(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[callback, *more],
    )


def test_the_recorded_steps_are_the_checkpoints_that_trainer_saves(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    model = small_model()
    model.save_pretrained(tmp_path / "base")
    callback = RecorderCallback(tmp_path / "s.zarr", encoding="exact")
    small_trainer(tmp_path / "run", callback, model=model, gradient_accumulation_steps=2).train()
    recorded = TrajectoryStore(tmp_path / "s.zarr")
    recorded.verify()
    assert recorded.steps.tolist() == [1, 2, 3, 4, 5, 6]
    for step in (0, 1, 6):
        saved = tmp_path / ("base" if step == 0 else f"run/checkpoint-{step}") / "model.safetensors"
        written, original = (
            load_file(checkout(recorded, step, tmp_path / str(step)) / "model.safetensors"),
            load_file(saved),
        )
        assert written.keys() == original.keys()
        assert all(torch.equal(written[name], original[name]) for name in original)
    metrics = recorded.metrics()
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    assert metrics["loss"].tolist() == [entry["loss"] for entry in state["log_history"]]
    assert metrics["gradient_accumulation_steps"].tolist() == [2.0] * 6
    assert metrics["optimizer_step_skipped"].tolist() == [0.0] * 6
    assert "train_runtime" not in metrics
    assert {"config.json", "generation_config.json"} <= recorded.files().keys()


def test_float_deltas_are_those_of_an_import_of_the_same_checkpoints(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    model = small_model()
    model.save_pretrained(tmp_path / "base")
    small_trainer(
        tmp_path / "run", RecorderCallback(tmp_path / "s.zarr"), model=model, max_steps=3
    ).train()
    imported = import_checkpoints(
        tmp_path / "run", tmp_path / "i.zarr", base=tmp_path / "base", encoding="float"
    ).store
    recorded = TrajectoryStore(tmp_path / "s.zarr")
    for name in (
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
    ):
        rows = [rows_of(store, name) for store in (recorded, imported)]
        assert np.array_equal(*rows)
        assert rows[0].any()


def rows_of(store: TrajectoryStore, name: str) -> np.ndarray:
    tensor = next(t for t in store.layout.tensors if t.name == name)
    end = tensor.offset + tensor.numel
    return np.stack(
        [
            store.read_row(tensor.part, row, 0, end)[tensor.offset :]
            for row in range(len(store.steps))
        ]
    )


def test_only_every_nth_step_and_matching_tensors_are_recorded(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    model = small_model()
    model.model.layers[0].mlp.requires_grad_(False)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {
        "every": 2,
        "include": [r"layers\.\d+\.mlp", "norm"],
        "exclude": ["layernorm", "layers.1.mlp.up_proj"],
        "encoding": "exact",
    }
    small_trainer(
        tmp_path / "run",
        RecorderCallback(tmp_path / "s.zarr", **options),
        model=model,
        save_steps=4,
    ).train()
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert store.steps.tolist() == [2, 4, 6]
    written = load_file(checkout(store, 4, tmp_path / "out") / "model.safetensors")
    saved = load_file(tmp_path / "run/checkpoint-4/model.safetensors")
    recorded = {name for name in written if not torch.equal(written[name], initial[name])}
    assert recorded == {
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    }
    assert all(torch.equal(written[name], saved[name]) for name in recorded)
    other, frozen = (
        RecorderCallback(tmp_path / "s.zarr", **{**options, "exclude": []}),
        small_model(),
    )
    frozen.model.layers[0].mlp.requires_grad_(False)
    with pytest.raises(
        RelexkitError,
        match=(
            r"tensors near '.*' were recorded otherwise in .*; expected the same include, exclude"
        ),
    ):
        small_trainer(tmp_path / "run", other, model=frozen, save_steps=4).train(
            resume_from_checkpoint=str(tmp_path / "run/checkpoint-4")
        )


def test_patterns_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    with pytest.raises(
        RelexkitError,
        match=(
            r"include \['nothing'\] and exclude \[\] leave no trained tensor; the model has model"
        ),
    ):
        small_trainer(
            tmp_path / "run", RecorderCallback(tmp_path / "s.zarr", include=["nothing"])
        ).train()
    with pytest.raises(RelexkitError, match=r"'\(' is not a regular expression"):
        small_trainer(
            tmp_path / "run", RecorderCallback(tmp_path / "s.zarr", include=["("])
        ).train()
    assert not (tmp_path / "s.zarr").exists()


class StopAt:
    """Raises at the end of a step, as a crash."""

    def __new__(cls, step: int) -> Any:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == step:
                    raise KeyboardInterrupt

        return Stop()


@pytest.mark.parametrize(
    ("every", "stop"), [pytest.param(1, 5, marks=pytest.mark.slow), (2, 5), (3, 5), (2, 4)]
)
def test_a_stopped_and_resumed_run_gives_the_store_of_an_uninterrupted_one(
    every: int, stop: int, tmp_path: Path
) -> None:
    from relexkit.record.callback import RecorderCallback

    options = {"every": every, "encoding": "exact"}
    small_trainer(
        tmp_path / "whole", RecorderCallback(tmp_path / "whole.zarr", **options), save_steps=4
    ).train()
    callback = RecorderCallback(tmp_path / "s.zarr", **options)
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path / "run", callback, StopAt(stop), save_steps=2).train()
    callback._recorder._writer.close()  # the lock of a process that is gone
    last = str(tmp_path / "run/checkpoint-4") if stop == 5 else str(tmp_path / "run/checkpoint-2")
    small_trainer(
        tmp_path / "run", RecorderCallback(tmp_path / "s.zarr", **options), save_steps=2
    ).train(resume_from_checkpoint=last)
    whole, resumed = TrajectoryStore(tmp_path / "whole.zarr"), TrajectoryStore(tmp_path / "s.zarr")
    assert resumed.steps.tolist() == whole.steps.tolist() == list(range(every, 7, every))
    assert np.array_equal(resumed.checksums(), whole.checksums())
    resumed.verify()


def test_a_store_that_ends_too_early_for_the_checkpoint_is_refused(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    small_trainer(tmp_path / "run", RecorderCallback(tmp_path / "s.zarr"), max_steps=2).train()
    small_trainer(tmp_path / "run", RecorderCallback(tmp_path / "other.zarr"), max_steps=5).train()
    with pytest.raises(
        StoreError,
        match=(
            r"holds 2 steps from 1 to 2; expected step 5 in it, because training resumes from"
            r" step 5"
        ),
    ):
        small_trainer(tmp_path / "run", RecorderCallback(tmp_path / "s.zarr")).train(
            resume_from_checkpoint=str(tmp_path / "run/checkpoint-5")
        )


def test_a_new_run_needs_a_new_store(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    small_trainer(tmp_path / "run", RecorderCallback(tmp_path / "s.zarr"), max_steps=1).train()
    with pytest.raises(
        RelexkitError,
        match=r"a store with only step 1 exists there; resume from one of them or choose another",
    ):
        small_trainer(
            tmp_path / "again", RecorderCallback(tmp_path / "s.zarr"), max_steps=1
        ).train()


def test_a_store_that_cannot_be_written_stops_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relexkit.record.callback import RecorderCallback
    from relexkit.store import StoreWriter

    write = StoreWriter.append

    def full(self: StoreWriter, part: int, chunks: list[bytes]) -> None:
        if self._step == 3:
            raise StoreError("the disk is full")
        write(self, part, chunks)

    monkeypatch.setattr(StoreWriter, "append", full)
    with pytest.raises(StoreError, match="the disk is full"):
        small_trainer(tmp_path / "run", RecorderCallback(tmp_path / "s.zarr")).train()
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == [1, 2]
    assert not (tmp_path / "run/checkpoint-4").exists()


def test_a_step_that_the_gradient_scaler_skipped_is_marked(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    callback = RecorderCallback(tmp_path / "s.zarr", encoding="exact")
    model, control = small_model(), SimpleNamespace(should_save=False)
    arguments = SimpleNamespace(gradient_accumulation_steps=1)
    callback.on_train_begin(arguments, SimpleNamespace(global_step=0), control, model=model)
    for step, skipped in ((1, False), (2, True)):
        if not skipped:
            with torch.no_grad():
                model.model.norm.weight += 1
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        callback.on_step_end(
            arguments, SimpleNamespace(global_step=step), control, model=model, optimizer=optimizer
        )
    callback.on_train_end(arguments, SimpleNamespace(global_step=2), control)
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert store.metrics()["optimizer_step_skipped"].tolist() == [0.0, 1.0]
    assert (
        store.checksums()[0].tolist() == store.checksums()[1].tolist()
    )  # the weights did not move


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_callback import small_trainer
from relexkit.record.callback import RecorderCallback
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
checkpoint = sys.argv[3] if len(sys.argv) > 3 else None
callback = RecorderCallback(folder / "s.zarr", encoding="exact")
small_trainer(folder / "run", callback, Kill(), save_steps=2).train(resume_from_checkpoint=checkpoint)
"""


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=[str(Path(__file__).parents[n]) for n in (0, 1)]))
    return subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_a_killed_process_and_a_resumed_one_leave_no_gap(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    killed = run_script(tmp_path, "5")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() in ([1, 2, 3], [1, 2, 3, 4])
    resumed = run_script(tmp_path, "0", str(tmp_path / "run/checkpoint-4"))
    assert resumed.returncode == 0, resumed.stderr
    small_trainer(
        tmp_path / "whole",
        RecorderCallback(tmp_path / "whole.zarr", encoding="exact"),
        save_steps=4,
    ).train()
    whole, store = TrajectoryStore(tmp_path / "whole.zarr"), TrajectoryStore(tmp_path / "s.zarr")
    assert np.array_equal(store.checksums(), whole.checksums())


SHARDED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
sys.path[:0] = {tests!r}
from test_callback import small_model
from relexkit.record.callback import RecorderCallback

folder, kind, fail_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo")
model = small_model()
layers = model.model.layers
if kind == "fsdp2":
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
else:
    options = {{"use_orig_params": kind == "fsdp1", "device_id": torch.device("cpu")}}
    for index in range(len(layers)):
        layers[index] = FullyShardedDataParallel(layers[index], **options)
    model = FullyShardedDataParallel(model, **options)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
callback = RecorderCallback(folder / "s.zarr", encoding="exact")
arguments, control = SimpleNamespace(gradient_accumulation_steps=1), SimpleNamespace(should_save=False)
callback.on_train_begin(arguments, SimpleNamespace(global_step=0), control, model=model)
for step in range(1, 5):
    state = SimpleNamespace(global_step=step)
    callback.on_step_begin(arguments, state, control)
    tokens = torch.arange(12).reshape(2, 6) * (dist.get_rank() + step) % 30
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == fail_at and dist.get_rank() == 1:
        callback._recorder._appender.write_parts = None
    callback.on_step_end(arguments, state, control, model=model)
    callback.on_log(arguments, state, control, {{"loss": 1.0 / step}})
callback.on_train_end(arguments, SimpleNamespace(global_step=4), control)
if kind == "fsdp2":
    whole = {{name: p.full_tensor() for name, p in model.state_dict().items()}}
else:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        names = {{n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}}
        whole = {{name: p.detach().clone() for name, p in names.items()}}
if dist.get_rank() == 0:
    torch.save(whole, folder / "whole.pt")
dist.barrier()
dist.destroy_process_group()
"""


def run_sharded(folder: Path, kind: str, fail_at: int = 0) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(SHARDED.format(tests=[str(Path(__file__).parents[n]) for n in (0, 1)]))
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*launch, str(script), str(folder), kind, str(fail_at)],
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1 flat", "fsdp2"])
def test_two_processes_of_sharded_training_record_whole_weights(kind: str, tmp_path: Path) -> None:
    ran = run_sharded(tmp_path, kind)
    assert ran.returncode == 0, ran.stderr[-3000:]
    store = TrajectoryStore(tmp_path / "s.zarr")
    store.verify()
    assert store.steps.tolist() == [1, 2, 3, 4]
    assert store.metrics()["loss"].tolist() == [1.0, 1 / 2, 1 / 3, 1 / 4]
    initial, last = small_model().state_dict(), torch.load(tmp_path / "whole.pt")
    for step, expected in ((0, initial), (4, last)):
        written = load_file(checkout(store, step, tmp_path / str(step)) / "model.safetensors")
        assert written.keys() == expected.keys() - {"lm_head.weight"}
        assert all(torch.equal(written[name], expected[name]) for name in written)


@pytest.mark.slow
def test_an_error_of_one_process_stops_the_other_too(tmp_path: Path) -> None:
    ran = run_sharded(tmp_path, "fsdp2", fail_at=3)
    assert ran.returncode == 1
    assert "RelexkitError: process 1: TypeError" in ran.stderr
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == [1, 2]
