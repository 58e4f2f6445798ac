"""The demo and the run it makes, with a tiny model in seconds; slowly with its real settings."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from relexkit import RelexkitError, TrajectoryStore
from relexkit.cli import main
from trainer import demo, small_run
from trainer.small_run import SmallRun

TINY = SmallRun(
    steps=6, num_digits=3, hidden_size=32, num_layers=2, warmup_steps=60, warmup_batch=32, warmup_learning_rate=1e-2,
    warmup_descending=0.3,
    num_prompts=8, num_generations=8, learning_rate=1e-3, num_held_out=40,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """Models this small gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_of(folder: Path, settings: SmallRun = TINY) -> Path:
    small_run.make_run(folder, settings)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder and the summary of a demo with tiny settings."""
    folder = tmp_path_factory.mktemp("told") / "demo run"  # a space: the printed commands must be quoted
    return folder, demo.tell_story(folder, TINY)


# -- the task and the arithmetic --------------------------------------------------------------------------------------


def test_answers_are_sorted_and_training_never_sees_a_held_out_answer():
    held_out = small_run.held_out_problems(TINY)
    excluded = frozenset(answer for _, answer in held_out)
    training = small_run.draw_problems(random.Random(3), 500, 3, excluded)
    for prompt, answer in held_out + training:
        assert re.fullmatch(r"\d{3}>", prompt)
        assert answer == "".join(sorted(prompt[:-1]))
    assert not excluded & {answer for _, answer in training}
    assert len(held_out) == 40


def test_the_end_of_the_answer_counts():
    answer = torch.tensor([[3, 4, 1], [3, 4, 1], [3, 4, 1]])
    completion = torch.tensor([[3, 4, 1], [3, 4, 3], [4, 3, 1]])
    assert small_run.reward(completion, answer).tolist() == [1.0, 0.0, 0.0]


def test_advantages_of_a_hand_computed_group():
    # one right of four: mean 1/4, standard deviation (n - 1) 1/2
    advantages = small_run.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), epsilon=0.0001)
    torch.testing.assert_close(advantages[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.5001)
    assert advantages[1].tolist() == [0.0] * 4


def test_log_probabilities_are_those_of_a_plain_forward_pass():
    torch.manual_seed(0)
    model = small_run.build_model(TINY)
    prompts, answers = small_run.encode([("315>", "135"), ("900>", "009")], small_run.build_tokenizer())
    logprobs = small_run.answer_logprobs(model, prompts, answers)
    for row, column in itertools.product(range(2), range(4)):
        seen = torch.cat([prompts[row], answers[row, :column]])[None]
        expected = model(seen).logits[0, -1].double().softmax(-1)[answers[row, column]].log()
        assert logprobs[row, column].item() == pytest.approx(expected.item(), abs=1e-5)  # float32 against float64 softmax


def test_greedy_completion_takes_the_likeliest_token_of_a_plain_forward_pass():
    torch.manual_seed(1)
    model = small_run.build_model(TINY)
    prompts, _ = small_run.encode([("315>", "135"), ("900>", "009")], small_run.build_tokenizer())
    completion = small_run.complete(model, prompts, 4)
    for column in range(4):
        seen = torch.cat([prompts, completion[:, :column]], dim=1)
        assert torch.equal(model(seen).logits[:, -1].argmax(-1), completion[:, column])


def test_samples_follow_the_model():
    """2000 first tokens of one prompt: each share within 5 standard deviations (a false alarm in a million runs)."""
    torch.manual_seed(2)
    model = small_run.build_model(TINY)
    prompt, _ = small_run.encode([("315>", "135")], small_run.build_tokenizer())
    share = model(prompt).logits[0, -1].softmax(-1).detach()
    drawn = small_run.complete(model, prompt.expand(2000, -1), 1, torch.Generator().manual_seed(0))[:, 0]
    counts = torch.bincount(drawn, minlength=len(share))
    assert ((counts - 2000 * share).abs() < 5 * (2000 * share * (1 - share)).sqrt() + 1).all()


def test_policy_gradient_raises_the_probability_of_what_was_rewarded():
    torch.manual_seed(3)
    model = small_run.build_model(replace(TINY, num_digits=1))
    settings = replace(TINY, num_digits=1, num_prompts=4, num_generations=32, learning_rate=3e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    encoded = small_run.encode([("3>", "3"), ("7>", "7"), ("0>", "0"), ("5>", "5")], small_run.build_tokenizer())
    before = small_run.answer_logprobs(model, *encoded).sum(1).exp().mean().item()
    rewards = [small_run.policy_gradient_step(model, optimizer, encoded, settings, generator)["reward"] for _ in range(60)]
    after = small_run.answer_logprobs(model, *encoded).sum(1).exp().mean().item()
    assert before < 0.05  # two tokens out of 13 by chance
    assert after > 5 * before
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10])


def test_wilson_interval_of_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for right, number, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert demo.wilson_interval(right, number) == pytest.approx((low, high), abs=5e-5)
    assert demo.wilson_interval(20, 20)[1] == 1.0


def test_paired_difference_ignores_what_both_get_right():
    first, second = [True] * 90 + [True] * 8 + [False] * 2, [True] * 90 + [False] * 8 + [True] * 2
    found = demo.paired_difference(first, second)
    differences = np.array(first, float) - np.array(second, float)
    half = 1.959964 * differences.std() / 10
    assert found["difference"] == pytest.approx(0.06)
    assert found["interval"] == pytest.approx((0.06 - half, 0.06 + half))
    assert demo.paired_difference(first, first) == {"difference": 0.0, "interval": (0.0, 0.0)}


@pytest.mark.parametrize(
    ("interval", "word"), [((0.01, 0.2), "wins against"), ((-0.2, -0.01), "loses to"), ((-0.1, 0.1), "cannot be told from")]
)
def test_verdict_says_who_lost(interval, word):
    comparison = {"precision": "float32", "name": "A", "against": "B", "difference": sum(interval) / 2, "interval": interval}
    assert f"float32: A {word} B (" in demo.verdict(comparison)


# -- the run ----------------------------------------------------------------------------------------------------------


def test_run_is_the_same_again_and_differs_with_the_seed(made, tmp_path):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = run_of(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state), "the global random state is the caller's"
    assert contents(again) == contents(made)
    other = run_of(tmp_path / "other", replace(TINY, seed=1, steps=1))
    place = "float32/checkpoint-1/model.safetensors"
    assert (other / place).read_bytes() != (made / place).read_bytes()


def test_every_step_is_saved_in_both_precisions(made):
    base = load_file(made / "base" / "model.safetensors")
    assert {t.dtype for t in base.values()} == {torch.bfloat16}
    previous = {name: t.float() for name, t in base.items()}
    for step in range(1, 7):
        full = load_file(made / "float32" / f"checkpoint-{step}" / "model.safetensors")
        half = load_file(made / "bfloat16" / f"checkpoint-{step}" / "model.safetensors")
        assert full.keys() == half.keys() == base.keys()
        for name, tensor in full.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.bfloat16(), half[name])
        moved = sum(int((tensor != previous[name]).sum()) for name, tensor in full.items())
        assert moved > 0
        previous = full
    assert not (made / "float32" / "checkpoint-7").exists()


def test_checkpoints_load_as_any_other_and_answer(made):
    folder = made / "bfloat16" / "checkpoint-6"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    prompt = tokenizer("315>", return_tensors="pt")
    assert prompt["input_ids"].shape == (1, 4)
    said = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(said[0]).startswith("315>")
    assert tokenizer.decode(tokenizer("0918>")["input_ids"]) == "0918>"


def test_log_is_a_trainers_log(made):
    state = json.loads((made / "float32" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4, 5, 6]
    for entry in state["log_history"]:
        assert 0 <= entry["reward"] <= 1
        assert entry["learning_rate"] == TINY.learning_rate
        assert entry["frac_reward_zero_std"] * TINY.num_prompts == int(entry["frac_reward_zero_std"] * TINY.num_prompts)


def test_greedy_accuracy_is_that_of_transformers_generate(made):
    problems = small_run.held_out_problems(TINY)
    folder = made / "float32" / "checkpoint-6"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt, answer in problems:
        tokens = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**tokens, max_new_tokens=4, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(said) == answer + "<eos>")
    found = small_run.greedy_correct(folder, problems)
    assert found == expected
    assert 0 < sum(found) < len(found)  # a model that is always right or always wrong would compare nothing


# -- the demo ---------------------------------------------------------------------------------------------------------


def test_demo_leaves_what_it_says(told):
    folder, summary = told
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["until"] == 3
    assert summary["targets"] == [6, 12]
    names = ["base", "trained, step 3", "trained, step 6", "RELEX, 3 -> 6", "RELEX, 3 -> 12"]
    assert sorted((m["name"], m["precision"]) for m in summary["models"]) == sorted(itertools.product(names, demo.PRECISIONS))
    for precision in demo.PRECISIONS:
        assert TrajectoryStore(folder / f"{precision}.zarr").steps.tolist() == [1, 2, 3, 4, 5, 6]
        assert "reward" in TrajectoryStore(folder / f"{precision}.zarr").metrics()
        assert list((folder / "figures" / precision).iterdir())
        for target in (6, 12):
            weights = load_file(folder / "predicted" / precision / f"step-{target}" / "model.safetensors")
            assert {str(t.dtype) for t in weights.values()} == {f"torch.{precision}"}
    assert [path.name for path in folder.rglob("*.partial")] == []
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_demo_reports_the_accuracies_of_the_folders_it_names(told):
    folder, summary = told
    problems = small_run.held_out_problems(TINY)
    places = {
        ("base", "bfloat16"): "run/base",
        ("trained, step 3", "bfloat16"): "run/bfloat16/checkpoint-3",
        ("trained, step 6", "float32"): "run/float32/checkpoint-6",
        ("RELEX, 3 -> 6", "float32"): "predicted/float32/step-6",
        ("RELEX, 3 -> 12", "bfloat16"): "predicted/bfloat16/step-12",
    }
    for row in summary["models"]:
        place = places.get((row["name"], row["precision"]))
        if place is not None:
            assert row["num_correct"] == sum(small_run.greedy_correct(folder / place, problems))
            assert row["accuracy"] == row["num_correct"] / 40


def test_demo_prints_commands_that_can_be_typed(tmp_path, capsys):
    folder = tmp_path / "demo run"
    demo.tell_story(folder, TINY)
    shown = capsys.readouterr().out
    commands = re.findall(r"^\$ relexkit (\w+) ", shown, re.MULTILINE)
    assert commands == ["import", "import", "spectrum", "spectrum", "extrapolate", "extrapolate", "checkout"]
    assert f"'{folder}/float32.zarr'" in shown
    assert "equal those of the original checkpoint" in shown
    for name in ("base", "trained, step 6", "RELEX, 3 -> 12"):
        assert re.search(rf"^ *{re.escape(name)} +[01]\.\d{{3}} \[", shown, re.MULTILINE)
    assert len(re.findall(r"^(?:float32|bfloat16): RELEX.* 95 % interval", shown, re.MULTILINE)) == 6


def test_demo_again_keeps_the_run_and_says_the_same(told):
    folder, summary = told
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    provenance = folder / "predicted" / "float32" / "step-6" / "relexkit.json"
    provenance.write_text(provenance.read_text().replace('"relexkit": "', '"relexkit": "0.0.'))  # an older version wrote it
    weights = contents(folder / "predicted" / "float32" / "step-12")
    assert demo.tell_story(folder, TINY) == summary
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before
    assert contents(folder / "predicted" / "float32" / "step-12") == weights


def test_demo_refuses_a_run_with_other_settings(told):
    folder, _ = told
    with pytest.raises(RelexkitError, match=r"another run \(seed 0 instead of 5\); remove .* or choose another -o"):
        demo.tell_story(folder, replace(TINY, seed=5))


def test_interrupted_run_leaves_nothing_and_is_made_again(tmp_path, monkeypatch):
    save, calls = small_run.save, itertools.count()

    def save_or_stop(*given):
        if next(calls) == 5:
            raise KeyboardInterrupt
        save(*given)

    monkeypatch.setattr(small_run, "save", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        demo.tell_story(tmp_path / "demo", TINY)
    assert list((tmp_path / "demo").iterdir()) == []
    (tmp_path / "demo" / ".run.partial" / "base").mkdir(parents=True)  # what a killed process leaves
    assert demo.tell_story(tmp_path / "demo", TINY)["until"] == 3
    assert not (tmp_path / "demo" / ".run.partial").exists()


def test_demo_stops_at_a_command_that_fails(told, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(told[0] / "run", folder / "run")
    weights = folder / "run" / "float32" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(RelexkitError, match="this command failed: relexkit import"):
        demo.tell_story(folder, TINY)
    assert "step 4" in capsys.readouterr().err


def test_check_identical_sees_one_bit(made, tmp_path):
    original = made / "bfloat16" / "checkpoint-2"
    shutil.copytree(original, tmp_path / "copy")
    tensors = load_file(original / "model.safetensors")
    assert demo.check_identical(tmp_path / "copy", original) == sum(t.nbytes for t in tensors.values())
    name = sorted(tensors)[3]
    tensors[name].view(-1).view(torch.int16)[5] ^= 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(RelexkitError, match=re.escape(name)):
        demo.check_identical(tmp_path / "copy", original)
    del tensors[name]
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(RelexkitError, match=f"only one of it and .*{re.escape(name)}"):
        demo.check_identical(tmp_path / "copy", original)


def test_too_few_steps_are_a_stated_error(tmp_path, capsys):
    assert main(["demo", "--steps", "3", "-o", str(tmp_path / "demo")]) == 1
    assert re.fullmatch(r"relexkit: --steps 3 is too small; .*\n", capsys.readouterr().err)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_real_demo_learns_and_says_how_extrapolation_fared(tmp_path, capsys):
    """The command as ``make demo`` calls it: the intervals of the base and of the last trained step must not touch."""
    folder = tmp_path / "demo-run"
    assert main(["demo", "-o", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    accuracy = {(m["name"], m["precision"]): m for m in summary["models"]}
    base, end = accuracy["base", "float32"], accuracy["trained, step 50", "float32"]
    assert end["interval"][0] > base["interval"][1]
    state = json.loads((folder / "run" / "float32" / "checkpoint-50" / "trainer_state.json").read_text())
    assert sum(entry["frac_reward_zero_std"] < 1 for entry in state["log_history"]) >= 25
    assert summary["bytes"]["bfloat16"]["store"] < summary["bytes"]["bfloat16"]["checkpoints"]
    assert "took" in capsys.readouterr().out
