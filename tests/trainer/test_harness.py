"""lm-evaluation-harness on steps of a store: the numbers of its ``hf`` model on written folders."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from relexkit import Prediction, Recorder, RelexkitError, TrajectoryStore, checkout, extrapolate
from relexkit.cli import main

pytest.importorskip("lm_eval")

# what the harness and its dependencies bring along
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CHOICE = """
task: sums_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
output_type: multiple_choice
doc_to_text: "{{{{a}}}}+{{{{b}}}}="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: sums_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
output_type: generate_until
doc_to_text: "{{{{a}}}}+{{{{b}}}}="
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["+"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: sums_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{a}}}}+{{{{b}}}}={{{{answer}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
TASKS = ["sums_choice", "sums_generate", "sums_rolling"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TrajectoryStore:
    model, path = tiny_model(), tmp_path_factory.mktemp("store") / "run.zarr"
    generator = torch.Generator().manual_seed(0)
    with Recorder(model, path, encoding="exact", tokenizer=tiny_tokenizer()) as recorder:
        for step in (1, 2, 4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
            recorder.record(step, {"learning_rate": 1e-3})
    return TrajectoryStore(path)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number in range(12):
        a, b = 3 * number % 7, 5 * number % 9
        choices = [str(a + b), str(a + b + 1), str(a + 10 * b)]
        rows.append({"a": a, "b": b, "answer": choices[0], "choices": choices, "right": 0})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in zip(TASKS, (CHOICE, GENERATE, ROLLING), strict=True):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """Every log-likelihood and every generated text."""
    return {task: [s["resps"] for s in results["samples"][task]] for task in TASKS}


def test_log_likelihoods_and_generations_are_those_of_hf_on_the_written_folder(
    store, tasks, tmp_path
):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import relexkit.trainer.evaluation.harness  # noqa: F401  (registers the model)

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    target = extrapolate(
        store, [9], tmp_path / "predicted", Prediction(until=2, method="two-point")
    )[0]
    seen = []
    for chosen, folder in (
        (f"step=4,store={store.path}", checkout(store, 4, tmp_path / "four")),
        (f"predict=9,until=2,method=two-point,store={store.path}", target.folder),
    ):
        ours, theirs = (
            simple_evaluate(
                name,
                model_args=f"{given},dtype=float32,add_bos_token=False",
                tasks=TASKS,
                task_manager=manager,
                batch_size=4,
                device="cpu",
                bootstrap_iters=10,
            )
            for name, given in (("relexkit", chosen), ("hf", f"pretrained={folder}"))
        )
        assert answers(ours) == answers(theirs)
        assert ours["results"] == theirs["results"]
        seen.append(answers(ours))
    assert seen[0] != seen[1]


def test_the_command_evaluates_steps_with_one_model_and_keeps_what_the_harness_keeps(
    store, tasks, tmp_path, capsys
):
    words = ["--step", "0", "4", "--to", "9", "--until", "2", "--method", "two-point"]
    options = ["--include-path", str(tasks), "--batch-size", "4", "--output", str(tmp_path / "o")]
    command = ["evaluate", str(store.path), *words, "--harness", *TASKS[:2], *options]
    assert main([*command, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in models] == ["base", "step 4", "two-point 2 -> 9"]
    for model, folder in zip(models, ("base", "step-4", "two-point-2-9"), strict=True):
        (kept,) = (tmp_path / "o" / folder).glob("results_*.json")
        document = json.loads(kept.read_text())
        assert document["config"]["model_args"]["evaluated"] == model["name"]
        assert len(list((tmp_path / "o" / folder).glob("samples_*.jsonl"))) == 2
        by_name = {(row["task"], row["metric"]): row for row in model["scores"]}
        assert by_name.keys() == {
            ("sums_choice", "acc"),
            ("sums_choice", "acc_norm"),
            ("sums_generate", "exact_match"),
        }
        for (task, metric), row in by_name.items():
            assert row["value"] == document["results"][task][f"{metric},none"]
        low, high = by_name["sums_choice", "acc"]["interval"]
        assert low <= by_name["sums_choice", "acc"]["value"] <= high
        assert ("difference" in by_name["sums_choice", "acc"]) == (model["name"] != "base")
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "sums_choice" in printed.out
    assert "against first" in printed.out


def test_metrics_are_means_with_intervals_and_paired_differences():
    from relexkit.trainer.evaluation.harness import scores
    from relexkit.trainer.evaluation.intervals import mean_interval, paired_difference

    def results(values: list[float]) -> dict[str, Any]:
        return {
            "results": {
                "t": {
                    "alias": "t",
                    "acc,none": float(np.mean(values)),
                    "acc_stderr,none": 0.1,
                    "perplexity,strict": 4.0,
                    "perplexity_stderr,strict": 0.5,
                    "bleu,none": 3.0,
                    "bleu_stderr,none": "N/A",
                }
            },
            "samples": {
                "t": [{"filter": "none", "acc": value, "perplexity": (-1.0, 3)} for value in values]
            },
        }

    first, second = (scores(results(values)) for values in ([1.0, 0, 1, 1], [0.0, 0, 1, 0]))
    assert [score.metric for score in first] == ["acc", "perplexity,strict", "bleu"]
    assert first[0].interval == mean_interval(np.array([1.0, 0, 1, 1]))
    assert first[1].interval == pytest.approx((4 - 0.98, 4 + 0.98), abs=1e-3)
    assert first[2].interval is None
    assert second[0].minus(first[0]) == paired_difference(
        np.array([0.0, 0, 1, 0]), np.array([1.0, 0, 1, 1])
    )
    assert second[1].minus(first[1]) is None


def test_what_cannot_be_evaluated_is_named(store, tasks, capsys, monkeypatch, tmp_path):
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))  # few tasks of its own
    from relexkit.trainer.evaluation.harness import StoreLM

    with pytest.raises(RelexkitError, match="step None and predict None; expected one of them"):
        StoreLM(str(store.path))
    with pytest.raises(RelexkitError, match="step 1 and predict 9"):
        StoreLM(str(store.path), step=1, predict=9)
    command = ["evaluate", str(store.path), "--include-path", str(tasks), "--harness"]
    assert main([*command, "sums_choice", "no_such_task"]) == 1
    assert "task 'no_such_task' is unknown to lm-evaluation-harness" in capsys.readouterr().err
    assert main(["evaluate", str(store.path)]) == 1
    assert "names its task; expected --task" in capsys.readouterr().err


def test_the_entry_point_leads_to_the_model():
    """As a release of the harness that looks for plug-ins resolves it."""
    from lm_eval.api.registry import Registry

    from relexkit.trainer.evaluation.harness import StoreLM

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    ((name, value),) = project["project"]["entry-points"]["lm_eval.models"].items()
    registry: Registry[Any] = Registry("model")
    registry.register(name, target=importlib.metadata.EntryPoint(name, value, "lm_eval.models"))
    assert registry.get("relexkit") is StoreLM
