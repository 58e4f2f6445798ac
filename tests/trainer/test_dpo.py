"""DPO: losses and gradients equal TRL's, micro-batches that change nothing, and a model that learns
its pairs.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

from relexkit import RelexkitError
from relexkit.trainer.config import G2DConfig, build_config
from relexkit.trainer.experiments.dpo import dpo_loss, reference_margins, train_dpo
from relexkit.trainer.experiments.preferences import Pair

PAD = VOCABULARY.index("<pad>")


def pairs(count: int = 6, seed: int = 0) -> list[Pair]:
    """Pairs of random tokens: prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, len(VOCABULARY), (length,), generator=generator).tolist()

    return [
        Pair(
            problem=str(i),
            prompt="",
            chosen="",
            rejected="",
            prompt_ids=tokens(2, 6),
            chosen_ids=tokens(1, 6),
            rejected_ids=tokens(1, 6),
            margin=0.0,
        )
        for i in range(count)
    ]


def our_loss_and_gradient(
    model: Any, reference: Any, data: list[Pair], **options: Any
) -> tuple[float, torch.Tensor]:
    """One step on all pairs with a rate of nearly zero, so that the gradients stay to be
    looked at.
    """
    config = G2DConfig(
        learning_rate=1e-30, train_batch_size=len(data), max_grad_norm=1e9, **options
    )
    margins = reference_margins(reference, data, config, PAD, False)
    (metrics,) = train_dpo(model, data, margins, config, PAD)
    return metrics["loss"], torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def make(loss_type: str, label_smoothing: float) -> Any:
        arguments = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            report_to=[],
            use_cpu=True,
            bf16=False,
            beta=0.3,
            loss_type=[loss_type],
            label_smoothing=label_smoothing,
            precompute_ref_log_probs=False,
            disable_dropout=True,
        )
        rows = Dataset.from_dict({"prompt": ["1+1="], "chosen": ["2"], "rejected": ["3"]})
        return DPOTrainer(
            tiny_model(0),
            ref_model=tiny_model(1),
            args=arguments,
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
        )

    return make


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning"
)  # TRL's own use of the former name
@pytest.mark.parametrize(
    ("loss_type", "smoothing", "average", "count"),
    [
        ("sigmoid", 0.0, False, 6),
        ("sigmoid_norm", 0.0, True, 6),
        ("aot_unpaired", 0.2, False, 1),
    ],  # of one pair, aot sorts nothing
)
def test_loss_and_gradients_equal_those_of_trl(trl, loss_type, smoothing, average, count):
    data = pairs(count)
    trainer = trl(loss_type, smoothing)
    rows = [
        {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids}
        for p in data
    ]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    found, gradient = our_loss_and_gradient(
        tiny_model(0),
        tiny_model(1).eval(),
        data,
        beta=0.3,
        label_smoothing=smoothing,
        average_log_prob=average,
    )
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_loss_by_hand():
    margin, reference = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.0))]
    torch.testing.assert_close(dpo_loss(margin, reference, 0.5), torch.tensor(expected))
    smoothed = [
        0.9 * math.log(1 + math.exp(-0.5)) + 0.1 * math.log(1 + math.exp(0.5)),
        0.9 * math.log(1 + math.exp(1.0)) + 0.1 * math.log(1 + math.exp(-1.0)),
    ]
    torch.testing.assert_close(dpo_loss(margin, reference, 0.5, 0.1), torch.tensor(smoothed))


def test_micro_batches_change_rounding_only():
    whole = our_loss_and_gradient(
        tiny_model(0), tiny_model(1).eval(), pairs(8), micro_batch_tokens=10_000
    )
    split = our_loss_and_gradient(
        tiny_model(0), tiny_model(1).eval(), pairs(8), micro_batch_tokens=1
    )
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    assert (split[1] - whole[1]).norm() < 1e-5 * whole[1].norm()


def test_a_model_learns_its_pairs_and_the_same_seed_gives_the_same_bits():
    data = pairs(12)
    config = G2DConfig(learning_rate=1e-3, num_train_epochs=8, train_batch_size=5, beta=0.5)
    models = [tiny_model(0), tiny_model(0)]
    margins = reference_margins(deepcopy(models[0]).eval(), data, config, PAD, False)
    logs = [list(train_dpo(model, data, margins, config, PAD)) for model in models]
    assert len(logs[0]) == 8 * 3
    assert logs[0][0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert logs[0][-1]["rewards/accuracies"] == 1
    assert logs[0] == logs[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
    other = tiny_model(0)
    list(train_dpo(other, data, margins, G2DConfig(**{**vars(config), "seed": 1}), PAD))
    assert not torch.equal(next(other.parameters()), next(models[0].parameters()))


def test_a_loss_that_is_not_finite_stops():
    model, data = tiny_model(0), pairs(4)
    with pytest.raises(RelexkitError, match="DPO step 1: the loss is nan"):
        next(train_dpo(model, data, torch.full((4,), float("nan")), G2DConfig(), PAD))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta: 0.0 is too small"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 is too small; expected at least 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: 0.5 is out of range"),
        ({"min_difficulty": 0.6, "max_difficulty": 0.5}, "the smaller first"),
        ({"epochs": 3}, "option 'epochs' is unknown"),
        ({"pairs": "mixed"}, "pairs: 'mixed' does not fit"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type: 'step' is unknown"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(options, message):
    with pytest.raises(RelexkitError, match=message):
        build_config(options, G2DConfig)
