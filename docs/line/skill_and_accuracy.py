"""Does weight-space skill foretell the task? Predictions of a small real run, their skill and their measured accuracy.

    python docs/line/skill_and_accuracy.py RUN_FOLDER OUT_FOLDER

RUN_FOLDER is what ``trainer.small_run.make_run`` writes. Every prediction is evaluated on the same problems in float32, rounded
to bfloat16 to nearest, and rounded stochastically; the skill is that of the float32 prediction against the float32 run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from analysis import style
from relexkit import apply, gram, import_checkpoints, predict_weights
from trainer.evaluate import evaluate
from trainer.setup import load_model
from trainer.tasks import load_task

PREFIXES, RATIOS, METHODS = (15, 30), (1.25, 1.5, 2.0), ("hold", "model", "two-point", "relex", "least-squares")
PRECISIONS = ("float32", "nearest", "stochastic")
NUM_PROBLEMS = 256


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    store = import_checkpoints(str(source / "float32"), str(out / "float32.zarr"), base=str(source / "base")).store
    model, tokenizer = load_model(str(source / "base"), torch.device("cpu"))
    narrow = load_model(str(source / "base"), torch.device("cpu"))[0].bfloat16()
    task = load_task({"name": "arithmetic", "family": "sorting", "digits": 8})
    whole = gram(store)

    def accuracy(weights: np.ndarray, precision: str) -> np.ndarray:
        if precision == "float32":
            apply(store, model, weights)
        else:
            apply(store, narrow, weights, rounding=precision)
            model.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
        return evaluate(model, tokenizer, task, num_problems=NUM_PROBLEMS, max_completion_length=9).values()

    rows = []
    for until in PREFIXES:
        seen = whole.until(until)
        held = predict_weights(seen, [float(until)], method="hold")[0]
        base = {p: accuracy(held, p) for p in PRECISIONS}
        for target in (round(r * until) for r in RATIOS):
            row = int(np.flatnonzero(whole.steps == target)[0])
            trained = np.zeros((len(whole.names), len(whole.steps)))
            trained[:, row] = 1
            rows.append(entry(until, target, "trained", 1.0, {p: accuracy(trained, p) for p in PRECISIONS}, base))
            for method in METHODS:
                weights = predict_weights(seen, [float(target)], method=method)[0]
                if method == "hold":
                    rows.append(entry(until, target, method, 0.0, base, base))
                    continue
                found = {p: accuracy(weights, p) for p in PRECISIONS}
                rows.append(entry(until, target, method, skill(whole.matrices, weights, held, row), found, base))
            print(rows[-5:], flush=True)
    (out / "skill_and_accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out)


def skill(matrices: np.ndarray, weights: np.ndarray, held: np.ndarray, row: int) -> float:
    def error(a: np.ndarray) -> float:
        n = a.shape[1]
        return float(sum(w @ g[:n, :n] @ w - 2 * w @ g[:n, row] + g[row, row] for w, g in zip(a, matrices, strict=True)))

    return 1 - error(weights) / error(held)


def entry(until: int, target: int, method: str, gain: float, found: dict, base: dict) -> dict:
    return {"until": until, "target": target, "method": method, "skill": gain,
            "accuracy": {p: float(v.mean()) for p, v in found.items()},
            "difference": {p: float((v - base[p]).mean()) for p, v in found.items()}}  # fmt: skip


def draw(rows: list[dict], out: Path) -> None:
    with style.styled():
        figure = style.new_figure(2.6)
        panels = figure.subplots(1, 3, sharey=True)
        for axes, precision in zip(panels, PRECISIONS, strict=True):
            axes.axhline(0, **style.NULL_LINE)
            axes.axvline(0, **style.NULL_LINE)
            for index, method in enumerate(("trained", *METHODS[1:])):
                own = [r for r in rows if r["method"] == method]
                axes.plot([max(-2.0, r["skill"]) for r in own], [r["difference"][precision] for r in own], linestyle="",
                          marker=style.MARKERS[index], color=style.METHODS.get(method, "black"), label=method)  # fmt: skip
            axes.set_title(precision if precision == "float32" else f"bfloat16, {precision}")
        figure.supxlabel("skill of the weights against hold (from \N{MINUS SIGN}2)", fontsize=8)
        panels[0].set_ylabel("accuracy less that of hold")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
        style.save(figure, out, "skill_and_accuracy")


if __name__ == "__main__":
    main()
