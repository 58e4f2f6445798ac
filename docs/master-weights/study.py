"""What float32 master weights show that checkpoints in bfloat16 do not: the runs, the evaluations
and the numbers of README.md.

    python docs/master-weights/study.py OUT [--seeds 0 1 2] [--rates 1e-5 1e-4] [--steps 100]

For every seed and learning rate a GRPO run of the small embedded model is recorded from its float32
weights. The same weights, rounded to nearest in bfloat16 as every exporter does, become checkpoints
and a second store. Both are analysed and extrapolated; models are evaluated on the same held-out
problems in float32, and rounded to bfloat16, to nearest and stochastically. A finished run is kept,
so the command goes on where it stopped. Leaves ``OUT/results.json``, ``OUT/table.md`` and two
figures.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from relexkit import (
    Prediction,
    TrajectoryStore,
    checkout,
    gram,
    import_checkpoints,
    predict_weights,
    spectrum,
)
from relexkit.analysis import style
from relexkit.materialize import round_checkpoint
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.evaluation.evaluate import evaluate
from relexkit.trainer.evaluation.intervals import mean_interval
from relexkit.trainer.evaluation.settings import EvaluationSettings
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.policy.small_model import FOLDER
from relexkit.trainer.policy.stored_model import StoredModel
from relexkit.trainer.tasks import load_task

PRECISIONS = ("float32", "nearest", "stochastic")
METHODS = ("relex", "model", "least-squares")
TASK = {"name": "arithmetic", "family": "sorting"}
PROBLEMS, LENGTH = 256, 10


def make_run(folder: Path, model: Path, seed: int, rate: float, steps: int) -> None:
    """The run and its two stores."""
    base = folder / "base"
    if not base.exists():
        round_checkpoint(model, base, dtype="bfloat16", rounding="nearest")
    train(
        GRPOConfig(
            model=str(base),
            task=TASK,
            output=str(folder / "run"),
            seed=seed,
            max_steps=steps,
            learning_rate=rate,
            generation_batch_size=128,
            num_generations=8,
            max_completion_length=LENGTH,
            generation_rows=128,
            micro_batch_tokens=4096,
            device="cpu",
            save_steps=20,
        )
    )
    exact = TrajectoryStore(folder / "run" / "run.zarr")
    for step in range(1, steps + 1):
        exported = folder / "bfloat16" / f"checkpoint-{step}"
        if not exported.exists():
            round_checkpoint(
                checkout(exact, step, folder / "float32" / f"checkpoint-{step}"),
                exported,
                rounding="nearest",
            )
    import_checkpoints(folder / "bfloat16", folder / "bfloat16.zarr", base=base)


def geometry(store: TrajectoryStore) -> dict:
    """The headline numbers of the whole model, and how much of it moved."""
    result = spectrum(gram(store), scope="global")
    found = result.scopes[0]
    return {
        "variance_1": float(found.explained_variance_ratio[0]),
        "variance_2": float(found.explained_variance_ratio[:2].sum()),
        "r2": float(found.r2[0]),
        "update_cosine": float(np.nanmean(found.update_cosines)),
        "changed_per_step": float(found.changed.mean()),
        "ever_moved": float(found.moved[-1]),
        "null_variance_1": float(result.null.explained_variance_ratio[0]),
        "null_r2": float(result.null.r2[0]),
        "bytes": sum(store.num_bytes().values()),
    }


def cosines(folder: Path, steps: list[int]) -> dict[str, float]:
    """Cosine of the bfloat16 delta to the true one at some steps."""

    def delta(kind: str, step: int) -> torch.Tensor:
        from safetensors.torch import load_file

        now = load_file(folder / kind / f"checkpoint-{step}" / "model.safetensors")
        base = load_file(folder / "base" / "model.safetensors")
        return torch.cat(
            [(now[name].double() - base[name].double()).flatten() for name in sorted(base)]
        )

    return {
        str(s): float(torch.cosine_similarity(delta("float32", s), delta("bfloat16", s), dim=0))
        for s in steps
    }


def accuracy(model: StoredModel, put: Callable[[StoredModel], None]) -> dict:
    """Greedy and sampled accuracy of the weights that ``put`` puts into the model."""
    put(model)
    found = evaluate(
        model.model,
        model.tokenizer,
        load_task(TASK),
        EvaluationSettings(
            num_problems=PROBLEMS, samples=1, max_completion_length=LENGTH, batch_size=256
        ),
    )
    return {"greedy": found.accuracy, "sampled": found.sampled_accuracy}


def loaded(store: TrajectoryStore) -> dict[str, StoredModel]:
    """The store's model once for each of ``PRECISIONS``."""
    rounded = {
        rounding: StoredModel(store, Loading(dtype="bfloat16", rounding=rounding, seed=1))
        for rounding in PRECISIONS[1:]
    }
    return {"float32": StoredModel(store), **rounded}


def study(folder: Path, model: Path, seed: int, rate: float, steps: int) -> dict:
    """Everything about one run."""
    make_run(folder, model, seed, rate, steps)
    stores = {
        "float32": TrajectoryStore(folder / "run" / "run.zarr"),
        "bfloat16": TrajectoryStore(folder / "bfloat16.zarr"),
    }
    models = {source: loaded(store) for source, store in stores.items()}
    shown = sorted({0, *(round(steps * k / 6) for k in range(1, 7))})
    trained = {
        str(step): {
            p: accuracy(models["float32"][p], lambda model, step=step: model.put_step(step))
            for p in PRECISIONS
        }
        for step in shown
    }
    predictions = []
    for source, store in stores.items():
        matrices = gram(store)
        for until in (steps // 3, 2 * steps // 3):
            for target in (steps, 2 * steps):
                for method in METHODS:
                    scope = "global" if method == "model" else "tensor"
                    weights = predict_weights(
                        matrices.until(until), [target], Prediction(method=method, scope=scope)
                    )[0]
                    found = {
                        p: accuracy(models[source][p], lambda model, a=weights: model.put(a))
                        for p in ("float32", "stochastic")
                    }
                    predictions.append(
                        {
                            "source": source,
                            "until": until,
                            "target": target,
                            "method": method,
                            **found,
                        }
                    )
    log = read_log(folder / "run")
    return {
        "seed": seed,
        "learning_rate": rate,
        "steps": steps,
        "geometry": {source: geometry(store) for source, store in stores.items()},
        "cosine": cosines(folder, [shown[1], shown[3], shown[-1]]),
        "accuracy": trained,
        "predictions": predictions,
        "reward": [entry["reward"] for entry in log],
        "informative": float(np.mean([1 - entry["frac_reward_zero_std"] for entry in log])),
    }


def over_seeds(values: list[float], digits: int = 3) -> str:
    """Mean and range of a number over the seeds."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables(results: list[dict]) -> str:
    """The tables of README.md, one block a learning rate: mean (least to most over seeds)."""
    lines = []
    for rate in sorted({r["learning_rate"] for r in results}):
        runs = [r for r in results if r["learning_rate"] == rate]
        last = str(runs[0]["steps"])
        lines += [f"## Learning rate {rate:g}, {len(runs)} seeds, {last} steps", ""]
        lines += ["| | from float32 master weights | from bfloat16 checkpoints |", "|---|---|---|"]
        rows = (
            ("variance on the first direction", "variance_1"),
            ("on the first two", "variance_2"),
            ("R² of the first coefficient", "r2"),
            ("mean cosine of neighbouring updates", "update_cosine"),
            ("weights that change in a step", "changed_per_step"),
            ("that ever moved", "ever_moved"),
        )
        for name, key in rows:
            cells = [
                over_seeds([r["geometry"][source][key] for r in runs])
                for source in ("float32", "bfloat16")
            ]
            lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
        for step in runs[0]["cosine"]:
            values = [r["cosine"][step] for r in runs]
            lines.append(f"| cosine to the true delta at step {step} | 1 | {over_seeds(values)} |")
        lines += [
            "",
            "| accuracy, greedy / sampled | float32 | bfloat16, nearest | bfloat16, stochastic |",
            "|---|---|---|---|",
        ]
        for step in runs[0]["accuracy"]:
            cells = []
            for p in PRECISIONS:
                greedy, sampled = (
                    [r["accuracy"][step][p][kind] for r in runs] for kind in ("greedy", "sampled")
                )
                cells.append(f"{over_seeds(greedy, 2)} / {over_seeds(sampled, 2)}")
            lines.append(f"| step {step} | {' | '.join(cells)} |")
        lines += [
            "",
            "| predicted, greedy / sampled in float32 | from float32 | from bfloat16 |",
            "|---|---|---|",
        ]
        keys = [
            (p["until"], p["target"], p["method"])
            for p in runs[0]["predictions"]
            if p["source"] == "float32"
        ]
        for until, target, method in keys:
            cells = []
            for source in ("float32", "bfloat16"):
                chosen = [
                    p["float32"]
                    for r in runs
                    for p in r["predictions"]
                    if (p["source"], p["until"], p["target"], p["method"])
                    == (source, until, target, method)
                ]
                cells.append(
                    " / ".join(
                        over_seeds([c[kind] for c in chosen], 2) for kind in ("greedy", "sampled")
                    )
                )
            lines.append(f"| {method}, {until} → {target} | {' | '.join(cells)} |")
        lines.append("")
    low, high = mean_interval(np.repeat([0.0, 1.0], PROBLEMS // 2))
    lines.append(
        f"Mean (least to most) over seeds; an accuracy near one half on {PROBLEMS} problems has a"
        f" 95 % interval of ± {(high - low) / 2:.2f}."
    )
    return "\n".join(lines) + "\n"


def by_rate(results: list[dict]) -> dict[float, list[dict]]:
    """Runs of each learning rate, the smallest first."""
    return {
        rate: [r for r in results if r["learning_rate"] == rate]
        for rate in sorted({r["learning_rate"] for r in results})
    }


def trained_figure(results: list[dict]) -> Figure:
    """Greedy accuracy along training in every precision, a panel for each rate: mean over seeds,
    and their range.
    """
    groups = by_rate(results)
    figure = style.new_figure(2.4)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (rate, runs) in zip(panels, groups.items(), strict=True):
        for place, precision in enumerate(PRECISIONS):
            steps = np.array([int(step) for step in runs[0]["accuracy"]])
            values = np.array(
                [[r["accuracy"][str(step)][precision]["greedy"] for step in steps] for r in runs]
            )
            shift = (place - 1) * steps.max() / 80  # or the three would hide each other
            mean = values.mean(axis=0)
            axes.errorbar(
                steps + shift,
                mean,
                [mean - values.min(axis=0), values.max(axis=0) - mean],
                marker=style.MARKERS[place],
                color=(style.RUN, style.SECOND, style.THIRD)[place],
                capsize=2,
                label=shown_precision(precision),
            )
        axes.set_title(f"learning rate {rate:.0e}".replace("e-0", "e-"))
        axes.set_xlabel("optimizer step")
    panels[0].set_ylabel("greedy accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def shown_precision(precision: str) -> str:
    """As it is written in legends."""
    return precision if precision == "float32" else f"bfloat16, {precision}"


def predicted_figure(results: list[dict]) -> Figure:
    """Greedy accuracy of the predicted checkpoints against that of the step they start from and of
    the trained one.
    """
    groups, last = by_rate(results), str(results[0]["steps"])
    figure = style.new_figure(3.4)
    keys = sorted({(p["until"], p["target"]) for p in results[0]["predictions"]})
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (rate, runs) in zip(panels, groups.items(), strict=True):
        for row, (until, target) in enumerate(keys):
            near = str(
                min((int(step) for step in runs[0]["accuracy"]), key=lambda step: abs(step - until))
            )
            marks = [("hold", near, row - 0.42)] + [("trained", last, row - 0.42)] * (
                str(target) == last
            )
            for name, step, height in marks:
                value = np.mean([r["accuracy"][step]["float32"]["greedy"] for r in runs])
                line = {
                    "color": "black",
                    "linewidth": 1.2,
                    "linestyle": "-" if name == "trained" else (0, (2, 2)),
                }
                axes.plot(
                    [value, value],
                    [height, height + 0.84],
                    label=name if row == 0 else None,
                    **line,
                )
            for place, (method, source) in enumerate(
                (m, s) for m in METHODS for s in ("float32", "bfloat16")
            ):
                wanted = (source, until, target, method)
                values = np.array(
                    [
                        p["float32"]["greedy"]
                        for r in runs
                        for p in r["predictions"]
                        if (p["source"], p["until"], p["target"], p["method"]) == wanted
                    ]
                )
                mean = values.mean()
                axes.errorbar(
                    mean,
                    row + 0.13 * (place - 2.5),
                    xerr=[[mean - values.min()], [values.max() - mean]],
                    linestyle="",
                    marker=style.MARKERS[METHODS.index(method)],
                    color=style.METHODS[method],
                    capsize=2,
                    markerfacecolor="white" if source == "bfloat16" else style.METHODS[method],
                    label=f"{method}, from {source}" if row == 0 else None,
                )
        axes.set_yticks(
            range(len(keys)), [f"{until} \N{RIGHTWARDS ARROW} {target}" for until, target in keys]
        )
        axes.set_xlim(-0.03, 1)
        axes.set_title(f"learning rate {rate:.0e}".replace("e-0", "e-"))
        axes.set_xlabel("greedy accuracy")
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--model", type=Path, default=FOLDER, help="default: the small embedded model"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for rate in options.rates:
        for seed in options.seeds:
            folder = options.out / f"seed-{seed}-rate-{rate:g}"
            path = folder / "result.json"
            if not path.exists():
                result = study(folder, options.model, seed, rate, options.steps)
                path.write_text(json.dumps(result, indent=1) + "\n")
            results.append(json.loads(path.read_text()))
            print(
                f"{folder.name}: accuracy {results[-1]['accuracy'][str(options.steps)]}", flush=True
            )
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(tables(results))
    with style.styled():
        style.save(trained_figure(results), options.out, "trained")
        style.save(predicted_figure(results), options.out, "predicted")


if __name__ == "__main__":
    main()
