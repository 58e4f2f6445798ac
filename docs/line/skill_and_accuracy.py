"""Does weight-space skill foretell the task? Predictions of recorded runs, their skill and their
measured accuracy.

    python docs/line/skill_and_accuracy.py OUT.json RUN.zarr... --task TASK --until 15 33 --ratio
    1.25 2 python docs/line/skill_and_accuracy.py OUT.json --draw FIGURE_FOLDER

Every prediction is evaluated greedily on the same held-out problems in float32, rounded to bfloat16
to nearest, and rounded stochastically; the skill is that of the float32 prediction against the
run's own later step. What is in OUT.json is not done again, so the command goes on where it was
stopped; with ``--minutes`` it stops itself.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from relexkit import Prediction, TrajectoryStore, gram, predict_weights
from relexkit.analysis import style
from relexkit.gram_matrix import Gram
from relexkit.trainer.evaluation.evaluate import evaluate
from relexkit.trainer.evaluation.settings import EvaluationSettings
from relexkit.trainer.policy.stored_model import StoredModel
from relexkit.trainer.tasks import load_task
from relexkit.weights.dtypes import round_bits, to_float32

METHODS = ("model", "drift", "two-point", "relex", "least-squares", "average")
PRECISIONS = ("float32", "nearest", "stochastic")
NAMES = {
    "rate-1e-05/run": "small model, learning rate 1e-5",
    "rate-0.0001/run": "small model, learning rate 1e-4",
    "smol/run": "SmolLM2-135M-Instruct, 5e-6",
}
KEY = ("run", "until", "target", "method")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--task")
    parser.add_argument("--until", type=int, nargs="+")
    parser.add_argument(
        "--ratio",
        type=float,
        nargs="+",
        help="targets, as multiples of each --until, that were recorded",
    )
    parser.add_argument("--num-problems", type=int, default=256)
    parser.add_argument("--max-completion-length", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=np.inf)
    parser.add_argument("--draw", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    deadline = time.monotonic() + 60 * options.minutes
    for run in options.runs:
        for row in study(run, options, {tuple(r[k] for k in KEY) for r in rows}):
            rows.append(row)
            options.out.write_text(json.dumps(rows, indent=0) + "\n")
            print({k: row[k] for k in (*KEY, "skill")}, row["accuracy"], flush=True)
            if time.monotonic() > deadline:
                return
    if options.draw:
        draw(rows, options.draw)
    for kind, own in by_kind(rows).items():
        print(NAMES.get(kind, kind))
        table(own)


def study(run: str, options: argparse.Namespace, done: set[tuple]) -> Any:
    """Rows of one run that are not done: the held step, the trained target, and every prediction of
    it.
    """
    store, task = TrajectoryStore(run), load_task(yaml.safe_load(options.task))
    whole = gram(store)
    stored, known = (
        StoredModel(store),
        {},
    )  # what standing still and a trained step get does not depend on the other step
    for until in options.until:
        for target in (round(ratio * until) for ratio in options.ratio):
            if target not in whole.steps:
                continue
            for method in ("hold", "trained", *METHODS):
                name = "/".join(Path(run).parts[-3:-1])
                if (name, until, target, method) in done:
                    continue
                held = target if method == "trained" else until
                how = Prediction(method="hold" if method == "trained" else method)
                weights = predict_weights(whole.until(held), [float(target)], how)[0]
                same = {
                    "hold": (method, until),
                    "average": (method, until),
                    "trained": (method, target),
                }.get(method)
                if same is None or same not in known:
                    if method == "trained":
                        stored.put_step(target)
                    else:
                        stored.put(weights)
                    known[same] = {p: answers(stored, task, p, options) for p in PRECISIONS}
                right = known[same]
                yield {
                    "run": name,
                    "until": until,
                    "target": target,
                    "method": method,
                    "skill": skill(whole, weights, until, target),
                    "accuracy": {p: float(np.mean(v)) for p, v in right.items()},
                    "right": {p: "".join("01"[int(x)] for x in v) for p, v in right.items()},
                }


def answers(
    stored: StoredModel, task: Any, precision: str, options: argparse.Namespace
) -> np.ndarray:
    """Which problems the model that ``stored`` holds gets right in this precision; the float32
    weights are put back.
    """
    kept = {name: value.detach().clone() for name, value in stored.model.named_parameters()}
    if precision != "float32":
        with torch.no_grad():
            for name, value in stored.model.named_parameters():
                bits = round_bits(kept[name].view(-1).numpy(), "bfloat16", precision, tensor=name)
                value.copy_(torch.from_numpy(to_float32(bits, "bfloat16")).view(value.shape))
    limits = {
        "num_problems": options.num_problems,
        "max_completion_length": options.max_completion_length,
    }
    settings = EvaluationSettings(batch_size=options.num_problems, **limits)
    found = evaluate(stored.model, stored.tokenizer, task, settings).values()
    with torch.no_grad():
        for name, value in stored.model.named_parameters():
            value.copy_(kept[name])
    return found


def skill(whole: Gram, weights: np.ndarray, until: int, target: int) -> float:
    """One less squared error over that of standing still, of the whole model."""
    row = int(np.flatnonzero(whole.steps == target)[0])
    held = np.zeros(int(np.flatnonzero(whole.steps == until)[0]) + 1)
    held[-1] = 1.0

    def error(of: np.ndarray) -> float:
        n = of.shape[1]
        return float(
            sum(
                w @ g[:n, :n] @ w - 2 * w @ g[:n, row] + g[row, row]
                for w, g in zip(of, whole.matrices, strict=True)
            )
        )

    return 1 - error(weights) / error(np.tile(held, (len(weights), 1)))


def gains(rows: list[dict]) -> list[dict]:
    """Every prediction with its gain over standing still, in pairs, and that of the trained step,
    by precision.
    """
    found = {tuple(row[k] for k in KEY): row for row in rows}

    def difference(row: dict, precision: str) -> float:
        held = found[row["run"], row["until"], row["target"], "hold"]
        return row["accuracy"][precision] - held["accuracy"][precision]

    return [
        row | {"gain": {p: difference(row, p) for p in PRECISIONS}}
        for row in rows
        if row["method"] != "hold"
    ]


def table(rows: list[dict]) -> None:
    """Means over runs, and how often the sign of the skill is that of the gain."""
    compared = gains(rows)
    for until, target in sorted({(r["until"], r["target"]) for r in compared}):
        cells = []
        for method in ("trained", *METHODS):
            own = [
                r
                for r in compared
                if (r["until"], r["target"], r["method"]) == (until, target, method)
            ]
            if own:
                gain = ", ".join(f"{np.mean([r['gain'][p] for r in own]):+.3f}" for p in PRECISIONS)
                cells.append(f"{method} {np.mean([r['skill'] for r in own]):+.2f} ({gain})")
        print(f"| {until} → {target} | {' | '.join(cells)} |")
    predicted = [r for r in compared if r["method"] in METHODS]
    for precision in PRECISIONS:
        skills, found = (
            np.array([r[k] if k == "skill" else r[k][precision] for r in predicted])
            for k in ("skill", "gain")
        )
        better = found[skills > 0]
        ranks = [np.argsort(np.argsort(v)) for v in (skills, found)]
        print(
            f"{precision}: {len(skills)} predictions, rank correlation of skill and gain"
            f" {np.corrcoef(*ranks)[0, 1]:.2f}; of {len(better)} with positive skill"
            f" {(better > 0).sum()} gain, {(better < 0).sum()} lose, mean {better.mean():+.3f}"
        )


def by_kind(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of runs whose names differ in the seed only, together."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"seed-\d+-", "", row["run"]), []).append(row)
    return kinds


def draw(rows: list[dict], folder: Path) -> None:
    """Gain on the task against skill of the weights, by method; a row of panels for each kind of
    run, a column a precision.
    """
    kinds = by_kind(gains(rows))
    with style.styled():
        figure = style.new_figure(0.9 + 1.5 * len(kinds))
        panels = figure.subplots(len(kinds), 3, sharex=True, sharey="row", squeeze=False)
        for across, (kind, own) in zip(panels, kinds.items(), strict=True):
            for axes, precision in zip(across, PRECISIONS, strict=True):
                axes.axhline(0, **style.NULL_LINE)
                axes.axvline(0, **style.NULL_LINE)
                for index, method in enumerate(("trained", *METHODS)):
                    points = [
                        (max(-2.0, r["skill"]), r["gain"][precision])
                        for r in own
                        if r["method"] == method
                    ]
                    axes.plot(
                        *np.array(points).T,
                        linestyle="",
                        marker=style.MARKERS[index],
                        markersize=3.5,
                        label=method,
                        color=style.METHODS.get(method, "black"),
                        markerfacecolor="white" if method == "drift" else None,
                    )
            across[0].set_ylabel("gain over hold")
            across[0].set_title(NAMES.get(kind, kind))
        for axes, precision in zip(panels[-1], PRECISIONS, strict=True):
            axes.set_xlabel(precision if precision == "float32" else f"bfloat16, {precision}")
        panels[-1, 1].set_xlabel(
            "bfloat16, nearest\nskill of the weights against hold (from \N{MINUS SIGN}2)"
        )
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
        style.save(figure, folder, "skill_and_accuracy")


if __name__ == "__main__":
    main()
