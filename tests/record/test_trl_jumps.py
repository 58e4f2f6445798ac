"""Jumps in a real TRL run: tested by its own rollouts, kept or taken back, resumed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stores import store_of
from tiny_models import tiny_model, tiny_tokenizer

from relexkit import RelexkitError, TrajectoryStore
from relexkit.assess.jump_decision import Decision, FixedJumps, Jumps, RewardTest
from relexkit.gram_matrix.jumps import JUMP_METRIC, attempts, jumps, step_after
from relexkit.gram_matrix.segment import segment_gram
from relexkit.record import jumping
from relexkit.record.trl_rollouts import Rollouts

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and TRL, about themselves

EVERY, LENGTH = 12, 6
BETTER, WORSE = RewardTest(0.2, 0.3, 0.9), RewardTest(0.3, 0.1, 0.001)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Files that the trainers left open are closed, with a warning, here."""
    yield
    gc.collect()


def trl_trainer(folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        "max_steps": 16,
        "save_steps": 5,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        **options,
    }
    return GRPOTrainer(
        model=tiny_model(),
        args=GRPOConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **settings,
        ),
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **_: [float(c.count("1")) for c in completions],
        # one epoch: TRL itself goes on with other prompts where it resumes in a second one
        train_dataset=Dataset.from_dict({"prompt": [f"{n:02d}>" for n in range(120)]}),
    )


def run(folder: Path, rule: Any, resume: bool = False, **options: Any) -> Any:
    """A run of 16 steps of the trainer, recorded; the trainer after it."""
    from relexkit.record.callback import RecorderCallback

    trainer = trl_trainer(folder / "run", **options)
    trainer.add_callback(RecorderCallback(folder / "s.zarr", jumps=rule, trainer=trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def rewards(trainer: Any) -> list[float]:
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[float]]:
    """Weights and rewards of a run without jumps."""
    trainer = trl_trainer(tmp_path_factory.mktemp("plain"))
    trainer.train()
    return weights(trainer), rewards(trainer)


def force(monkeypatch: pytest.MonkeyPatch, verdict: RewardTest) -> list[np.ndarray]:
    """Every question is answered with a jump, every test with ``verdict``; the rewards that it was
    given.
    """
    given: list[np.ndarray] = []

    def test(before_PG: np.ndarray, after_PG: np.ndarray) -> RewardTest:
        given.extend((before_PG, after_PG))
        return verdict

    decision = Decision(LENGTH, "two-point", "forced", {})
    monkeypatch.setattr(Jumps, "decide", lambda self, segment, most: decision)
    monkeypatch.setattr(jumping, "reward_test", test)
    return given


def test_a_jump_that_is_taken_back_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: tuple[torch.Tensor, list[float]]
) -> None:
    given = force(monkeypatch, WORSE)
    trainer = run(tmp_path, Jumps(every=EVERY))
    assert [g.shape for g in given] == [(4, 4), (4, 4)]
    assert torch.equal(weights(trainer), plain[0])
    assert rewards(trainer) == plain[1]
    assert float(given[0].mean()) == pytest.approx(plain[1][EVERY])  # of the step that followed
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert store.steps.tolist() == list(range(1, 17))
    assert [(a.step, a.outcome) for a in attempts(store)] == [(EVERY, "taken back")]
    assert trainer._generate_and_score_completions.__func__ is (
        type(trainer)._generate_and_score_completions
    )


def test_a_jump_that_stays_is_recorded_and_a_resumed_run_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: tuple[torch.Tensor, list[float]]
) -> None:
    given = force(monkeypatch, BETTER)
    trainer = run(tmp_path / "whole", Jumps(every=EVERY))
    store = TrajectoryStore(tmp_path / "whole" / "s.zarr")
    assert store.steps.tolist() == [*range(1, 13), *range(18, 23)]
    assert jumps(store).tolist() == [18]
    assert [step_after(store, trained) for trained in (12, 13, 16)] == [12, 19, 22]
    assert rewards(trainer)[:EVERY] == plain[1][:EVERY]
    assert rewards(trainer)[EVERY] == pytest.approx(float(given[1].mean()))
    assert not torch.equal(weights(trainer), plain[0])
    for stopped in (11, 14):  # before the jump, and after it
        place = tmp_path / f"parted-{stopped}"
        run(place, Jumps(every=EVERY), max_steps=stopped)
        again = run(place, Jumps(every=EVERY), resume=True)
        assert torch.equal(weights(again), weights(trainer))
        parted = TrajectoryStore(place / "s.zarr")
        np.testing.assert_array_equal(parted.checksums(), store.checksums())
        np.testing.assert_array_equal(parted.steps, store.steps)


def test_the_decision_is_that_of_the_same_object_on_the_same_record(tmp_path: Path) -> None:
    rule = Jumps(every=EVERY)
    run(tmp_path, rule, max_steps=13)
    store = TrajectoryStore(tmp_path / "s.zarr")
    (attempt,) = attempts(store)
    expected = rule.decide(segment_gram(store, 0).until(EVERY), 2**31)
    assert (attempt.length, attempt.method) == (expected.length, expected.method)
    for name, value in expected.evidence.items():
        assert attempt.numbers[name] == value


def test_fixed_jumps_need_no_rollouts(tmp_path: Path) -> None:
    run(tmp_path, FixedJumps(train_steps=4, jump_steps=3), max_steps=9)
    store = TrajectoryStore(tmp_path / "s.zarr")
    assert store.steps.tolist() == [1, 2, 3, 4, 7, 8, 9, 10, 11, 14, 15]
    assert jumps(store).tolist() == [7, 14]


def test_a_jump_is_only_tried_where_an_optimizer_step_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generations of three micro-batches, steps of four: only every third step begins with one."""
    force(monkeypatch, BETTER)
    run(
        tmp_path,
        Jumps(every=EVERY),
        max_steps=17,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        generation_batch_size=12,
    )
    found = attempts(TrajectoryStore(tmp_path / "s.zarr"))
    assert [attempt.step % 3 for attempt in found] == [0]


def test_what_cannot_jump_is_refused_before_the_training(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from test_callback import small_trainer

    from relexkit.record.callback import RecorderCallback

    with pytest.raises(RelexkitError, match="expected every=1 and trainer="):
        RecorderCallback(tmp_path / "s.zarr", jumps=Jumps())
    with pytest.raises(RelexkitError, match="expected every=1 and trainer="):
        RecorderCallback(
            tmp_path / "s.zarr", jumps=FixedJumps(train_steps=4, jump_steps=1), every=2
        )
    other = small_trainer(tmp_path / "run", None or RecorderCallback(tmp_path / "o.zarr"))
    with pytest.raises(RelexkitError, match="Trainer has no rollouts to test a jump with"):
        Rollouts(other, lambda sample: None)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RelexkitError, match="leave the jumps out, or the adapter"):
        jumping.refuse_jumps_of(adapted)
    sampling = {"_generate_and_score_completions": None, "_calculate_rewards": None}
    with pytest.raises(RelexkitError, match="expected use_vllm=False"):
        Rollouts(SimpleNamespace(**sampling, use_vllm=True), lambda sample: None)


@pytest.mark.parametrize("kept_by", ["FSDP1", "ZeRO-3", "ZeRO-2"])
def test_weights_that_are_kept_elsewhere_are_refused(kept_by: str) -> None:
    model = tiny_model()
    jumping.refuse_jumps_of(model)
    weight = next(model.parameters())
    if kept_by == "ZeRO-3":
        weight.ds_id = 0
    elif kept_by == "ZeRO-2":
        weight._hp_mapping = None
    else:
        import torch.distributed as dist
        from torch.distributed.fsdp import FullyShardedDataParallel

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        finally:
            dist.destroy_process_group()
    with pytest.raises(RelexkitError, match="expected a plain model, DDP, or FSDP2"):
        jumping.refuse_jumps_of(model)


def test_the_step_of_so_many_trained_ones(tmp_path: Path) -> None:
    steps = np.array([1, 2, 5, 6, 9, 10])
    landed = np.where(np.isin(steps, (5, 9)), 3.0, np.nan)
    deltas = {"w": np.ones((6, 4), np.float32)}
    store = store_of(tmp_path / "s.zarr", deltas, steps, metrics={JUMP_METRIC: landed})
    assert [step_after(store, trained) for trained in (1, 2, 3, 4)] == [1, 2, 6, 10]
