"""The study's second task: words spelled backward, of reasoning_gym and with its scorer, which
gives partial marks; and the small model that starts on it, half-way to the skill.

    python docs/study/second_task.py FOLDER

makes the model in 75 seconds of one core: a Llama of 1.3 million parameters that reads the question
as one token and the word as characters, after supervised steps on the words of the training split.
It spells 0.52 of the validation's words right, 0.31 where it samples.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Any

import torch

from relexkit.trainer.policy import small_model
from relexkit.trainer.policy.small_model import WarmStart

SPELLING: dict[str, Any] = {
    "name": "reasoning_gym",
    "dataset": "spell_backward",
    "num_train": 10_000,
    "num_validation": 512,
    "options": {"max_word_len": 9},
}
"""The task: 10,000 different words of 3 to 9 letters; an answer and its end are ten tokens."""
SETTINGS = WarmStart(
    task=SPELLING,
    characters=string.ascii_letters,
    phrases=("Spell this word backward (example: sun -> nus): ",),
    steps=240,
)


def make(folder: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder, on one thread: the same bits each
    time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small_model.make(folder, SETTINGS)
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
