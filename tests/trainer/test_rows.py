"""Data as people have it: every oddity has its right reading, or one line of error."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tiny_models import tiny_tokenizer

from relexkit import RelexkitError
from relexkit.trainer.policy.sampling import encode_prompt
from relexkit.trainer.tasks import load_task
from relexkit.trainer.tasks.rows import read_rows

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(12)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_lines_end_at_line_feeds_only(tmp_path, mark):
    rows = [{"prompt": f"{n}{mark}+1=", "answer": "1"} for n in range(5)]
    (tmp_path / "t.jsonl").write_bytes(lines(rows).encode())
    assert read_rows(tmp_path / "t.jsonl") == rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_and_other_line_ends(tmp_path, encoding, end):
    (tmp_path / "t.jsonl").write_bytes(lines(ROWS).replace("\n", end).encode(encoding))
    assert read_rows(tmp_path / "t.jsonl") == ROWS


def test_every_format_gives_the_same_problems(tmp_path):
    (tmp_path / "t.jsonl").write_text(lines(ROWS))
    (tmp_path / "t.json").write_text(json.dumps(ROWS, indent=1))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    for file in sorted(tmp_path.iterdir()):
        assert read_rows(file) == ROWS, file.name


def test_cells_of_a_table_stay_as_they_are_written(tmp_path):
    (tmp_path / "t.csv").write_text('prompt,answer\n"a, ""b""\nc",007\n')
    assert read_rows(tmp_path / "t.csv") == [{"prompt": 'a, "b"\nc', "answer": "007"}]


def test_folders_of_datasets_whole_or_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "whole")
    assert read_rows(tmp_path / "whole") == ROWS
    both = datasets.DatasetDict(
        {"train": whole.select(range(9)), "test": whole.select(range(7, 12))}
    )
    both.save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "both", "test") == ROWS[7:]
    with pytest.raises(
        RelexkitError, match="has the splits train, test; name one, as `split: train`"
    ):
        read_rows(tmp_path / "both")
    with pytest.raises(RelexkitError, match="has no split 'dev'; expected one of train, test"):
        read_rows(tmp_path / "both", "dev")
    task = load_task(
        {"name": "file", "path": str(tmp_path / "both"), "split": "train", "validation": "test"}
    )
    assert len(task.problems("train")) == 7
    assert [p.prompt for p in task.problems("validation")] == [row["prompt"] for row in ROWS[7:]]


def test_folders_of_parquet_files_as_on_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    for number, part in enumerate((ROWS[:4], ROWS[4:8])):
        parquet.write_table(
            pa.Table.from_pylist(part), tmp_path / f"data/train-0000{number}-of-00002.parquet"
        )
    parquet.write_table(
        pa.Table.from_pylist(ROWS[8:]), tmp_path / "data/test-00000-of-00001.parquet"
    )
    assert read_rows(tmp_path, "train") == ROWS[:8]
    assert read_rows(tmp_path, "test") == ROWS[8:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"prompt": "a"\n', "line 1: Expecting ',' delimiter"),
        (b'{"prompt": "a", "answer": "1"}\n\xff\n', "codec can't decode byte 0xff"),
        (b"[" * 200_000 + b"]" * 200_000, "line 1 is nested too deeply"),
        (
            b'{"prompt": "a\\ud800", "answer": "1"}\n',
            "row 1: prompt holds half of a surrogate pair at",
        ),
        (b'{"prompt": "a", "answer": "\\udc00"}\n', "row 1: answer holds half of a surrogate pair"),
        (
            b'{"prompt": "a", "answer": ["1", "2"]}\n',
            r"row 1: answer is \['1', '2'\]; expected text",
        ),
        (b'{"prompt": "a", "answer": NaN}\n', "row 1: answer is nan; expected text or a number"),
        (
            b'{"q": "a", "answer": "1"}\n',
            "row 1 has no 'prompt'; expected it in every row; it has q, answer",
        ),
    ],
    ids=["cut off", "bytes", "deep", "surrogate", "surrogate answer", "list", "nan", "column"],
)
def test_what_cannot_be_read_is_one_line(tmp_path, text, message):
    (tmp_path / "t.jsonl").write_bytes(text)
    with pytest.raises(RelexkitError, match=message) as raised:
        load_task({"name": "file", "path": str(tmp_path / "t.jsonl")})
    assert "\n" not in str(raised.value)


def test_prompts_outside_the_vocabulary_are_named():
    tokenizer = tiny_tokenizer()
    with pytest.raises(RelexkitError, match="prompt 'naïve' cannot be encoded by the tokenizer"):
        encode_prompt(tokenizer, "naïve")
    assert encode_prompt(tokenizer, "1+1=")


@pytest.mark.parametrize(
    ("value", "completion"),
    [
        ("0.000015", "1.5e-5"),
        ("1e22", "10^{22}"),
        ("1.5e-05", r"1.5 \times 10^{-5}"),
        ("3.0", "3"),
        ("true", '"True"'),
        ('"3.2e4"', "32000"),
        ('"so 48 + 24\\n#### 72"', "72"),
        (r'"thus \\boxed{\\frac{1}{2}}"', "0.5"),
    ],
)
def test_answers_as_data_has_them(tmp_path, value, completion):
    (tmp_path / "t.jsonl").write_text(f'{{"prompt": "q", "answer": {value}}}\n')
    task = load_task({"name": "file", "path": str(tmp_path / "t.jsonl")}, needed=("validation",))
    assert task.reward(task.problems("validation")[0], completion.strip('"')) == 1.0


def test_a_system_message_makes_a_chat(tmp_path):
    (tmp_path / "t.jsonl").write_text(lines(ROWS))
    options = {"name": "file", "path": str(tmp_path / "t.jsonl"), "num_validation": 2}
    task = load_task({**options, "system": "Be brief."})
    assert task.problems("train")[0].prompt[0] == {"role": "system", "content": "Be brief."}
    assert [
        m["role"] for m in load_task({**options, "system": ""}).problems("train")[0].prompt
    ] == ["user"]


def test_the_whole_of_a_file_can_be_asked(tmp_path):
    (tmp_path / "t.jsonl").write_text(lines(ROWS))
    task = load_task(
        {"name": "file", "path": str(tmp_path / "t.jsonl"), "num_validation": 2}, needed=("all",)
    )
    assert sorted(p.prompt for p in task.problems("all")) == sorted(row["prompt"] for row in ROWS)
    assert task.problems("all")[:2] == task.problems("validation")
