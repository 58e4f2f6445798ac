"""The training loop: repeatable, resumable, the same in two processes, and clear about what it
cannot do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from relexkit import RelexkitError, TrajectoryStore, checkout
from relexkit.cli import main
from relexkit.store import durable
from relexkit.trainer.config import GRPOConfig, dump_config
from relexkit.trainer.loop import step as step_module
from relexkit.trainer.loop.generation import prompt_numbers
from relexkit.trainer.loop.rollout_log import read_rollouts
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.state import last_state
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.log_probabilities import token_logprobs
from relexkit.trainer.policy.setup import learning_rate
from relexkit.trainer.tasks import load_task

TASK = {"name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make"}
TIMES = ("step_seconds", "tokens_per_second", "advice")  # advice comes when it is there


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def settings(base: Path, output: Path, **options: Any) -> GRPOConfig:
    defaults = {
        "max_steps": 3,
        "generation_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "device": "cpu",
    }
    return GRPOConfig(model=str(base), output=str(output), **{"task": TASK, **defaults, **options})


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "final" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def logged(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if key not in TIMES}
        for entry in read_log(folder)
    ]


def assert_same_run(first: Path, second: Path) -> None:
    """Bit for bit: the trained weights, the store, every rollout, and every metric that is not a
    time.
    """
    assert torch.equal(weights(first), weights(second))
    stores = [TrajectoryStore(folder / "run.zarr") for folder in (first, second)]
    stores[1].verify()
    np.testing.assert_array_equal(stores[0].steps, stores[1].steps)
    np.testing.assert_array_equal(stores[0].checksums(), stores[1].checksums())
    assert stores[0].attributes["base"]["sha256"] == stores[1].attributes["base"]["sha256"]
    for name, values in stores[0].metrics().items():
        np.testing.assert_array_equal(values, stores[1].metrics()[name], err_msg=name)
    assert read_rollouts(first / "rollouts").equals(read_rollouts(second / "rollouts"))
    assert logged(first) == logged(second)


def test_the_same_configuration_gives_the_same_bits(base, tmp_path):
    folders = [
        train(settings(base, tmp_path / name, eval_steps=2, eval_num_problems=5))
        for name in ("first", "second")
    ]
    assert_same_run(*folders)
    other = train(settings(base, tmp_path / "other", seed=1))
    assert not torch.equal(weights(other), weights(folders[0]))


def test_what_a_run_leaves(base, tmp_path):
    folder = train(settings(base, tmp_path / "run", eval_steps=3, eval_num_problems=5))
    entries = read_log(folder)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert 0 <= entries[-1]["eval/accuracy"] <= 1
    assert "eval/accuracy" not in entries[0]
    table = read_rollouts(folder / "rollouts").to_pandas()
    assert len(table) == 3 * 16
    for (_, group), entry in zip(table.groupby("step"), entries, strict=True):
        assert group.reward.mean() == pytest.approx(entry["reward"])
        assert [len(row) for row in group.logprobs] == [len(row) for row in group.completion_ids]
        per_prompt = group.advantage.to_numpy().reshape(-1, 4)
        np.testing.assert_allclose(per_prompt.sum(axis=1), 0, atol=1e-5)
        assert group.problem.nunique() == 4
    store = TrajectoryStore(folder / "run.zarr")
    assert store.steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(store.metrics()["reward"], [entry["reward"] for entry in entries])
    assert not set(TIMES) & set(store.metric_names())
    recorded = load_file(checkout(store, 3, tmp_path / "three") / "model.safetensors")
    final = load_file(folder / "final" / "model.safetensors")
    started = load_file(base / "model.safetensors")
    for name, tensor in final.items():  # float deltas of ten mantissa bits
        error, delta = (recorded[name] - tensor).norm(), (tensor - started[name]).norm()
        assert error <= 2**-10 * delta, name
    assert list((folder / "events").iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_generation": 2},
        {"num_iterations": 2},
        {"beta": 0.5},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_splitting_a_step_into_micro_batches_changes_rounding_only(base, tmp_path, options):
    started = load_file(base / "model.safetensors")
    start = torch.cat([started[name].flatten() for name in sorted(started)])
    steps = 2
    found = [
        weights(
            train(
                settings(
                    base,
                    tmp_path / str(tokens),
                    max_steps=steps,
                    micro_batch_tokens=tokens,
                    **options,
                )
            )
        )
        for tokens in (1, 10_000)
    ]
    # AdamW divides by the root of the second moment, so where a gradient is nearly zero its
    # rounding shows
    limit = 0.2 if options.get("bf16") else 1e-2
    assert (found[0] - found[1]).norm() < limit * (found[1] - start).norm()


def test_options_have_effects(base, tmp_path):
    plain = weights(train(settings(base, tmp_path / "plain")))
    changed = [
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"beta": 0.5},
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"num_iterations": 2},
        {"num_iterations": 2, "importance_sampling_level": "sequence"},
        {"num_iterations": 2, "epsilon": 1e-4},
        {"mask_truncated_completions": True},
        {"temperature": 0.5},
        {"top_k": 3},
        {"lr_scheduler_type": "linear"},
        {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
        {"weight_decay": 0.1},
        {"max_grad_norm": 1e-3},
        {"adam_beta1": 0.5},
        {"bf16": True},
    ]
    seen = [plain]
    for number, options in enumerate(changed):
        found = weights(train(settings(base, tmp_path / str(number), record_every=0, **options)))
        assert all(not torch.equal(found, other) for other in seen), options
        seen.append(found)


def test_nothing_moves_when_every_completion_is_truncated_and_masked(base, tmp_path):
    options = {
        "max_completion_length": 1,
        "mask_truncated_completions": True,
        "top_k": 1,
        "max_steps": 1,
    }
    folder = train(settings(base, tmp_path / "run", **options))
    if read_log(folder)[0]["completions/clipped_ratio"] < 1:
        pytest.fail("the model should not end at once: choose another seed for it")
    started = load_file(base / "model.safetensors")
    for name, tensor in load_file(folder / "final" / "model.safetensors").items():
        assert torch.equal(tensor, started[name]), name


def test_prompts_come_once_an_epoch_in_a_new_order():
    config = GRPOConfig(
        model="m", task="t", output="o", generation_batch_size=12, num_generations=4
    )
    taken = [
        number for generation in range(10) for number in prompt_numbers(10, config, generation)
    ]
    epochs = [taken[begin : begin + 10] for begin in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers(schedule):
    from transformers import get_scheduler

    config = GRPOConfig(
        model="m",
        task="t",
        output="o",
        lr_scheduler_type=schedule,
        warmup_steps=3,
        max_steps=10,
        learning_rate=0.5,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=10)
    for step in range(1, 11):
        assert learning_rate(config, step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "options", [{}, {"mask_truncated_completions": True}, {"gradient_noise_parts": 2}], ids=str
)
def test_rows_without_an_advantage_are_left_out_of_the_backward_pass(
    base, tmp_path, monkeypatch, options
):
    """Against a run in which every row takes it: same weights and log up to rounding, and fewer
    rows with a gradient.
    """
    trained: dict[str, list[int]] = {}

    def run(name: str) -> Path:
        counts = trained.setdefault(name, [])

        def counted(model, batch, *rest, **options):
            counts.append(len(batch.mask) * torch.is_grad_enabled())
            return token_logprobs(model, batch, *rest, **options)

        monkeypatch.setattr(step_module, "token_logprobs", counted)
        few = {
            "name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make_easy"
        }  # groups that are all right or all wrong
        return train(
            settings(
                base, tmp_path / name, task=few, max_steps=5, max_completion_length=8, **options
            )
        )

    skipping = run("skipping")
    grouped = step_module._grouped
    monkeypatch.setattr(
        step_module,
        "_grouped",
        lambda config, rows, trains: grouped(config, rows, _all_train(trains)),
    )
    whole = run("whole")
    started = load_file(base / "model.safetensors")
    start = torch.cat([started[name].flatten() for name in sorted(started)])
    found, expected = (weights(folder) - start for folder in (skipping, whole))
    assert (found - expected).norm() < 1e-3 * expected.norm()
    for first, second in zip(logged(skipping), logged(whole), strict=True):
        for name, value in second.items():
            assert first[name] == (
                value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True)
            ), name
    assert any(0 < entry["frac_reward_zero_std"] < 1 for entry in logged(whole))
    assert sum(trained["whole"]) == 5 * 16
    assert 0 < sum(trained["skipping"]) < 5 * 16


def _all_train(trains: list[bool]) -> list[bool]:
    trains[:] = [True] * len(trains)  # the step looks here whether a micro-batch trains
    return trains


def test_a_step_without_any_advantage_coasts_on_momentum(base, tmp_path):
    """As TRL's does on a gradient of zero: the second step moves by what AdamW remembers of the
    first.
    """
    sometimes = {"name": f"{Path(__file__).parents[1] / 'dense_task.py'}:make_vanishing"}
    folder = train(
        settings(base, tmp_path / "run", task=sometimes, max_steps=2, num_generations=16)
    )
    entries = logged(folder)
    assert [entry["frac_reward_zero_std"] for entry in entries] == [0.0, 1.0]
    assert entries[1]["grad_norm"] == 0
    start, first, second = (
        checkout(TrajectoryStore(folder / "run.zarr"), s, tmp_path / str(s)) for s in (0, 1, 2)
    )
    before, middle, after = (
        load_file(path / "model.safetensors") for path in (start, first, second)
    )
    for name, tensor in after.items():
        # AdamW: first lr sign(g); then m = 0.9 * 0.1 g / (1 - 0.9^2) over sqrt of v = 0.999 * 0.001
        # g^2 / (1 - 0.999^2)
        ratio = (0.09 / 0.19) / (0.000999 / 0.001999) ** 0.5
        moved = middle[name] - before[name]
        sure = moved.abs() > 0.99e-3  # gradients far above epsilon
        np.testing.assert_allclose((tensor - middle[name])[sure], ratio * moved[sure], rtol=0.02)


# -- killed, resumed, in several processes ---------------------------------------------------------


def start(config: Path, processes: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "relexkit", "train", str(config)]
    if processes > 1:
        command[1:3] = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "relexkit",
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_after(config: Path, folder: Path, count: int) -> None:
    """Start the run and kill it as soon as its log has ``count`` lines."""
    process = start(config)
    deadline = time.monotonic() + 240
    while lines(folder) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lines(folder) >= count


def check_killed_run(base: Path, tmp_path: Path, kills: list[int]) -> None:
    torch.set_num_threads(1)
    options = {"max_steps": 12, "save_steps": 3, "num_iterations": 2}
    whole = train(settings(base, tmp_path / "whole", **options))
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(settings(base, tmp_path / "killed", **options)))
    for count in kills:
        kill_after(config, tmp_path / "killed", count)
    assert_same_run(whole, train(settings(base, tmp_path / "killed", **options)))


def test_a_killed_run_ends_as_if_it_had_not_been(base, tmp_path):
    check_killed_run(base, tmp_path, [5])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [[1], [5, 9], [2, 2, 4], [3, 6, 8, 11], [12]], ids=str)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(base, tmp_path, kills):
    check_killed_run(base, tmp_path, kills)


def test_two_processes_agree_with_one_although_one_of_them_was_lost(base, tmp_path):
    """It is killed in the second generation, that of the third step."""
    deadly = tmp_path / "deadly"
    task = {"name": TASK["name"].replace(":make", ":make_deadly"), "spared": 8}
    options = {"max_steps": 4, "save_steps": 1, "beta": 0.1, "num_iterations": 2}
    options["task"] = task | {"flag": str(deadly)}
    two, config = tmp_path / "two", tmp_path / "config.yaml"
    config.write_text(dump_config(settings(base, two, **options)))
    deadly.touch()
    process = start(config, processes=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    # whichever comes first: its own end, or that of torchrun
    assert "lost the others" in errors or "SIGTERM" in errors
    store = TrajectoryStore(two / "run.zarr")
    store.verify()
    assert 1 <= len(store.steps) <= 2
    deadly.unlink()
    process = start(config, processes=2)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    one = train(settings(base, tmp_path / "one", **options))
    started = load_file(base / "model.safetensors")
    start_weights = torch.cat([started[name].flatten() for name in sorted(started)])
    moved = (weights(one) - start_weights).norm()
    assert (
        weights(one) - weights(two)
    ).norm() < 1e-2 * moved  # the order of sums differs, and AdamW magnifies it
    stores = [TrajectoryStore(folder / "run.zarr") for folder in (one, two)]
    stores[1].verify()
    assert stores[0].layout == stores[1].layout
    assert stores[0].steps.tolist() == stores[1].steps.tolist()
    tables = [read_rollouts(folder / "rollouts").to_pandas() for folder in (one, two)]
    for column in ("step", "problem", "text", "reward", "truncated"):
        assert tables[0][column].tolist() == tables[1][column].tolist()
    for first, second in zip(logged(one), logged(two), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == (
                value if value is None else pytest.approx(value, rel=1e-2, abs=1e-4)
            ), name
    with pytest.raises(RelexkitError, match="was saved by 2 processes, but this run has 1"):
        train(settings(base, two, **options | {"max_steps": 6}))


# -- what cannot be done ---------------------------------------------------------------------------


def test_a_failing_reward_is_named_with_its_prompt(base, tmp_path):
    rows = [{"prompt": f"{number}>", "answer": str(number)} for number in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def raises(completion, answer, row):\n    raise KeyError('oops')\n"
        "def nothing(completion, answer, row):\n    return float('nan')\n"
    )
    task = {"name": "file", "path": str(tmp_path / "data.jsonl"), "num_validation": 4}
    for function, message in (
        ("raises", r"prompt '\d+>': raised KeyError"),
        ("nothing", "its reward is nan"),
    ):
        options = settings(
            base, tmp_path / function, task={**task, "reward": f"{tmp_path / 'mine.py'}:{function}"}
        )
        with pytest.raises(RelexkitError, match=message):
            train(options)


def test_a_prompt_longer_than_the_context_is_named(base, tmp_path):
    task = TASK | {"digits": 40}
    with pytest.raises(RelexkitError, match=r"prompt '\d+>' has 41 tokens.* model's context of 32"):
        train(settings(base, tmp_path / "run", task=task))


def test_a_loss_that_is_not_finite_stops_at_the_last_good_step(base, tmp_path):
    order = [
        number
        for generation in range(4)
        for number in prompt_numbers(40, settings(base, tmp_path), generation)
    ]
    late = (
        load_task(TASK).problems("train")[order[10]].key
    )  # its turn comes with the third generation
    options = {"task": TASK | {"huge": late}, "max_steps": 10, "save_steps": 1}
    for _ in range(2):  # again, from the state of step 2
        with pytest.raises(
            RelexkitError, match=r"step 3: the loss is (nan|inf); expected a finite number"
        ):
            train(settings(base, tmp_path / "run", **options))
        store = TrajectoryStore(tmp_path / "run" / "run.zarr")
        store.verify()
        assert store.steps.tolist() == [1, 2]
        assert last_state(tmp_path / "run" / "state") == 2


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file grows beyond this, as on a disk that is full (EFBIG in place of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_room_for_a_step() -> Iterator[None]:
    """The disk is full when the fourth step is written."""
    create = durable.create

    def full(path: Path) -> Any:
        if path.match("deltas/*/c/3/0.partial"):
            raise OSError(28, "No space left on device", str(path))
        return create(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "create", full)
        yield


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_to_the_same_bits(
    base, tmp_path, capsys
):
    options = {"max_steps": 5, "save_steps": 2}
    whole = train(settings(base, tmp_path / "whole", **options))
    state = next((whole / "state").rglob("process-0.pt")).stat().st_size
    config = settings(base, tmp_path / "run", **options)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for full, reason, kept in (
        (largest_file(2_000), "File too large", None),  # the base of the store
        (largest_file(state - 1), r"File too large|write|state", None),
        (
            no_room_for_a_step(),
            "the 3 recorded steps are intact: free space and run the command again",
            2,
        ),
    ):
        capsys.readouterr()
        with full:
            assert main(["train", str(tmp_path / "config.yaml")]) == 1
        said = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("relexkit: ")
        ]
        assert len(said) == 1
        assert re.search(reason, said[0])
        assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".step")]
        assert last_state(tmp_path / "run" / "state") == kept
    assert_same_run(whole, train(config))


def test_a_folder_of_another_run_is_refused(base, tmp_path):
    train(settings(base, tmp_path / "run"))
    with pytest.raises(
        RelexkitError, match=r"holds a run with other options \(seed 0 instead of 5\)"
    ):
        train(settings(base, tmp_path / "run", seed=5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RelexkitError, match="exists and is not the folder of a run"):
        train(settings(base, tmp_path / "other"))
    longer = train(
        settings(base, tmp_path / "run", max_steps=5)
    )  # a constant rate: the same run, longer
    assert_same_run(longer, train(settings(base, tmp_path / "at once", max_steps=5)))


def test_the_command_says_what_is_missing(base, tmp_path, capsys):
    assert main(["train"]) == 1
    assert "no configuration was given; expected a YAML file" in capsys.readouterr().err
    assert (
        main(
            [
                "train",
                "--model",
                str(tmp_path),
                "--task",
                "nothing",
                "--output",
                str(tmp_path / "o"),
            ]
        )
        == 1
    )
    assert "task 'nothing' is unknown; expected arithmetic" in capsys.readouterr().err
    arguments = [
        "--model",
        str(tmp_path / "nowhere"),
        "--task",
        "arithmetic",
        "--output",
        str(tmp_path / "p"),
    ]
    assert main(["train", *arguments]) == 1
    assert "no such folder; expected a Hugging Face model" in capsys.readouterr().err


def test_the_command_prints_one_json_document(base, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(settings(base, tmp_path / "run")))
    assert main(["train", str(path), "--max_steps", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == 2
    assert document["metrics"]["step"] == 2


def test_an_option_that_is_newer_than_the_run_has_its_default(base, tmp_path):
    folder = train(settings(base, tmp_path / "out", max_steps=2))
    path = folder / "config.yaml"
    newer = ("entropy_coef", "report_to", "precision", "engine", "vllm_importance_sampling_mode")
    kept = [line for line in path.read_text().splitlines() if line.split(":")[0] not in newer]
    path.write_text("\n".join(kept) + "\n")
    with pytest.raises(RelexkitError, match=r"other options \(entropy_coef 0.0 instead of 0.01\)"):
        train(settings(base, tmp_path / "out", entropy_coef=0.01))
    assert path.read_text().splitlines() == kept
    train(settings(base, tmp_path / "out", max_steps=3))
    assert [entry["step"] for entry in read_log(folder)] == [1, 2, 3]
    assert "entropy_coef: 0.0" in path.read_text()
