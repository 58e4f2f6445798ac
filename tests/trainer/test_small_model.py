"""Small models of other tasks: the study's second one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from second_task import SETTINGS, SPELLING
from transformers import AutoModelForCausalLM, AutoTokenizer

from relexkit.trainer.policy.small_model import make
from relexkit.trainer.tasks import load_task


def test_a_question_is_one_token_and_words_are_written_without_spaces(tmp_path: Path) -> None:
    settings = replace(SETTINGS, task=SPELLING | {"num_train": 200}, steps=2, batch_size=4)
    for name in ("first", "second"):
        make(tmp_path / name, settings)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    task = load_task(settings.task)
    for problem in task.problems("train"):
        prompt, answer = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.answer))
        assert len(prompt) == 1 + len(answer)
        assert tokenizer.decode(prompt[1:]) == problem.answer[::-1]
        assert task.reward(problem, tokenizer.decode(answer)) == 1
        assert 0 < task.reward(problem, tokenizer.decode(answer[:1] * len(answer))) <= 1
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("first", "second")
    )
    assert torch.isfinite(first(torch.tensor([prompt])).logits).all()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, one.bfloat16().float())


def test_there_are_enough_words_and_none_is_in_both_splits() -> None:
    task = load_task(SPELLING)
    words = [{p.answer for p in task.problems(split)} for split in ("train", "validation")]
    assert [len(found) for found in words] == [10_000, 512]
    assert not words[0] & words[1]
    assert max(map(len, words[0])) == 9
