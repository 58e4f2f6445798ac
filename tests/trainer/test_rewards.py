"""Reward functions in our signature and in TRL's, several of them, and what is said of misfits."""

from __future__ import annotations

import json

import pytest
from test_train import settings
from tiny_models import save_tiny_model

from relexkit import RelexkitError
from relexkit.trainer.loop.rollout_log import read_rollouts
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.train import train
from relexkit.trainer.tasks import load_task, score_all

FUNCTIONS = """
def ours(completion, answer, row): return float(completion == answer) + row["bonus"]
def theirs(completions, prompts, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer)]
def strict(completions, bonus): return [0.5 * b for b in bonus]
def maybe(completions, **kwargs): return [None if "x" in c else 1.0 for c in completions]
def short(completions, **kwargs): return [1.0]
def lacking(completions, difficulty, **kwargs): return [0.0 for _ in completions]
def scalar(completions, **kwargs): return 1.0
def broken(completions, **kwargs): raise KeyError("solution")
def chat(completions, **kwargs): return [float(c[0]["content"] == "5") for c in completions]
def two(completion, answer): return 0.0
def lengths(completions, **kwargs): return [len(c) / 8 for c in completions]
def digits(completions, **kwargs): return [float(any(d in c for d in "02468")) for c in completions]
"""


@pytest.fixture
def make(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    rows = [{"prompt": f"{n}+0=", "answer": str(n), "bonus": n / 4} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(*names, **options):
        places = [
            name if ":" in name or name == "math" else f"{tmp_path}/own.py:{name}" for name in names
        ]
        return load_task(
            {
                "name": "file",
                "path": str(tmp_path / "data.jsonl"),
                "reward": places[0] if len(places) == 1 else places,
                "num_validation": 1,
                **options,
            }
        )

    return task


def scored(task, texts):
    problems = sorted(task.problems("all"), key=lambda problem: int(problem.answer))
    return score_all(task, problems[: len(texts)], texts)


def rewards(task, texts):
    return [found.reward for found in scored(task, texts)]


def test_both_signatures_see_the_columns(make):
    assert rewards(make("ours"), ["0", "x", "2"]) == [1.0, 0.25, 1.5]
    assert rewards(make("theirs"), ["0", "x", "12"]) == [1.0, 0.0, 1.0]
    assert rewards(make("strict"), ["", "", ""]) == [0.0, 0.125, 0.25]
    assert rewards(make("chat", system=""), ["5", "6"]) == [1.0, 0.0]


def test_several_are_weighted_and_the_first_says_what_is_right(make):
    task = make("math", "maybe", "ours", reward_weights=[2.0, 0.5, 1.0])
    found = scored(task, ["0", "x", "7"])
    assert [one.reward for one in found] == [2 + 0.5 + 1, 0 + 0 + 0.25, 0 + 0.5 + 0.5]
    assert [one.right for one in found] == [True, False, False]
    assert [one.parts["maybe"] for one in found] == [1.0, None, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "gave 1 rewards for 2 completions; expected function"),
        (
            "lacking",
            "missing a required argument: 'difficulty'; the data has the columns prompt, answer,",
        ),
        ("scalar", r"gave 1\.0; expected function\(completion, answer, row\) -> float, or TRL's"),
        ("broken", r"problem .*/1, prompt '0\+0=': raised KeyError \('solution'\)"),
        ("chat", "on completions that are text; functions for chats need prompts of messages"),
    ],
)
def test_what_does_not_fit_is_named_with_the_signatures(make, name, message):
    with pytest.raises(RelexkitError, match=message):
        scored(make(name), ["a", "b"])


def test_functions_that_cannot_be_called_are_refused_at_once(make):
    with pytest.raises(RelexkitError, match=r"takes \(completion, answer\) .*expected function"):
        make("two")
    with pytest.raises(RelexkitError, match=r"no\.such:thing: no\.such cannot be imported"):
        make("no.such:thing")
    with pytest.raises(RelexkitError, match="expected 2 numbers, one a reward"):
        make("math", "maybe", reward_weights=[1.0])
    with pytest.raises(RelexkitError, match="names no function"):
        make("math", reward=[])


def test_functions_of_trl_run_unchanged(make, tmp_path):
    pytest.importorskip("trl")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n} plus 1?"}],
            "solution": rf"$\frac{{{n + 1}}}{{1}}$",
        }
        for n in range(6)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("trl.rewards:accuracy_reward", "trl.rewards:think_format_reward")
    task = make(*names, path=str(tmp_path / "chat.jsonl"), reward_weights=[1.0, 0.2])
    from trl.rewards import accuracy_reward, think_format_reward

    problems = task.problems("all")
    texts = [
        ("<think>\nadd\n</think>\n" if n % 2 else "")
        + (f"\\boxed{{{p.metadata['solution'].strip('$')}}}" if n % 3 else "\\boxed{77}")
        for n, p in enumerate(problems)
    ]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    right = accuracy_reward(messages, [problem.metadata["solution"] for problem in problems])
    form = think_format_reward(messages)
    assert 0 < sum(form) < len(form)
    assert 0 < sum(right) < len(right)
    assert rewards_of(task, problems, texts) == pytest.approx(
        [1.0 * a + 0.2 * b for a, b in zip(right, form, strict=True)]
    )


def rewards_of(task, problems, texts):
    return [found.reward for found in score_all(task, problems, texts)]


def test_a_run_logs_each_function_as_trl_does(make, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n:02d}>"}) + "\n" for n in range(40))
    )
    places = [f"{tmp_path}/own.py:{name}" for name in ("digits", "lengths")]
    task = {"name": "file", "path": str(tmp_path / "t.jsonl"), "num_validation": 4}
    task |= {"reward": places, "reward_weights": [1.0, 0.5]}
    folder = train(settings(base, tmp_path / "run", task=task, max_steps=1, record_every=0))
    (entry,) = read_log(folder)
    table = read_rollouts(folder / "rollouts").to_pandas()
    even = [float(any(d in text for d in "02468")) for text in table.text]
    assert entry["rewards/digits/mean"] == pytest.approx(sum(even) / len(even))
    assert entry["rewards/lengths/mean"] == pytest.approx((table.text.str.len() / 8).mean())
    assert table.right.tolist() == [value == 1 for value in even]
    assert table.reward.tolist() == pytest.approx(
        [a + 0.5 * len(t) / 8 for a, t in zip(even, table.text, strict=True)]
    )
