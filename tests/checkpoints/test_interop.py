"""Checkpoints that trainers' own code wrote in real processes, against their own way of loading
them. Slow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import LLAMA_CONFIG
from safetensors.torch import load_file
from sharded import assert_reads

from relexkit import import_checkpoints
from relexkit.checkpoints import open_checkpoint, open_run

SCRIPT = Path(__file__).parents[1].joinpath("fsdp_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "accelerate"])
def test_two_gloo_processes_under_fsdp(tmp_path: Path, kind: str) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    place = tmp_path / ("checkpoint" if kind == "accelerate" else "verl")
    assert_reads(open_checkpoint(place), load_file(tmp_path / "whole.safetensors"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trainers_own_checkpoints(tmp_path: Path) -> None:
    """Trainer writes two checkpoints; deltas equal those of ``from_pretrained`` bit for bit."""
    import transformers

    config = transformers.LlamaConfig(**(LLAMA_CONFIG | {"tie_word_embeddings": True}))
    model: Any = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    rows = [
        {"input_ids": torch.tensor([1, 2, 3, 4]), "labels": torch.tensor([1, 2, 3, 4])}
        for _ in range(8)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    run = open_run(tmp_path / "run")
    assert (run.steps, run.notes[0]) == ([2, 4], "read as Hugging Face folders, float32, 2 steps")
    store = import_checkpoints(
        tmp_path / "run", tmp_path / "s.zarr", base=tmp_path / "base", mantissa_bits=23
    ).store
    loaded = [
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / p)
        for p in ("base", "run/checkpoint-2", "run/checkpoint-4")
    ]
    for spec in store.layout.moving_tensors:
        tensors = [m.get_parameter(spec.name).detach().numpy().reshape(-1) for m in loaded]
        for row in (0, 1):
            found = np.concatenate(
                [
                    store.read_row(s.part, row, s.offset, s.offset + s.numel)
                    for s in store.layout.segments_of(spec)
                ]
            )
            np.testing.assert_array_equal(found, tensors[row + 1] - tensors[0], err_msg=spec.name)
    assert "loss" in store.metric_names()
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    assert open_run(tmp_path / "run").steps == [2]
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
