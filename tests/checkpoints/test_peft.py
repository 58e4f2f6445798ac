"""Adapters written by PEFT itself, compared with what PEFT computes from them."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from relexkit import (
    CheckpointError,
    Output,
    RelexkitError,
    StoreError,
    TrajectoryStore,
    checkout,
    extrapolate,
    gram,
    import_checkpoints,
)
from relexkit.checkpoints.formats.peft_config import read_settings
from relexkit.cli import main
from relexkit.gram_matrix.factors import factor_gram
from relexkit.materialize.adapters import checkout_adapter
from relexkit.predict.extrapolators import predict_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 30,
}
VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["v_proj"],
        "init_lora_weights": "gaussian",
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.k_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "embedding and whole tensors": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["embed_tokens", "o_proj"],
        "modules_to_save": ["lm_head", "norm"],
    },
}
STEPS = [1, 2, 3, 5, 8]


class Made:
    """A run on disk, and the deltas that PEFT computes: ``deltas[step][tensor name]``."""

    def __init__(self, folder: Path, model_class: type, config: object, **lora: object):
        from peft import LoraConfig, get_peft_model

        self.source, self.base = folder / "run", folder / "base"
        torch.manual_seed(0)
        model = model_class(config)
        model.save_pretrained(self.base)
        base = load_file(self.base / "model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
            optimizer = torch.optim.AdamW(
                [p for p in self.model.parameters() if p.requires_grad], lr=2e-2
            )
            tokens = torch.randint(0, 30, (4, 9))
            self.deltas: dict[int, dict[str, torch.Tensor]] = {}
            for step in range(1, max(STEPS) + 1):
                optimizer.zero_grad()
                self.model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                if step in STEPS:
                    self.model.save_pretrained(self.source / f"checkpoint-{step}")
                    self.deltas[step] = self._deltas(base)

    def _deltas(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        deltas = {}
        for name, module in self.model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight") and "default" in module.scaling:
                deltas[f"{name}.weight"] = module.get_delta_weight("default").detach().clone()
            if hasattr(module, "modules_to_save") and "default" in module.modules_to_save:
                saved = module.modules_to_save["default"].weight.detach()
                deltas[f"{name}.weight"] = saved - base[f"{name}.weight"]
        return deltas


def llama(folder: Path, **lora: object) -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Made(folder, LlamaForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=False), **lora)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read only."""
    return llama(tmp_path_factory.mktemp("plain"), **VARIANTS["plain"])


@pytest.fixture(scope="module")
def plain_store(plain: Made, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """Read only: copy the folder before changing it."""
    return import_checkpoints(
        plain.source, tmp_path_factory.mktemp("store") / "s.zarr", base=plain.base
    ).store


def recorded_delta(store: TrajectoryStore, name: str, row: int) -> torch.Tensor:
    tensor = next(t for t in store.layout.tensors if t.name == name)
    base = store.read_base(tensor.part, 0, store.layout.parts[tensor.part].numel)
    whole = store.read_delta(tensor.part, row, 0, len(base), base)[
        tensor.offset : tensor.offset + tensor.numel
    ]
    return torch.from_numpy(whole.copy()).reshape(tensor.shape)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_delta_is_the_one_that_peft_computes(variant: str, tmp_path: Path) -> None:
    made = llama(tmp_path, **VARIANTS[variant])
    store = import_checkpoints(
        made.source, tmp_path / "s.zarr", base=made.base, encoding="exact"
    ).store
    store.verify()
    assert store.steps.tolist() == STEPS
    assert store.has_factors
    assert store.exact
    for row, step in enumerate(STEPS):
        for name, delta in made.deltas[step].items():
            # both are float32 products; only the order of a few additions may differ
            torch.testing.assert_close(
                recorded_delta(store, name, row), delta, rtol=1e-5, atol=1e-9
            )
    moved = {n for n, m in zip(gram(store).names, gram(store).moved, strict=True) if m.any()}
    assert moved == {name for name, delta in made.deltas[STEPS[-1]].items() if delta.any()}


def test_fan_in_fan_out_factors_are_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=30,
        n_positions=16,
        n_inner=24,
        tie_word_embeddings=False,
    )
    made = Made(
        tmp_path,
        GPT2LMHeadModel,
        config,
        r=2,
        lora_alpha=3,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
    )
    store = import_checkpoints(made.source, tmp_path / "s.zarr", base=made.base).store
    assert made.deltas[8]["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    for row, step in enumerate(STEPS):
        for name, delta in made.deltas[step].items():
            torch.testing.assert_close(
                recorded_delta(store, name, row), delta, rtol=1e-5, atol=1e-9
            )
    written = load_file(checkout_adapter(store, 5, tmp_path / "out") / "adapter_model.safetensors")
    original = load_file(made.source / "checkpoint-5/adapter_model.safetensors")
    assert {k: (v.shape, v.tolist()) for k, v in written.items()} == {
        k: (v.shape, v.tolist()) for k, v in original.items()
    }


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_factors_give_the_delta_that_peft_computes(kernel: int, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, kernel))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "run/step_4")
    store = import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base").store
    expected = adapted.base_model.model[0].get_delta_weight("default").detach()
    torch.testing.assert_close(recorded_delta(store, "0.weight", 0), expected, rtol=1e-5, atol=1e-7)
    written = load_file(checkout_adapter(store, 4, tmp_path / "out") / "adapter_model.safetensors")
    original = load_file(tmp_path / "run/step_4/adapter_model.safetensors")
    assert {k: (v.shape, v.tolist()) for k, v in written.items()} == {
        k: (v.shape, v.tolist()) for k, v in original.items()
    }


def test_the_gram_matrices_in_closed_form_are_those_of_the_dense_deltas(
    plain: Made, plain_store: TrajectoryStore
) -> None:
    computed = gram(plain_store)
    for name, matrix, moved, changed in zip(
        computed.names, computed.matrices, computed.moved, computed.changed, strict=True
    ):
        if name not in plain.deltas[1]:
            assert not matrix.any()
            assert not moved.any()
            continue
        deltas = torch.stack([plain.deltas[s][name].double().flatten() for s in STEPS])
        # the deltas themselves are float32 products here, the closed form is computed in float64
        np.testing.assert_allclose(matrix, (deltas @ deltas.T).numpy(), rtol=1e-5)
        assert moved.tolist() == [int((plain.deltas[s][name] != 0).sum()) for s in STEPS]
        assert changed.tolist() == moved.tolist()


@pytest.mark.parametrize("budget", [1, 20_000, 10**9])
@pytest.mark.parametrize("old", [0, 3, 4])
def test_any_cut_into_blocks_of_steps_gives_the_same_gram_matrix(
    plain_store: TrajectoryStore, budget: int, old: int
) -> None:
    part = next(p for p, spec in enumerate(plain_store.layout.parts) if spec.factors)
    whole, counts = factor_gram(plain_store, part, 0, 10**9)
    some, some_counts = factor_gram(plain_store, part, old, budget)
    np.testing.assert_allclose(some, whole[old:], rtol=1e-12)
    assert np.array_equal(some_counts, counts[:, old:])


def test_an_adapter_of_rows_that_never_moved_counts_only_the_others(tmp_path: Path) -> None:
    made = llama(tmp_path, **VARIANTS["embedding and whole tensors"])
    store = import_checkpoints(made.source, tmp_path / "s.zarr", base=made.base).store
    computed = gram(store)
    row = computed.names.index("model.embed_tokens.weight")
    assert computed.moved[row].tolist() == [
        int((made.deltas[s][computed.names[row]] != 0).sum()) for s in STEPS
    ]
    assert 0 < computed.moved[row, -1] < 30 * 16  # tokens that never occurred


def test_appended_steps_give_the_store_of_a_single_import(
    plain: Made, plain_store: TrajectoryStore, tmp_path: Path
) -> None:
    import_checkpoints(plain.source, tmp_path / "s.zarr", base=plain.base, steps="1:2")
    gram(TrajectoryStore(tmp_path / "s.zarr"))
    result = import_checkpoints(plain.source, tmp_path / "s.zarr", base=plain.base)
    assert (result.added, result.already) == ([3, 5, 8], [1, 2])
    np.testing.assert_allclose(gram(result.store).matrices, gram(plain_store).matrices, rtol=1e-12)
    assert np.array_equal(result.store.checksums(), plain_store.checksums())


def test_a_merged_prediction_is_the_base_plus_the_weighted_deltas(
    plain: Made, plain_store: TrajectoryStore, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    weights = predict_weights(gram(plain_store), [12.0])[0]
    written = extrapolate(plain_store, [12], tmp_path)[0].folder
    assert not (written / "adapter_config.json").exists()
    base, predicted = (
        load_file(plain.base / "model.safetensors"),
        load_file(written / "model.safetensors"),
    )
    for name, row in {t.name: r for r, t in enumerate(plain_store.layout.moving_tensors)}.items():
        expected = base[name].double()
        for weight, step in zip(weights[row], STEPS, strict=True):
            expected += weight * plain.deltas[step].get(name, torch.zeros(1)).double()
        torch.testing.assert_close(predicted[name], expected.float(), rtol=1e-6, atol=1e-7)
    loaded = LlamaForCausalLM.from_pretrained(written).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in predicted.items())


@pytest.mark.parametrize("rank", [None, 1, 3, 40])
def test_a_predicted_adapter_holds_the_prediction_at_its_rank(
    plain: Made, plain_store: TrajectoryStore, rank: int | None, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    prediction = extrapolate(plain_store, [12], tmp_path, output=Output(adapter=rank or 0))[0]
    loaded = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(plain.base), prediction.folder
    )
    weights = predict_weights(gram(plain_store), [12.0])[0]
    wrong = total = 0.0
    for row, tensor in enumerate(plain_store.layout.moving_tensors):
        if tensor.name not in plain.deltas[1]:
            continue
        deltas = [plain.deltas[s][tensor.name].double() for s in STEPS]
        dense = sum(w * d for w, d in zip(weights[row], deltas, strict=True))
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        keep = prediction.rank
        best = (u[:, :keep] * s[:keep]) @ vt[:keep]
        found = loaded.base_model.model.get_submodule(
            tensor.name.removesuffix(".weight")
        ).get_delta_weight("default")
        torch.testing.assert_close(found.detach().double(), best, rtol=0, atol=float(s[0]) * 1e-5)
        wrong, total = wrong + float((s[keep:] ** 2).sum()), total + float((s**2).sum())
    assert prediction.error == pytest.approx((wrong / total) ** 0.5, abs=1e-5)
    assert rank is not None or prediction.error <= 1e-3
    assert extrapolate(plain_store, [12], tmp_path, output=Output(adapter=rank or 0))[0].already


def test_a_predicted_adapter_holds_whole_tensors_too(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    made = llama(tmp_path, **VARIANTS["embedding and whole tensors"])
    store = import_checkpoints(made.source, tmp_path / "s.zarr", base=made.base).store
    adapter = extrapolate(store, [12], tmp_path / "adapters", output=Output(adapter=16))[0].folder
    merged = (
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(made.base), adapter)
        .merge_and_unload()
        .state_dict()
    )
    dense = load_file(extrapolate(store, [12], tmp_path / "merged")[0].folder / "model.safetensors")
    assert merged.keys() == dense.keys()
    for name, tensor in dense.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_adapter_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    made = llama(tmp_path, **VARIANTS[variant])
    store = import_checkpoints(
        made.source, tmp_path / "s.zarr", base=made.base, encoding="exact"
    ).store
    folder = checkout_adapter(store, 5, tmp_path / "out")
    written = load_file(folder / "adapter_model.safetensors")
    original = load_file(made.source / "checkpoint-5/adapter_model.safetensors")
    original = {
        key: value for key, value in original.items() if "base_layer" not in key
    }  # the base's own embedding
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    first = (made.source / "checkpoint-1/adapter_config.json").read_bytes()
    assert (folder / "adapter_config.json").read_bytes() == first


def test_merged_weights_of_a_less_precise_base_are_rounded_without_bias(
    plain: Made, tmp_path: Path
) -> None:
    shutil.copytree(plain.base, tmp_path / "base")
    base = {
        name: tensor.bfloat16()
        for name, tensor in load_file(plain.base / "model.safetensors").items()
    }
    save_file(base, tmp_path / "base/model.safetensors")
    store = import_checkpoints(plain.source, tmp_path / "s.zarr", base=tmp_path / "base").store
    written = load_file(checkout(store, 3, tmp_path / "out") / "model.safetensors")
    for name, tensor in base.items():
        delta = plain.deltas[3].get(name)
        if delta is None:
            assert torch.equal(written[name], tensor)
            continue
        exact = tensor.float() + delta
        spacing = 2.0 ** (exact.abs().log2().floor() - 7)
        assert written[name].dtype == torch.bfloat16
        assert ((written[name].float() - exact).abs() < spacing * 1.001).all()


def test_adapters_below_other_names_and_in_older_files_are_found(
    plain: Made, tmp_path: Path
) -> None:
    for step in STEPS[:2]:
        original = plain.source / f"checkpoint-{step}"
        folder = tmp_path / f"run/global_step_{step}/actor/lora_adapter"
        folder.mkdir(parents=True)
        shutil.copy(original / "adapter_config.json", folder)
        state = load_file(original / "adapter_model.safetensors")
        torch.save(
            {
                k.replace("_A.", "_A.default.").replace("_B.", "_B.default."): v
                for k, v in state.items()
            },
            folder / "adapter_model.bin",
        )
    store = import_checkpoints(tmp_path / "run", tmp_path / "s.zarr", base=plain.base).store
    for name, delta in plain.deltas[2].items():
        torch.testing.assert_close(recorded_delta(store, name, 1), delta, rtol=1e-5, atol=1e-9)


def test_the_base_that_the_adapters_name_is_taken_when_it_is_here(
    plain: Made, tmp_path: Path
) -> None:
    run = shutil.copytree(plain.source, tmp_path / "run")
    with pytest.raises(
        CheckpointError,
        match=r"are adapters of None, which is not a folder here; give the base model with --base",
    ):
        import_checkpoints(run, tmp_path / "s.zarr")
    for step in STEPS:
        edit_config(run / f"checkpoint-{step}", base_model_name_or_path=str(plain.base))
    assert import_checkpoints(run, tmp_path / "s.zarr").store.attributes["base"][
        "description"
    ] == str(plain.base)


def test_a_base_by_reference_gives_what_the_base_in_the_store_does(
    plain: Made, plain_store: TrajectoryStore, tmp_path: Path
) -> None:
    """Under the adapter's names, with a head of its own."""
    out = tmp_path / "s.zarr"
    store = import_checkpoints(plain.source, out, base=plain.base, base_by_reference=True).store
    assert store.attributes["format_version"] == 3
    store.verify()
    for part, spec in enumerate(plain_store.layout.parts):
        for begin, end in ((0, spec.numel), (spec.numel // 3, spec.numel // 2)):
            expected = plain_store.read_base(part, begin, end)
            np.testing.assert_array_equal(store.read_base(part, begin, end), expected)
    np.testing.assert_array_equal(gram(store).matrices, gram(plain_store).matrices)
    written = [checkout(s, STEPS[-1], tmp_path / n) for n, s in (("a", store), ("b", plain_store))]
    files = [(folder / "model.safetensors").read_bytes() for folder in written]
    assert files[0] == files[1]


# -- what is refused -------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: object) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"peft_type": "VERA"},
            (
                r"holds an adapter of type 'VERA'; expected LORA: merge every step with PEFT's"
                r" merge_and_unload"
            ),
        ),
        ({"use_dora": True}, r"uses use_dora \(DoRA rescales the merged rows"),
        ({"lora_bias": True}, r"uses lora_bias"),
        ({"layer_replication": [[0, 2]]}, r"uses layer_replication"),
        ({"trainable_token_indices": [1]}, r"uses trainable_token_indices"),
        ({"target_parameters": ["experts"]}, r"uses target_parameters"),
        ({"alora_invocation_tokens": [5]}, r"uses alora_invocation_tokens"),
        (
            {"something_new": 3},
            r"uses something_new \(this relexkit does not know what it does to the delta\)",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"was initialised with 'pissa_niter_4', which changes the base weights",
        ),
        ({"init_lora_weights": "loftq"}, r"was initialised with 'loftq'"),
        (
            {"lora_alpha": 0},
            r"has lora_alpha 0, so its delta is zero; older releases of verl's merger",
        ),
        ({"r": None}, r"r or lora_alpha is missing or not a number"),
    ],
)
def test_a_configuration_whose_delta_is_something_else_is_refused_by_name(
    changes: dict, words: str
) -> None:
    from peft import LoraConfig

    config = {**LoraConfig(r=4, lora_alpha=8).to_dict(), "peft_type": "LORA", **changes}
    with pytest.raises(CheckpointError, match=words):
        read_settings(config, "adapter_config.json")


def no_products(state: dict) -> dict:
    return {k: torch.zeros_like(v) if ".lora_B." in k else v for k, v in state.items()}


@pytest.mark.parametrize("r", [0, -1, 2.5, "4", None, True])
def test_a_rank_that_is_no_whole_number_is_refused(r: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"x: r or lora_alpha is missing or not a number \(r is"
    ):
        read_settings({"peft_type": "LORA", "r": r, "lora_alpha": 2}, "x")
    settings = read_settings(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"q": r}}, "x"
    )
    with pytest.raises(CheckpointError, match=r"gives 'q' the rank .*; expected 1 or more"):
        settings.scale_of("q")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "4", 10**400])
def test_an_alpha_that_is_no_number_is_refused(alpha: object) -> None:
    settings = read_settings(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"q": alpha}}, "x"
    )
    with pytest.raises(CheckpointError, match=r"gives 'q' the alpha .*; expected a number"):
        settings.scale_of("q")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v[:0] for k, v in s.items()},
            r"were saved without being gathered \(DeepSpeed ZeRO-3",
        ),
        (
            lambda s: {k: v for k, v in s.items() if ".lora_A." not in k},
            r"has only lora_B; expected both factors",
        ),
        (
            lambda s: {k: v.repeat(*((2, 1) if "lora_A" in k else (1, 2))) for k, v in s.items()},
            r"have rank 8 and 8; .* says 4",
        ),
        (
            lambda s: s | {"base_model.model.model.norm.lora_magnitude_vector": torch.ones(3)},
            r"which is neither a LoRA factor",
        ),
        (
            lambda s: {"base_model.model.model.norm.weight": torch.ones(16)},
            r"holds no LoRA factors",
        ),
    ],
)
def test_a_step_that_is_no_whole_adapter_is_left_out_with_the_reason(
    plain: Made, change: object, words: str, tmp_path: Path
) -> None:
    run = shutil.copytree(plain.source, tmp_path / "run")
    edit_tensors(run / "checkpoint-3", change)
    result = import_checkpoints(run, tmp_path / "s.zarr", base=plain.base)
    assert result.added == [1, 2, 5, 8]
    assert re.search(words, result.left_out["step 3"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            no_products,
            r"every delta of the adapter is zero; the step was not trained \(learning rate 0\)",
        ),
        (
            lambda s: {k.replace("layers.1", "layers.9"): v for k, v in s.items()},
            r".*adapts 'model.layers.9.*', which the base does not have",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "layers.1" not in k},
            r"adapts 2 tensors, not the 4 of the store",
        ),
        (
            lambda s: {k: v * float("nan") for k, v in s.items()},
            r".*is NaN or infinite at element 0; expected finite",
        ),
        (
            lambda s: {k: v.bfloat16() for k, v in s.items()},
            r".*has rank 4, scale 1.5, bfloat16, linear; expected rank 4, scale 1.5, float32",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_the_reason(
    plain: Made, change: object, words: str, tmp_path: Path
) -> None:
    run = shutil.copytree(plain.source, tmp_path / "run")
    edit_tensors(run / "checkpoint-3", change)
    with pytest.raises(CheckpointError, match=rf"^step 3: .*{words}"):
        import_checkpoints(run, tmp_path / "s.zarr", base=plain.base)
    assert TrajectoryStore(tmp_path / "s.zarr").steps.tolist() == [1, 2]


def test_a_run_of_adapters_without_effect_is_refused(plain: Made, tmp_path: Path) -> None:
    run = shutil.copytree(plain.source, tmp_path / "run")
    for step in STEPS:
        edit_config(run / f"checkpoint-{step}", lora_alpha=0)
    with pytest.raises(
        CheckpointError,
        match=r"holds no whole checkpoint; step 1: .*has lora_alpha 0, so its delta is zero",
    ):
        import_checkpoints(run, tmp_path / "s.zarr", base=plain.base)


def test_labels_of_adapters_are_mapped_to_optimizer_steps(plain: Made, tmp_path: Path) -> None:
    store = import_checkpoints(
        plain.source, tmp_path / "s.zarr", base=plain.base, step_map="2"
    ).store
    assert store.steps.tolist() == [2 * step for step in STEPS]
    assert store.metrics()["label"].tolist() == STEPS


def test_a_scale_that_changes_during_the_run_is_refused(plain: Made, tmp_path: Path) -> None:
    run = shutil.copytree(plain.source, tmp_path / "run")
    edit_config(run / "checkpoint-2", lora_alpha=12)
    with pytest.raises(
        CheckpointError,
        match=r"step 2: the adapter of '.*' has rank 4, scale 3, .*; expected rank 4, scale 1.5",
    ):
        import_checkpoints(run, tmp_path / "s.zarr", base=plain.base)


def test_another_base_or_another_run_is_refused(
    plain: Made, plain_store: TrajectoryStore, tmp_path: Path
) -> None:
    out = shutil.copytree(plain_store.path, tmp_path / "s.zarr")
    run = shutil.copytree(plain.source, tmp_path / "run")
    edit_tensors(run / "checkpoint-8", lambda s: {k: v * 2 for k, v in s.items()})
    with pytest.raises(
        CheckpointError,
        match=r"step 8 of the run differs from the one recorded in .*, though step 5 is the same",
    ):
        import_checkpoints(run, out, base=plain.base)
    other = llama(tmp_path / "other", **{**VARIANTS["plain"], "target_modules": ["embed_tokens"]})
    base = load_file(other.base / "model.safetensors")
    save_file({k: v + 1 for k, v in base.items()}, other.base / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"base_layer.weight' differs from the base; the adapter was trained on another",
    ):
        import_checkpoints(other.source, tmp_path / "t.zarr", base=other.base)


def test_a_damaged_factor_is_named_by_step_and_tensor(
    plain_store: TrajectoryStore, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(plain_store.path, tmp_path / "s.zarr"))
    tensor = next(t for t in plain_store.layout.tensors if plain_store.layout.parts[t.part].factors)
    chunk = next((out / f"factors/{tensor.part}/c/2").iterdir())
    content = bytearray(chunk.read_bytes())
    content[40] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match=rf"step 3, tensor '{tensor.name}': cannot be read"):
        TrajectoryStore(out).verify()
    chunk.unlink()
    with pytest.raises(StoreError, match=rf"step 3, tensor '{tensor.name}'"):
        TrajectoryStore(out).verify()


def test_adapters_are_asked_only_of_a_store_that_has_them(
    bfloat16_store: TrajectoryStore, tmp_path: Path
) -> None:
    for ask in (
        lambda: checkout_adapter(bfloat16_store, 3, tmp_path / "a"),
        lambda: extrapolate(bfloat16_store, [9], tmp_path, output=Output(adapter=0)),
    ):
        with pytest.raises(
            StoreError,
            match=r"holds whole checkpoints, no adapters; expected a store of PEFT adapters",
        ):
            ask()


def test_a_rank_that_is_none_is_refused(plain_store: TrajectoryStore, tmp_path: Path) -> None:
    with pytest.raises(RelexkitError, match=r"--adapter -1 is not a rank; expected 1 or more"):
        extrapolate(plain_store, [9], tmp_path, output=Output(adapter=-1))


def test_the_commands_write_adapters(
    plain_store: TrajectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "predicted")
    assert (
        main(["extrapolate", plain_store.path, "--to", "12", "-o", out, "--adapter", "2", "--json"])
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert [(entry["target"], entry["rank"], entry["already"]) for entry in document] == [
        (12.0, 2, False)
    ]
    assert 0 < document[0]["error"] < 1
    assert main(["extrapolate", plain_store.path, "--to", "12", "-o", out, "--adapter", "2"]) == 0
    assert capsys.readouterr().out.endswith("(was there already)\n")
    assert main(["extrapolate", plain_store.path, "--to", "12", "-o", out, "--adapter", "two"]) == 1
    assert "--adapter 'two' is not a rank" in capsys.readouterr().err
    assert (
        main(["checkout", plain_store.path, "--step", "5", "-o", str(tmp_path / "a"), "--adapter"])
        == 0
    )
    assert "(bit for bit)" in capsys.readouterr().out
    assert main(["checkout", plain_store.path, "--step", "5", "-o", str(tmp_path / "m")]) == 0
    assert "(merged; --adapter writes the adapter itself)" in capsys.readouterr().out
    assert main(["info", plain_store.path]) == 0
    assert "factors" in capsys.readouterr().out
