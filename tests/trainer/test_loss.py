"""The surrogate against direct formulas, and against TRL's loss and its gradients on identical
inputs.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.credit.loss import (
    Denominators,
    LossInputs,
    LossOutputs,
    k3_divergence,
    policy_loss,
)
from relexkit.trainer.policy.log_probabilities import Batch, token_logprobs

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def config(**options: Any) -> GRPOConfig:
    return GRPOConfig(model="m", task="t", output="o", **{"max_completion_length": 5, **options})


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Four completions of 5, 3, 0 and 1 tokens; the ratios lie on both sides of the clip range,
    advantages of both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    mask_BT = (torch.arange(5) < torch.tensor([5, 3, 0, 1])[:, None]).float()
    logp_BT = -torch.rand(4, 5, generator=generator) * 2
    return {
        "logp": logp_BT,
        "mask": mask_BT,
        "advantage": torch.tensor([1.0, -0.7, 0.4, -1.2]),
        "old": logp_BT + torch.randn(4, 5, generator=generator) * 0.5,
        "ref": logp_BT + torch.randn(4, 5, generator=generator) * 0.3,
    }


def counted(mask_BT: torch.Tensor) -> Denominators:
    tokens = float(mask_BT.sum())
    return Denominators(sequences=float(len(mask_BT)), tokens=tokens, generation_tokens=tokens)


def direct_loss(given: dict[str, torch.Tensor], options: GRPOConfig) -> float:
    """Token by token in Python's floats, from the formulas."""
    low, high = (
        1 - options.epsilon,
        1 + (options.epsilon if options.epsilon_high is None else options.epsilon_high),
    )
    sums, lengths = [], []
    for logp, old, ref, mask, advantage in zip(
        *(given[name].tolist() for name in ("logp", "old", "ref", "mask", "advantage")), strict=True
    ):
        length = int(sum(mask))
        differences = [a - b for a, b in zip(logp[:length], old[:length], strict=True)]
        if options.importance_sampling_level == "sequence" and length:
            differences = [sum(differences) / length] * length
        total = 0.0
        for token in range(length):
            ratio = math.exp(differences[token])
            first = ratio if options.delta is None else min(ratio, options.delta)
            total -= min(first * advantage, min(max(ratio, low), high) * advantage)
            gap = ref[token] - logp[token]
            correction = ratio if options.use_bias_correction_kl else 1.0
            total += options.beta * (math.exp(gap) - gap - 1) * correction
        sums.append(total)
        lengths.append(length)
    if options.loss_type == "grpo":
        return sum(
            total / max(1, length) for total, length in zip(sums, lengths, strict=True)
        ) / len(sums)
    if options.loss_type == "dr_grpo":
        return sum(sums) / (len(sums) * options.max_completion_length)
    return sum(sums) / sum(lengths)


def our_loss(
    given: dict[str, torch.Tensor], options: GRPOConfig, rows: list[int] | None = None
) -> LossOutputs:
    chosen = rows or list(range(len(given["mask"])))
    batch = LossInputs(
        logp_BT=given["logp"][chosen],
        advantage_B=given["advantage"][chosen],
        mask_BT=given["mask"][chosen],
        old_logp_BT=given["old"][chosen],
        ref_logp_BT=given["ref"][chosen],
    )
    return policy_loss(batch, counted(given["mask"]), options)


WIDE = {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.5, "use_bias_correction_kl": True}

COMBINATIONS = [
    {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, **clip}
    for loss_type, level, beta, clip in itertools.product(
        LOSS_TYPES,
        ("token", "sequence"),
        (0.0, 0.1),
        ({}, WIDE),
    )
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_loss_equals_the_direct_formula(options):
    given = inputs()
    assert float(our_loss(given, config(**options)).loss) == pytest.approx(
        direct_loss(given, config(**options)), rel=1e-5
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_step(loss_type):
    given, options = inputs(), config(loss_type=loss_type, beta=0.1)
    parts = [our_loss(given, options, rows) for rows in ([2, 0], [3], [1])]
    torch.testing.assert_close(sum(part.loss for part in parts), our_loss(given, options).loss)
    for name, value in our_loss(given, options).sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value)


def test_on_policy_gradient_is_the_policy_gradient():
    given = inputs()
    logp_BT = given["logp"].clone().requires_grad_()
    options = config(loss_type="dr_grpo")
    batch = LossInputs(logp_BT=logp_BT, advantage_B=given["advantage"], mask_BT=given["mask"])
    policy_loss(batch, counted(given["mask"]), options).loss.backward()
    expected_BT = -given["advantage"][:, None] * given["mask"] / (4 * options.max_completion_length)
    torch.testing.assert_close(logp_BT.grad, expected_BT)


def test_clip_counts_are_those_of_tokens_whose_gradient_is_cut():
    given = {
        "logp": torch.tensor([[0.0, 0.0, 0.0]] * 2).log_softmax(-1),
        "mask": torch.tensor([[1.0, 1.0, 0.0]] * 2),
        "advantage": torch.tensor([1.0, -1.0]),
    }
    old_BT = given["logp"] - torch.tensor([[0.5, -0.5, 0.5]] * 2)  # ratios 1.65, 0.61, (1.65)
    logp_BT = given["logp"].clone().requires_grad_()
    batch = LossInputs(
        logp_BT=logp_BT,
        advantage_B=given["advantage"],
        mask_BT=given["mask"],
        old_logp_BT=old_BT,
    )
    outputs = policy_loss(batch, counted(given["mask"]), config())
    outputs.loss.backward()
    assert (outputs.sums["clip_low"], outputs.sums["clip_high"]) == (1, 1)
    assert (logp_BT.grad != 0).tolist() == [[False, True, False], [True, False, False]]


def test_the_kl_estimator_is_never_negative_and_zero_at_the_reference():
    logp, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -3.0])
    expected = [
        math.exp(r - q) - (r - q) - 1 for q, r in zip(logp.tolist(), ref.tolist(), strict=True)
    ]
    torch.testing.assert_close(k3_divergence(logp, ref), torch.tensor(expected))
    assert k3_divergence(logp, logp).abs().max() == 0


def test_nothing_counts_when_every_completion_is_masked():
    given = inputs()
    nothing = torch.zeros_like(given["mask"])
    for loss_type in LOSS_TYPES:
        logp_BT = given["logp"].clone().requires_grad_()
        batch = LossInputs(logp_BT=logp_BT, advantage_B=given["advantage"], mask_BT=nothing)
        outputs = policy_loss(batch, counted(nothing), config(loss_type=loss_type))
        outputs.loss.backward()
        assert outputs.loss.item() == 0
        assert (logp_BT.grad == 0).all()


def test_a_ratio_that_overflows_stays_finite():
    given = inputs()
    batch = LossInputs(
        logp_BT=given["logp"],
        advantage_B=given["advantage"],
        mask_BT=given["mask"],
        old_logp_BT=given["logp"] - 500,
        ref_logp_BT=given["logp"] + 500,
    )
    outputs = policy_loss(batch, counted(given["mask"]), config(beta=0.1))
    assert torch.isfinite(outputs.loss)


# -- against TRL -----------------------------------------------------------------------------------


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=11, max_position_embeddings=32, initializer_range=0.5, **shape)
    )


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """TRL's trainer around a tiny model, used only for its loss."""
    import tokenizers
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig as TrlConfig
    from trl import GRPOTrainer

    words = {f"w{index}": index for index in range(11)}
    word_level = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(word_level), pad_token="w0", eos_token="w1"
    )
    folder = tmp_path_factory.mktemp("model")
    tiny_model(0).save_pretrained(
        folder
    )  # with beta TRL loads its reference from where the model came from
    with warnings.catch_warnings():  # deprecations among TRL and transformers are not ours
        warnings.simplefilter("ignore")
        options = TrlConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=5,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            beta=0.1,
            temperature=0.8,
        )
        return GRPOTrainer(
            model=LlamaForCausalLM.from_pretrained(folder),
            args=options,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": ["w2 w3"] * 8}),
        )


def trl_batch(seed: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts and right-padded completions, an empty one among them, as TRL keeps
    them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(2, 11, shape, generator=generator)

    prompt_mask = (torch.arange(4) >= 4 - torch.tensor([4, 2, 3, 1])[:, None]).long()
    completion_mask = (torch.arange(5) < torch.tensor([5, 3, 0, 1])[:, None]).long()
    return {
        "prompt_ids": draw(4, 4) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": draw(4, 5) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.2]),
        "num_items_in_batch": completion_mask.sum(),
    }


def as_our_batch(batch: dict[str, torch.Tensor]) -> Batch:
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return Batch(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        completion_ids=batch["completion_ids"],
        mask=batch["completion_mask"].float(),
    )


WITH_BONUS = [{"loss_type": loss_type, "entropy_coef": 0.3} for loss_type in LOSS_TYPES]


@pytest.mark.parametrize("options", COMBINATIONS + WITH_BONUS, ids=str)
def test_loss_and_gradients_equal_those_of_trl(trl_trainer, options):
    settings = config(temperature=0.8, **options)
    batch = trl_batch(3)
    model = trl_trainer.accelerator.unwrap_model(trl_trainer.model).train()
    with torch.no_grad():
        batch["old_per_token_logps"], _ = token_logprobs(
            tiny_model(1), as_our_batch(batch), 0.8, False
        )
        batch["ref_per_token_logps"], _ = token_logprobs(
            tiny_model(2), as_our_batch(batch), 0.8, False
        )
    trl_trainer.loss_type, trl_trainer.beta = settings.loss_type, settings.beta
    trl_trainer.importance_sampling_level = settings.importance_sampling_level
    trl_trainer.epsilon_low, trl_trainer.epsilon_high = settings.epsilon, settings.upper_epsilon
    trl_trainer.args.delta, trl_trainer.args.use_bias_correction_kl = (
        settings.delta,
        settings.use_bias_correction_kl,
    )
    trl_trainer.current_gradient_accumulation_steps = 1
    trl_trainer.entropy_coef = settings.entropy_coef
    trl_trainer._entropy_bonus_enabled = settings.entropy_coef > 0
    model.zero_grad()
    theirs = trl_trainer._compute_loss(model, batch)
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with_bonus = settings.entropy_coef > 0
    logp_BT, entropy_BT = token_logprobs(
        model, as_our_batch(batch), 0.8, False, entropy_gradient=with_bonus
    )
    same = LossInputs(
        logp_BT=logp_BT,
        advantage_B=batch["advantages"],
        mask_BT=batch["completion_mask"].float(),
        old_logp_BT=batch["old_per_token_logps"],
        ref_logp_BT=batch["ref_per_token_logps"],
        entropy_BT=entropy_BT,
    )
    ours = policy_loss(same, counted(same.mask_BT), settings)
    ours.loss.backward()
    # positions count from each row's first token here and from the padding there: rotary embeddings
    # see differences only
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-4, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_those_of_trl(trl_trainer, scale):
    """TRL computes them inside its generation; its own lines are not callable, so its trainer runs
    them on given rewards.
    """
    from relexkit.trainer.credit.advantage import group_advantages

    rewards = torch.tensor([0.0, 1.0, 0.25, 0.25, 1.0, 0.5, 0.0, 0.0])
    trl_trainer.scale_rewards = scale
    trl_trainer._calculate_rewards = lambda *_: rewards[:, None]
    trl_trainer.model.train()
    rows = [{"prompt": "w2 w3"} for _ in range(8)]
    found = trl_trainer._generate_and_score_completions(rows)["advantages"]
    torch.testing.assert_close(
        group_advantages(rewards.view(4, 2), scale).view(-1), found, rtol=1e-5, atol=1e-6
    )
