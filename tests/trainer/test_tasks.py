"""Tasks: splits without a common problem, rewards by hand, and errors that name the prompt."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from relexkit import RelexkitError
from relexkit.trainer.tasks import Problem, load_task, prompt_text, score
from relexkit.trainer.tasks.arithmetic import CHARACTERS, FAMILIES
from relexkit.trainer.tasks.gym import extracted

SMALL = {"num_train": 40, "num_validation": 15}


def prompts(task, split):
    return [str(problem.prompt) for problem in task.problems(split)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -- built-in families -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_answers_are_right_and_splits_share_nothing(family):
    task = load_task({"name": "arithmetic", "family": family, "digits": 3, **SMALL})
    checks = {
        "sorting": lambda text: "".join(sorted(text.rstrip(">"))),
        "addition": lambda text: str(sum(map(int, text.rstrip("=").split("+")))),
        "subtraction": lambda text: str(
            int(text.split("-")[0]) - int(text.rstrip("=").split("-")[1])
        ),
        "modulo": lambda text: str(int(text.split("%")[0]) % int(text.rstrip("=").split("%")[1])),
    }
    train, validation = prompts(task, "train"), prompts(task, "validation")
    assert (len(set(train)), len(set(validation))) == (40, 15)
    assert not set(train) & set(validation)
    for problem in (*task.problems("train"), *task.problems("validation")):
        assert problem.answer == checks[family](problem.prompt)
        assert set(problem.prompt + problem.answer) <= set(CHARACTERS)
        assert task.reward(problem, f" {problem.answer} ") == 1.0
        assert task.reward(problem, problem.answer + "0") == 0.0


def test_splits_of_other_sizes_share_nothing_either_and_seeds_differ():
    """A run on few problems and an evaluation on many: only the seed says what is kept for
    validation.
    """
    few = load_task(
        {
            "name": "arithmetic",
            "family": "modulo",
            "digits": 3,
            "num_train": 2000,
            "num_validation": 5,
        }
    )
    many = load_task(
        {
            "name": "arithmetic",
            "family": "modulo",
            "digits": 3,
            "num_train": 5,
            "num_validation": 300,
        }
    )
    assert not set(prompts(few, "train")) & set(prompts(many, "validation"))
    assert prompts(few, "validation") == prompts(many, "validation")[:5]
    other = load_task(
        {
            "name": "arithmetic",
            "family": "modulo",
            "digits": 3,
            "seed": 1,
            "num_train": 5,
            "num_validation": 300,
        }
    )
    assert prompts(other, "validation") != prompts(many, "validation")


def test_arithmetic_refuses_what_it_cannot_make():
    with pytest.raises(
        RelexkitError, match="family 'sortin' is unknown; expected sorting, addition"
    ):
        load_task({"name": "arithmetic", "family": "sortin"})
    with pytest.raises(
        RelexkitError,
        match=r"found \d+ different problems for training and \d+ for validation; expected 40 and",
    ):
        load_task({"name": "arithmetic", "digits": 1, **SMALL})
    with pytest.raises(RelexkitError, match="digits 0 is too small"):
        load_task({"name": "arithmetic", "digits": 0})
    with pytest.raises(RelexkitError, match="has no validation problems; expected at least one"):
        load_task({"name": "arithmetic", "num_validation": 0, "num_train": 5})
    with pytest.raises(
        RelexkitError, match=r"unexpected keyword argument 'digit'; its options are family, digits"
    ):
        load_task({"name": "arithmetic", "digit": 3})
    with pytest.raises(
        RelexkitError,
        match="task 'arithmetics' is unknown; expected arithmetic, reasoning_gym, file, or",
    ):
        load_task("arithmetics")


# -- reasoning_gym ---------------------------------------------------------------------------------


def test_gym_uses_the_data_sets_own_scorer():
    task = load_task(
        {
            "name": "reasoning_gym",
            "dataset": "fraction_simplification",
            "instruction": "Be brief.",
            **SMALL,
        }
    )
    assert not set(prompts(task, "train")) & set(prompts(task, "validation"))
    for problem in task.problems("validation")[:3]:
        assert problem.prompt.endswith("Be brief.")
        assert task.reward(problem, problem.answer) == 1.0
        assert task.reward(problem, "the answer is unclear") < 1.0


def test_gym_takes_options_and_extracts_numbers():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = load_task(
        {
            "name": "reasoning_gym",
            "dataset": "chain_sum",
            "extract": "number",
            "options": options,
            **SMALL,
        }
    )
    problem = task.problems("train")[0]
    numbers = [int(n) for n in re.findall(r"\d+", problem.prompt)]
    assert len(numbers) == 2
    assert task.reward(problem, f"Well, 1 and 2 make 3. So: {problem.answer}.") == 1.0
    assert task.reward(problem, "no number") == 0.0
    assert extracted("<answer>1</answer> or rather <answer> 2 </answer>", "tag") == "2"
    assert extracted("2", "tag") is None
    assert extracted("from -3 to -4.5 degrees", "number") == "-4.5"


def test_gym_names_what_is_unknown():
    with pytest.raises(
        RelexkitError, match=r"data set 'chain_sums' cannot be made .*did you mean chain_sum"
    ):
        load_task({"name": "reasoning_gym", "dataset": "chain_sums"})
    with pytest.raises(
        RelexkitError, match=r"'chain_sum' cannot be made .*unexpected keyword argument 'digits'"
    ):
        load_task({"name": "reasoning_gym", "dataset": "chain_sum", "options": {"digits": 3}})
    with pytest.raises(
        RelexkitError, match="extract 'last' is unknown; expected whole, tag or number"
    ):
        load_task({"name": "reasoning_gym", "dataset": "chain_sum", "extract": "last"})
    with pytest.raises(
        RelexkitError, match="'reasoning_gym': missing a required argument: 'dataset'"
    ):
        load_task("reasoning_gym")


# -- files -----------------------------------------------------------------------------------------


def test_files_give_the_same_problems_whatever_their_format(tmp_path):
    rows = [{"prompt": f"{n} plus one?", "answer": n + 1, "solution": "count"} for n in range(30)]
    path = write_lines(
        tmp_path / "data.jsonl", [*rows, {**rows[3], "prompt": "3  plus one?\n"}]
    )  # the same but for blanks
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    options = {"name": "file", "reference": "solution", "num_validation": 10}
    lines = load_task({**options, "path": path})
    table = load_task({**options, "path": str(tmp_path / "data.parquet")})
    assert prompts(lines, "train") == prompts(table, "train")
    assert (len(prompts(lines, "train")), len(prompts(lines, "validation"))) == (20, 10)
    assert not set(prompts(lines, "train")) & set(prompts(lines, "validation"))
    assert prompts(load_task({**options, "path": path, "seed": 1}), "validation") != prompts(
        lines, "validation"
    )
    problem = lines.problems("train")[0]
    assert problem.reference == "count"
    assert lines.reward(problem, f"The answer is {problem.answer}.") == 1.0
    assert lines.reward(problem, "The answer is 77.") == 0.0


def test_a_second_file_for_validation_takes_its_problems_out_of_the_first(tmp_path, capsys):
    train = write_lines(tmp_path / "train.jsonl", [{"q": f"{n}?", "a": str(n)} for n in range(10)])
    test = write_lines(tmp_path / "test.jsonl", [{"q": f"{n}?", "a": str(n)} for n in range(8, 14)])
    options = {"name": "file", "prompt": "q", "answer": "a", "num_validation": 4}
    task = load_task({**options, "path": train, "validation": test})
    assert prompts(task, "train") == [f"{n}?" for n in range(8)]
    assert prompts(task, "validation") == ["8?", "9?", "10?", "11?"]
    assert "2 of 10 problems are in" in capsys.readouterr().err
    with pytest.raises(RelexkitError, match=r"every problem is in .*train\.jsonl too"):
        load_task({**options, "path": train, "validation": train})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no problems; expected one a row"),
        (
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}],
            "row 2 has no 'answer'; expected it in every row",
        ),
        ([["prompt", "answer"]], "row 1 has no 'prompt'"),
        (
            [{"prompt": "", "answer": "1"}],
            "row 1: prompt is ''; expected text, or a list of messages",
        ),
        (
            [{"prompt": [{"role": "user"}], "answer": "1"}],
            "row 1: prompt is .*expected text, or a list of messages",
        ),
        ([{"prompt": "a", "answer": None}], "row 1: answer is empty; expected an answer"),
        (
            [{"prompt": "a", "answer": "1"}] * 9,
            "has 1 different problems, 1 of them for validation; expected some",
        ),
    ],
    ids=["empty", "no answer", "no object", "no prompt", "no message", "null answer", "all alike"],
)
def test_files_that_cannot_be_used_are_refused_by_row(tmp_path, rows, message):
    with pytest.raises(RelexkitError, match=message):
        load_task({"name": "file", "path": write_lines(tmp_path / "data.jsonl", rows)})


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    for name in ("broken.jsonl", "broken.parquet", "absent.jsonl"):
        with pytest.raises(
            RelexkitError, match=rf"{name}: cannot be read .*expected JSON Lines, JSON, CSV"
        ):
            load_task({"name": "file", "path": str(tmp_path / name)})
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(
        RelexkitError, match=r"reward 'maths' is unknown; expected math, exact, FILE\.py:FUNCTION"
    ):
        load_task({"name": "file", "path": path, "reward": "maths"})


# -- functions of the user's own, and their errors -------------------------------------------------

OWN = """
from relexkit.trainer.tasks import Problem

class Parity:
    name = "parity"
    def __init__(self, most): self.most = most
    def problems(self, split):
        start = 0 if split == "train" else self.most
        return [Problem(key=str(n), prompt=f"{n} even?", answer="no" if n % 2 else "yes") for n in range(start, start + 5)]
    def reward(self, problem, completion):
        return {"yes": 1.0, "no": 1, "nan": float("nan"), "text": "good", "none": None}[completion]

def make(most=10): return Parity(most)
def broken(): return 3
def reward(completion, answer, row): return 0.25 * (completion == answer) + row["bonus"]
"""


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    task = load_task({"name": f"{tmp_path}/own.py:make", "most": 20})
    assert prompts(task, "validation")[0] == "20 even?"
    assert load_task(f"{tmp_path}/own.py:make").problems("validation")[0].key == "10"
    assert score(task, task.problems("train")[0], "no") == 1.0
    with pytest.raises(
        RelexkitError, match="gives a int without name, problems, reward; expected a task"
    ):
        load_task(f"{tmp_path}/own.py:broken")
    with pytest.raises(RelexkitError, match="has no function 'absent'"):
        load_task(f"{tmp_path}/own.py:absent")
    with pytest.raises(RelexkitError, match=r"elsewhere\.py: no such Python file"):
        load_task(f"{tmp_path}/elsewhere.py:make")
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(
        RelexkitError, match=r"bad\.py: fails when it is loaded \(ModuleNotFoundError"
    ):
        load_task(f"{tmp_path}/bad.py:make")


def test_a_reward_of_ones_own_sees_the_row(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    path = write_lines(
        tmp_path / "data.jsonl", [{"prompt": f"{n}", "answer": None, "bonus": n} for n in range(4)]
    )
    task = load_task(
        {"name": "file", "path": path, "reward": f"{tmp_path}/own.py:reward", "num_validation": 1}
    )
    for problem in task.problems("train"):
        assert task.reward(problem, "") == 0.25 + int(problem.prompt)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("nan", "its reward is nan for 'nan'; expected a finite number"),
        ("text", "its reward is 'good' for 'text'; expected a finite number"),
        ("none", "its reward is None for 'none'; expected a finite number"),
        ("maybe", r"its reward raised KeyError \('maybe'\) on 'maybe'"),
    ],
)
def test_a_reward_that_fails_is_named_with_the_prompt(tmp_path, completion, message):
    (tmp_path / "own.py").write_text(OWN)
    task = load_task(f"{tmp_path}/own.py:make")
    with pytest.raises(
        RelexkitError, match=rf"task 'parity', problem 3, prompt '3 even\?': {message}"
    ):
        score(task, task.problems("train")[3], completion)


class Templated:
    """A tokenizer with a chat template, as far as ``prompt_text`` uses it."""

    chat_template = "<{role}> {content}"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{m['role']}> {m['content']} " for m in messages) + "<assistant>"


def test_prompts_go_through_the_chat_template_if_there_is_one():
    plain = Problem(key="1", prompt="2+2?", answer="4")
    chat = Problem(
        key="2",
        prompt=[{"role": "system", "content": "Short."}, {"role": "user", "content": "2+2?"}],
        answer="4",
    )
    assert prompt_text(plain, Templated()) == "<user> 2+2? <assistant>"
    assert prompt_text(chat, Templated()) == "<system> Short. <user> 2+2? <assistant>"
    bare = type("Bare", (), {"chat_template": None})()
    assert prompt_text(plain, bare) == "2+2?"
    assert prompt_text(chat, bare) == "Short.\n2+2?"
