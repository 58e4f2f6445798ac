"""What DelTA, LamPO, G2D, re-grounding and extrapolation do on the small embedded model: the runs
and numbers of docs/study.md.

    python docs/study/study.py OUT [--seeds 0 1 2 3 4 5] [--steps 60]

Every seed trains the same model by GRPO, with DelTA, with LamPO, with both, and with re-grounding.
From the GRPO run's store and rollouts come G2D at several K and the extrapolations. All models
answer the same held-out problems. What is finished is kept, so the command goes on where it
stopped. Leaves ``OUT/results.json``, and docs/study.md with its figures (report.py).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from report import write_report

from analysis.claims import ABLATION
from relexkit import Prediction, TrajectoryStore, gram, predict_weights, spectrum
from relexkit.assess.advice import advise
from relexkit.assess.backtest import backtest
from trainer.config import G2DConfig, GRPOConfig
from trainer.evaluation.evaluate import Evaluation, evaluate
from trainer.experiments.g2d import g2d
from trainer.loop.run_log import read_log
from trainer.loop.train import train
from trainer.policy.small_model import FOLDER
from trainer.policy.stored_model import StoredModel, recorded_weights
from trainer.tasks import load_task

TASK = {"name": "arithmetic", "family": "sorting"}
PROBLEMS, LENGTH = 512, 10
MEASURED = {
    "token_shares": True,
    "gradient_noise_parts": 4,
    "eval_steps": 10,
    "eval_num_problems": PROBLEMS,
}
ARMS = {
    "GRPO": {},
    "DelTA": {"token_weighting": "delta"},
    "LamPO": {"advantage": "lampo"},
    "LamPO + DelTA": {"advantage": "lampo", "token_weighting": "delta"},
    "re-grounding, RELEX": {"regrounding": {"train_steps": 10, "jump_steps": 10}},
    "re-grounding, model": {
        "regrounding": {"train_steps": 10, "jump_steps": 10, "method": "model"}
    },
}
G2D_STEPS = (5, 10, 20, 40, 60)
CUTS = (10, 20, 30)
METHODS = ("relex", "model", "two-point", "hold")


def make_run(folder: Path, arm: str, seed: int, steps: int) -> None:
    """Train one arm; one that is finished stays."""
    options = MEASURED | ARMS[arm]
    train(
        GRPOConfig(
            model=str(FOLDER),
            task=TASK,
            output=str(folder),
            seed=seed,
            learning_rate=1e-4,
            max_steps=steps,
            generation_batch_size=128,
            num_generations=8,
            max_completion_length=LENGTH,
            generation_rows=128,
            micro_batch_tokens=4096,
            device="cpu",
            save_steps=25,
            **options,
        )
    )


def asked(model: StoredModel, weights: np.ndarray) -> Evaluation:
    """Greedy and sampled answers of ``theta_0 + M^T a``."""
    model.put(weights)
    return evaluate(
        model.model,
        model.tokenizer,
        load_task(TASK),
        num_problems=PROBLEMS,
        samples=1,
        max_completion_length=LENGTH,
        batch_size=256,
    )


def scores(found: Evaluation) -> dict[str, float]:
    """Both accuracies."""
    return {"greedy": found.accuracy, "sampled": found.sampled_accuracy}


def trained(folder: Path) -> dict:
    """One arm: its log, and the accuracy of its last step."""
    store = TrajectoryStore(folder / "run.zarr")
    log = read_log(folder)
    rollouts = 128
    lengths = [entry.get("completions/mean_length", 0.0) for entry in log]
    noise = [
        (e["gradient_noise/trace"], e["gradient_noise/signal"])
        for e in log
        if "gradient_noise/trace" in e
    ]
    names = [name for name in log[0] if name.startswith("token_share")]
    curve = [
        {
            "step": entry["step"],
            "accuracy": entry["eval/accuracy"],
            "tokens": rollouts * float(np.sum(lengths[: row + 1])),
            "seconds": float(np.sum([e.get("step_seconds", 0.0) for e in log[: row + 1]])),
        }
        for row, entry in enumerate(log)
        if "eval/accuracy" in entry
    ]
    return {
        "final": scores(asked(StoredModel(store), recorded_weights(store, int(store.steps[-1])))),
        "trained_steps": len(lengths) - lengths.count(0.0),
        "tokens": rollouts * float(np.sum(lengths)),
        "seconds_per_step": float(
            np.median([e["step_seconds"] for e in log if "step_seconds" in e])
        ),
        "curve": curve,
        "reward": [entry.get("reward") for entry in log],
        "noise": {
            "trace": float(np.mean([t for t, _ in noise])),
            "signal": float(np.mean([s for _, s in noise])),
        },
        "shares": {
            name: float(np.nanmean([e[name] for e in log if e.get(name) is not None]))
            for name in names
        },
    }


def extrapolated(folder: Path, steps: int) -> dict:
    """What steps up to ``T_cut`` predict for the end of training, on the task, and the geometry of
    the run.
    """
    store = TrajectoryStore(folder / "run.zarr")
    matrices, model = gram(store), StoredModel(store)
    found: dict = {
        "base": scores(asked(model, recorded_weights(store, 0))),
        "observed": {},
        "predictions": [],
        "ablation": {},
    }
    for until in (cut for cut in CUTS if cut < steps):
        observed = asked(model, recorded_weights(store, until))
        found["observed"][str(until)] = scores(observed)
        for method in METHODS:
            weights = predict_weights(matrices.until(until), [steps], Prediction(method=method))[0]
            answers = asked(model, weights)
            entry = {
                "until": until,
                "method": method,
                **scores(answers),
                "gain": answers.minus(observed).difference,
            }
            found["predictions"].append(entry)
    whole = spectrum(matrices, scope="global").whole
    fit = advise(matrices, store.metrics()).fit
    found["geometry"] = {
        name: {"observed": float(whole.observed[name]), "walk": float(whole.expected[name])}
        for name in ("first", "first_two")
    } | {
        "drift_to_noise": (
            None if fit is None else [fit.drift_to_noise, *fit.drift_to_noise_interval]
        )
    }
    for name, options in ABLATION.items():
        grid = backtest(matrices, methods=["relex"], prefixes=[steps // 2], options=options).grid
        found["ablation"][name] = next(
            row.relative_error for row in grid if row.method == "relex" and row.target == steps
        )
    return found


def preferred(folder: Path, out: Path, steps: int, seed: int) -> list[dict]:
    """G2D at several K from the rollouts of the training, and from fresh ones."""
    rows = []
    for pairs in ("training", "fresh"):
        config = G2DConfig(
            pairs=pairs,
            learning_rate=3e-5,
            beta=0.5,
            eval_num_problems=PROBLEMS,
            generation_rows=256,
            device="cpu",
            seed=seed,
        )
        began = time.monotonic()
        found = g2d(folder, [k for k in G2D_STEPS if k <= steps], out / pairs, config)
        for summary in found:
            rows.append(
                {
                    "pairs": pairs,
                    "k": summary["step"],
                    "before": summary["before"]["greedy"]["accuracy"],
                    "after": summary["after"]["greedy"]["accuracy"],
                    "informativeness": summary["informativeness"],
                    "seconds": (time.monotonic() - began) / len(found),
                }
            )
    return rows


def study(folder: Path, seed: int, steps: int) -> dict:
    """Everything of one seed."""
    found: dict = {"seed": seed, "steps": steps, "arms": {}}
    for arm in ARMS:
        place = folder / arm.replace(" ", "").replace(",", "-")
        make_run(place, arm, seed, steps)
        found["arms"][arm] = trained(place)
    found["extrapolated"] = extrapolated(folder / "GRPO", steps)
    found["g2d"] = preferred(folder / "GRPO", folder / "g2d", steps, seed)
    return found


def main() -> None:
    """Run what is missing, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in arguments.seeds:
        kept = arguments.out / f"seed-{seed}.json"
        if not kept.exists():
            kept.write_text(
                json.dumps(study(arguments.out / f"seed-{seed}", seed, arguments.steps))
            )
        results.append(json.loads(kept.read_text()))
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    write_report(results, Path(__file__).parent)


if __name__ == "__main__":
    main()
