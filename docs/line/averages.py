"""Averages of the latest recorded steps on the task, against the last step, along runs; and what
``advise`` says there.

    python docs/line/averages.py OUT.json RUN.zarr... --task TASK [--until 20 33 50] [--window 3 5
    10 20] python docs/line/averages.py OUT.json

Greedy answers and one sampled answer to the same held-out problems. Prints means over runs whose
names differ in the seed only.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from relexkit import Options, Prediction, TrajectoryStore, gram, predict_weights
from relexkit.assess.advice import advise
from relexkit.trainer.evaluation.evaluate import evaluate
from relexkit.trainer.evaluation.settings import EvaluationSettings
from relexkit.trainer.policy.stored_model import StoredModel
from relexkit.trainer.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--task")
    parser.add_argument("--until", type=int, nargs="+", default=[20, 33, 50, 66, 83, 100])
    parser.add_argument("--window", type=int, nargs="+", default=[3, 5, 10, 20])
    parser.add_argument("--num-problems", type=int, default=256)
    parser.add_argument("--max-completion-length", type=int, default=10)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    for run in options.runs:
        rows += measured(run, options)
        options.out.write_text(json.dumps(rows, indent=0) + "\n")
    table(rows)


def measured(run: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of the last step and of every average, from every prefix of one run."""
    store, task = TrajectoryStore(run), load_task(yaml.safe_load(options.task))
    whole, stored, rows = gram(store), StoredModel(store), []
    for until in options.until:
        seen = whole.until(until)
        row: dict[str, Any] = {
            "run": "/".join(Path(run).parts[-3:-1]),
            "until": until,
            "verdict": advise(seen, store.metrics()).verdict,
        }
        for window in (1, *options.window):
            how = (
                Prediction(method="hold")
                if window == 1
                else Prediction(method="average", options=Options(window=window))
            )
            stored.put(predict_weights(seen, [float(until)], how)[0])
            found = evaluate(
                stored.model,
                stored.tokenizer,
                task,
                EvaluationSettings(
                    num_problems=options.num_problems,
                    samples=1,
                    max_completion_length=options.max_completion_length,
                    batch_size=options.num_problems,
                ),
            )
            row[str(window)] = {"greedy": found.accuracy, "sampled": found.sampled_accuracy}
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """Mean gain over the last step by kind of run, prefix and window, greedy / sampled."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"seed-\d+-", "", row["run"]), []).append(row)
    for kind, own in kinds.items():
        for until in (*sorted({row["until"] for row in own}), None):
            chosen = [row for row in own if until in (None, row["until"])]
            verdicts = sorted({row["verdict"] for row in chosen})
            cells = []
            for window in (key for key in chosen[0] if key.isdigit() and key != "1"):
                greedy, sampled = (
                    np.array([row[window][how] - row["1"][how] for row in chosen])
                    for how in ("greedy", "sampled")
                )
                cells.append(
                    f"{greedy.mean():+.3f} ({greedy.min():+.3f} to {greedy.max():+.3f}) /"
                    f" {sampled.mean():+.3f}"
                )
            print(
                f"| {kind} | {until or 'all'} | {len(chosen)} | {', '.join(verdicts)} |"
                f" {' | '.join(cells)} |"
            )


if __name__ == "__main__":
    main()
