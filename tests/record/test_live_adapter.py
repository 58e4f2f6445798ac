"""Adapters recorded from inside the run, against PEFT's own files and its own merge."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_callback import StopAt, small_trainer

from relexkit import Recorder, RelexkitError, TrajectoryStore, checkout, import_checkpoints
from relexkit.geometry.sketch import Sketch
from relexkit.materialize.adapters import checkout_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about themselves


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Files that the trainers left open are closed, with a warning, here and not in another
    test.
    """
    yield
    gc.collect()


LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 1},
    },
    "whole tensors and biases": {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm"],
        "bias": "all",
    },
}


def adapted(variant: str = "plain", seed: int = 0, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=30,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**LORA[variant], **changes}))


def move(model: Any, amount: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)


@pytest.mark.parametrize("variant", LORA)
def test_the_recorded_steps_are_the_adapters_and_the_merges_of_peft(
    variant: str, tmp_path: Path
) -> None:
    model = adapted(variant)
    base = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    with Recorder(model, tmp_path / "s.zarr", encoding="exact") as recorder:
        for step in (1, 2, 5):
            move(model)
            recorder.record(step)
            model.save_pretrained(tmp_path / f"adapter-{step}")
            model.merge_adapter()  # as TRL does before it generates
            model.unmerge_adapter()
    store = TrajectoryStore(tmp_path / "s.zarr")
    store.verify()
    assert store.steps.tolist() == [1, 2, 5]
    assert store.has_factors
    merged = {
        name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()
    }
    written = load_file(checkout(store, 5, tmp_path / "merged") / "model.safetensors")
    assert written.keys() | {"lm_head.weight"} == merged.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-7)
    original = load_file(checkout(store, 0, tmp_path / "base") / "model.safetensors")
    names = {name.replace(".base_layer", "").replace(".original_module", ""): name for name in base}
    assert all(torch.equal(tensor, base[names[name]]) for name, tensor in original.items())
    for step in (1, 5):
        ours = load_file(
            checkout_adapter(store, step, tmp_path / f"out-{step}") / "adapter_model.safetensors"
        )
        theirs = load_file(tmp_path / f"adapter-{step}" / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_store_is_that_of_an_import_of_the_saved_adapters(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    model = adapted()
    names = {
        n.replace(".base_layer", ""): t
        for n, t in model.get_base_model().state_dict().items()
        if "lora_" not in n
    }
    type(model.get_base_model())(model.config).save_pretrained(tmp_path / "base", state_dict=names)
    callback = RecorderCallback(tmp_path / "s.zarr")
    small_trainer(tmp_path / "run", callback, model=model, max_steps=3).train()
    imported = import_checkpoints(
        tmp_path / "run", tmp_path / "i.zarr", base=tmp_path / "base"
    ).store
    recorded = TrajectoryStore(tmp_path / "s.zarr")
    assert recorded.steps.tolist() == imported.steps.tolist() == [1, 2, 3]
    factors = [
        {t.name: t.part for t in store.layout.tensors if store.layout.parts[t.part].factors}
        for store in (recorded, imported)
    ]
    assert factors[0].keys() == factors[1].keys()
    assert len(factors[0]) == 4
    for name in factors[0]:
        ours, theirs = (
            (store, parts[name]) for store, parts in zip((recorded, imported), factors, strict=True)
        )
        assert ours[0].layout.parts[ours[1]].factors == theirs[0].layout.parts[theirs[1]].factors
        assert all(
            np.array_equal(
                ours[0].read_factor_bits(ours[1], r), theirs[0].read_factor_bits(theirs[1], r)
            )
            for r in range(3)
        )
    bases = [
        load_file(checkout(store, 0, tmp_path / name) / "model.safetensors")
        for store, name in ((recorded, "a"), (imported, "b"))
    ]
    assert bases[0].keys() == bases[1].keys()
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])
    assert recorded.metrics()["loss"].tolist() == imported.metrics()["loss"].tolist()
    assert np.isfinite(recorded.metrics()["live_variance_1"]).all()


def test_a_stopped_and_resumed_run_gives_the_store_of_an_uninterrupted_one(tmp_path: Path) -> None:
    from relexkit.record.callback import RecorderCallback

    small_trainer(
        tmp_path / "whole", RecorderCallback(tmp_path / "whole.zarr"), model=adapted(), save_steps=4
    ).train()
    callback = RecorderCallback(tmp_path / "s.zarr")
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path / "run", callback, StopAt(5), model=adapted(), save_steps=2).train()
    assert callback._recorder is not None
    callback._recorder._writer.close()  # the lock of a process that is gone
    resumed = small_trainer(
        tmp_path / "run", RecorderCallback(tmp_path / "s.zarr"), model=adapted(), save_steps=2
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    whole, cut = TrajectoryStore(tmp_path / "whole.zarr"), TrajectoryStore(tmp_path / "s.zarr")
    assert cut.steps.tolist() == whole.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(cut.checksums(), whole.checksums())
    assert cut.sketches() == pytest.approx(whole.sketches())
    with pytest.raises(
        RelexkitError,
        match=r"of the model's base differs from the base in .*s\.zarr; expected the same base",
    ):
        Recorder(adapted(seed=1), tmp_path / "s.zarr", resume_from=6)
    with pytest.raises(RelexkitError, match=r"does not hold the weights of step 6"):
        Recorder(adapted(), tmp_path / "s.zarr", resume_from=6)
    Recorder(adapted(), tmp_path / "s.zarr", resume_from=0).close()


@pytest.mark.parametrize("variant", LORA)
def test_every_kind_of_adapter_is_continued(variant: str, tmp_path: Path) -> None:
    model = adapted(variant)
    with Recorder(model, tmp_path / "s.zarr") as recorder:
        for step in (1, 2):
            move(model)
            recorder.record(step)
    with Recorder(model, tmp_path / "s.zarr", resume_from=2) as recorder:
        move(model)
        recorder.record(3)
    store = TrajectoryStore(tmp_path / "s.zarr")
    store.verify()
    assert store.steps.tolist() == [1, 2, 3]


def test_patterns_leave_targets_out(tmp_path: Path) -> None:
    model = adapted()
    with Recorder(
        model, tmp_path / "s.zarr", include=["q_proj"], exclude=[r"layers\.1"]
    ) as recorder:
        move(model)
        recorder.record(1)
    store = TrajectoryStore(tmp_path / "s.zarr")
    held = [
        s.tensor.name
        for n, p in enumerate(store.layout.parts)
        if p.factors
        for s in store.layout.segments_in(n)
    ]
    assert held == ["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(RelexkitError, match="leave no trained tensor"):
        Recorder(model, tmp_path / "other.zarr", include=["norm"])


def test_an_adapter_that_did_not_move_is_a_step_too(tmp_path: Path) -> None:
    """The first step of a warm-up has learning rate 0."""
    model = adapted()
    with Recorder(model, tmp_path / "s.zarr") as recorder:
        recorder.record(1)
        move(model)
        recorder.record(2)
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == [1, 2]


def test_a_second_adapter_that_is_not_active_does_not_matter(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does for a reference
    with Recorder(model, tmp_path / "s.zarr") as recorder:
        move(model)
        recorder.record(1)
    assert len([p for p in TrajectoryStore(tmp_path / "s.zarr").layout.parts if p.factors]) == 4


def begun() -> Any:
    model = adapted()
    move(model)
    return model


def merged() -> Any:
    model = begun()
    model.merge_adapter()
    return model


def quantised() -> Any:
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = torch.nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            begun,
            (
                "the adapter is not new: its delta is not zero before the first step; merge it into"
                " the base"
            ),
        ),
        (merged, "the adapter is merged into the base; call unmerge_adapter"),
        (quantised, r"q_proj.weight' is kept in another shape, \[128, 1\], probably quantised"),
        (lambda: adapted(use_dora=True), "uses use_dora"),
    ],
    ids=["begun", "merged", "quantised", "dora"],
)
def test_what_cannot_be_recorded_is_refused_and_nothing_is_left(
    make: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(RelexkitError, match=words):
        Recorder(make(), tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_a_factor_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = adapted()
    with Recorder(model, tmp_path / "s.zarr") as recorder:
        move(model, float("nan"))
        recorder.record(1)
        with pytest.raises(RelexkitError, match="is NaN or infinite at element 0"):
            recorder.flush()
        recorder._failure = None
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == []


def test_the_sketch_of_a_product_estimates_inner_products_without_its_dense_form() -> None:
    random = np.random.default_rng(0)
    pairs = [(random.standard_normal((60, 3)), random.standard_normal((3, 70))) for _ in range(2)]
    dense = [(left @ right).ravel() for left, right in pairs]
    exact = dense[0] @ dense[1] / (np.linalg.norm(dense[0]) * np.linalg.norm(dense[1]))
    found = []
    for seed in range(40):
        sketch = Sketch(width=2**12, seed=seed)
        rows = [sketch.product("w", left, right) for left, right in pairs]
        found.append(rows[0] @ rows[1] / (np.linalg.norm(dense[0]) * np.linalg.norm(dense[1])))
        assert np.linalg.norm(rows[0]) == pytest.approx(
            np.linalg.norm(dense[0]), rel=5 * (8 / 2**12) ** 0.5
        )
    bound = (8 / 2**12) ** 0.5
    assert np.std(found) < bound
    assert np.mean(found) == pytest.approx(exact, abs=3 * bound / len(found) ** 0.5)


SHARDED = """
import sys
import subprocess
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
sys.path[:0] = {tests!r}
from test_live_adapter import adapted
from relexkit import Recorder

folder, kind = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
model = plain = adapted("whole tensors and biases", modules_to_save=["down_proj"])
layers = model.base_model.model.model.layers
if kind == "fsdp2":
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
elif kind == "fsdp1":
    options = {{"use_orig_params": True, "device_id": torch.device("cpu")}}
    for index in range(len(layers)):
        layers[index] = FullyShardedDataParallel(layers[index], **options)
    model = FullyShardedDataParallel(model, **options)
else:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
with Recorder(model, folder / "s.zarr", encoding="exact") as recorder:
    for step in range(1, 4):
        tokens = torch.arange(12).reshape(2, 6) * (dist.get_rank() + step) % 30
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.record(step)
if kind == "fsdp2":
    whole = {{name: p.full_tensor() for name, p in model.state_dict().items()}}
elif kind == "fsdp1":
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        whole = {{n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}}
else:
    whole = plain.state_dict()
if dist.get_rank() == 0:
    torch.save(whole, folder / "whole.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_processes_record_the_whole_adapter(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
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
    ran = subprocess.run(
        [*launch, str(script), str(tmp_path), kind], capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    store, whole = TrajectoryStore(tmp_path / "s.zarr"), torch.load(tmp_path / "whole.pt")
    store.verify()
    assert store.steps.tolist() == [1, 2, 3]
    written = load_file(checkout_adapter(store, 3, tmp_path / "out") / "adapter_model.safetensors")
    live = {
        n.replace(".modules_to_save.default", "").replace(".default", ""): t
        for n, t in whole.items()
        if "lora_" in n
        or "modules_to_save" in n
        or n.endswith("_proj.base_layer.bias")
        or n.endswith(("k_proj.bias", "v_proj.bias"))
    }
    assert written.keys() == live.keys()
    assert all(torch.equal(written[name], live[name]) for name in live)


@pytest.mark.slow
def test_lora_in_trl_is_recorded_as_the_adapters_that_trl_saves(tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from tiny_models import tiny_tokenizer
    from trl import GRPOConfig, GRPOTrainer

    from relexkit.record.callback import RecorderCallback

    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        save_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        beta=0.1,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_only_model=True,
    )
    GRPOTrainer(
        model=adapted().unload(),
        args=config,
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **_: [float(c.count("1")) for c in completions],
        train_dataset=Dataset.from_dict({"prompt": ["1+2=", "3+4="] * 6}),
        callbacks=[RecorderCallback(tmp_path / "s.zarr")],
        peft_config=LoraConfig(**LORA["plain"], task_type="CAUSAL_LM"),
    ).train()
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert store.steps.tolist() == [1, 2, 3]
    assert np.isfinite(store.metrics()["reward"]).all()
    for step in (1, 3):
        ours = load_file(
            checkout_adapter(store, step, tmp_path / f"out-{step}") / "adapter_model.safetensors"
        )
        theirs = load_file(tmp_path / f"run/checkpoint-{step}" / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
