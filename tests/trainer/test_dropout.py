"""Dropout is off in the update unless asked for: what is updated is the policy that samples."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, tiny_tokenizer

from relexkit import TrajectoryStore
from relexkit.trainer.config import G2DConfig, GRPOConfig
from relexkit.trainer.experiments.dpo import reference_margins, train_dpo
from relexkit.trainer.experiments.preferences import Pair
from relexkit.trainer.loop.rollout_log import read_rollouts
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.setup import load_model, own_dropout

CPU = torch.device("cpu")
SMALL = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": transformers.GPT2Config(
        n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5, **SMALL
    ),
    "opt": transformers.OPTConfig(  # functional dropout, and layers that are left out
        ffn_dim=48,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
        **WIDTHS,
        **SMALL,
    ),
    "falcon": transformers.FalconConfig(  # reads its rates from the configuration in each pass
        hidden_dropout=0.5, attention_dropout=0.5, **WIDTHS, **SMALL
    ),
    "llama": transformers.LlamaConfig(
        intermediate_size=48, max_position_embeddings=64, attention_dropout=0.5, **WIDTHS, **SMALL
    ),
}
"""One model of each way in which transformers' models come by their rates."""


def save_model(kind, folder):
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(MODELS[kind]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rates(config):
    found = config if isinstance(config, dict) else config.to_dict()
    return {name: value for name, value in found.items() if "drop" in name}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_in_training_mode_computes_what_it_samples_from(kind, tmp_path):
    folder = str(save_model(kind, tmp_path))
    ids = torch.arange(3, 13)[None]
    found = {}
    for disabled in (True, False):
        model, _ = load_model(folder, CPU, disable_dropout=disabled)
        sampled = model.eval()(ids).logits
        torch.manual_seed(0)
        found[disabled] = torch.equal(model.train()(ids).logits, sampled)
        assert rates(model.config) != rates(MODELS[kind]) if disabled else True
        with own_dropout(model):
            assert rates(model.config) == rates(MODELS[kind])
    assert found == {True: True, False: False}


def run(base, output, **options):
    task = base / "t.jsonl"
    task.write_text(
        "".join(json.dumps({"prompt": f"{n}+{n}=", "answer": "x"}) + "\n" for n in range(24))
    )
    (base / "r.py").write_text(
        "def score(completion, answer, row): return len(completion) % 3 / 2\n"
    )
    config = GRPOConfig(
        model=str(base),
        task={
            "name": "file",
            "path": str(task),
            "reward": f"{base}/r.py:score",
            "num_validation": 4,
        },
        output=str(output),
        max_steps=1,
        generation_batch_size=16,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-12,
        beta=0.04,
        **options,
    )
    return train(config)


@pytest.mark.parametrize(
    "options", [{}, {"steps_per_generation": 2}, {"gradient_checkpointing": True}], ids=str
)
def test_the_first_step_is_on_policy_and_is_logged_as_sampled(options, tmp_path):
    base = save_model("gpt2", tmp_path / "base")
    folder = run(base, tmp_path / "run", **options)
    (entry,) = read_log(folder)
    # k3 of two equal policies is 0 but for the rounding of another batch's shape, squared
    assert abs(entry["kl"]) < 1e-10
    assert entry["clip_ratio/region_mean"] == 0
    assert_logged_as_sampled(folder, base)
    given = json.loads((base / "config.json").read_text())
    for saved in (
        json.loads((folder / "final" / "config.json").read_text()),
        json.loads(TrajectoryStore(folder / "run.zarr").files()["config.json"]),
    ):
        assert rates(saved) == rates(given)


def assert_logged_as_sampled(folder, base):
    model, _ = load_model(str(base), CPU)
    for row in read_rollouts(folder / "rollouts").to_pylist():
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        count = len(row["completion_ids"])
        with torch.no_grad():
            logp = model.eval()(ids).logits[0, -count - 1 : -1].log_softmax(-1)
        expected = logp[range(count), ids[0, -count:]]
        # another shape of the batch moves the last bits of logits of order 1
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, atol=1e-5, rtol=0)


def test_with_dropout_the_log_still_holds_the_sampling_policy(tmp_path):
    base = save_model("gpt2", tmp_path / "base")
    folder = run(base, tmp_path / "run", disable_dropout=False)
    assert read_log(folder)[0]["kl"] > 1e-4
    assert_logged_as_sampled(folder, base)


def test_the_first_loss_of_dpo_is_log_2(tmp_path):
    base = str(save_model("gpt2", tmp_path))
    ids = {"prompt_ids": [7, 3, 7, 4], "chosen_ids": [8, 1], "rejected_ids": [9, 1]}
    pair = Pair(problem="p", prompt="1+1=", chosen="2", rejected="3", margin=0.0, **ids)
    pairs = [pair] * 4
    config = G2DConfig(learning_rate=1e-12, train_batch_size=4)
    model, _ = load_model(base, CPU)
    margins = reference_margins(model, pairs, config, 0, False)
    (entry,) = train_dpo(model, pairs, margins, config, 0)
    assert entry["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
