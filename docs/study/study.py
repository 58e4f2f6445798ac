"""When does extrapolation pay? The runs and numbers of docs/study.md, on the small embedded model,
and a few on SmolLM2.

    python docs/study/study.py OUT [--only PATTERN ...] [--seeds S ...] [--until-priority P]
    python docs/study/study.py OUT --list

Does the jobs of arms.py, the most decisive first: trains an arm, asks a finished run what its
future looked like from some step, runs G2D from it, or exports it in bfloat16. Every answer is one
JSON file in docs/study/results; what is there is not done again, and a run that was interrupted
goes on from its last saved state. Runs stay in OUT until no job needs them. All models of a
task answer the same held-out problems, greedily and once sampled, with the same noise.

    python docs/study/report.py

makes the tables and figures from whatever results there are.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, GROUP, SORTING, Arm, Job, Subject, jobs
from kept_gram import keep_gram

from relexkit import (
    Prediction,
    RelexkitError,
    TrajectoryStore,
    checkout,
    gram,
    import_checkpoints,
    predict_weights,
)
from relexkit.assess.backtest import backtest
from relexkit.gram_matrix.jumps import attempts, jumps
from relexkit.materialize import round_checkpoint
from relexkit.trainer.config import G2DConfig, GRPOConfig
from relexkit.trainer.evaluation.evaluate import RIGHT, evaluate
from relexkit.trainer.evaluation.settings import EvaluationSettings
from relexkit.trainer.experiments.g2d import g2d
from relexkit.trainer.loop.run_log import read_log
from relexkit.trainer.loop.train import train
from relexkit.trainer.policy.loading import Loading
from relexkit.trainer.policy.small_model import FOLDER
from relexkit.trainer.policy.stored_model import StoredModel
from relexkit.trainer.tasks import load_task

RESULTS = Path(__file__).parent / "results"
LENGTH = 10

Result = dict[str, Any]
Question = Callable[[Path, Job, "Draft"], None]


class Draft(Result):
    """An answer in the making, kept at ``place`` so that an interruption loses little of it."""

    def __init__(self, place: Path, known: Result):
        super().__init__(known)
        self.place = place

    def keep(self) -> None:
        """Write what there is."""
        write_json(self.place, self)


def write_json(place: Path, document: Result) -> None:
    """A JSON file, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(".partial")
    temporary.write_text(json.dumps(document, separators=(",", ":")).replace("},{", "},\n{") + "\n")
    os.replace(temporary, place)


# -- a run and its models --------------------------------------------------------------------------


def run_folder(out: Path, job: Job) -> Path:
    """Where the run of a job is."""
    return out / "runs" / job.arm / f"seed-{job.seed}"


def make_run(folder: Path, arm: Arm, seed: int, steps: int) -> None:
    """Train an arm to ``steps``, from where it stands."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    train(
        GRPOConfig(
            model=str(arm.subject.model(folder.parents[2])),
            output=str(folder),
            seed=seed,
            max_steps=steps,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            generation_rows=arm.subject.generation_rows,
            micro_batch_tokens=arm.subject.micro_batch_tokens,
            device="cpu",
            save_steps=arm.subject.every,
            **arm.settings,
        )
    )


class Models:
    """The models of a store, and what they answer."""

    def __init__(self, store: TrajectoryStore, subject: Subject = SORTING):
        self.store, self._stored = store, StoredModel(store, Loading())
        self._task, self._problems = load_task(subject.task), subject.problems

    def answers(self, weights: np.ndarray) -> Result:
        """Accuracies of ``theta_0 + M^T a``, and which problems were right, in hexadecimal."""
        self._stored.put(weights)
        return self._asked()

    def recorded(self, step: int) -> Result:
        """Answers of a recorded step; 0 is the base."""
        self._stored.put_step(step)
        return self._asked()

    def _asked(self) -> Result:
        found = evaluate(
            self._stored.model,
            self._stored.tokenizer,
            self._task,
            EvaluationSettings(
                num_problems=self._problems,
                samples=1,
                max_completion_length=LENGTH,
                batch_size=self._problems,
            ),
        )
        return {
            "greedy": found.accuracy,
            "sampled": found.sampled_accuracy,
            "greedy_right": _bits(found.greedy_N >= RIGHT),
            "sampled_right": _bits(found.sampled_NS[:, 0] >= RIGHT),
        }


def _bits(right_N: np.ndarray) -> str:
    return np.packbits(right_N).tobytes().hex()


# -- the questions ---------------------------------------------------------------------------------


def trained(folder: Path, job: Job, result: Draft) -> None:
    """Accuracy along a run, its rewards, and what it looks like from its own record."""
    make_run(folder, ARMS[job.arm], job.seed, job.steps)
    store = TrajectoryStore(folder / "run.zarr")
    log = read_log(folder)
    models, landed = Models(store, ARMS[job.arm].subject), set(jumps(store).tolist())
    known = {entry["step"]: entry for entry in result.get("curve", [])}
    curve = []
    for step in _marks(store.steps, landed, ARMS[job.arm].subject.every):
        trained_steps = int(np.sum(store.steps <= step)) - len([s for s in landed if s <= step])
        place = {
            "step": step,
            "trained": trained_steps,
            "tests": _tests(store, step),
            "jumped": step in landed,
        }
        curve.append(known.get(step) or place | models.recorded(step))
    result |= {
        "steps": int(store.steps[-1]),
        "rollouts_per_step": GROUP * ARMS[job.arm].prompts,
        "curve": curve,
        "reward": [entry["reward"] for entry in log if "reward" in entry],
        "entropy": [entry["entropy"] for entry in log if "entropy" in entry],
    }


def _tests(store: TrajectoryStore, step: int) -> int:
    """How many generations the tests of jumps have cost by then: one each."""
    return sum("p_hurt" in attempt.numbers for attempt in attempts(store) if attempt.step < step)


def _marks(steps: np.ndarray, landed: set[int], every: int) -> list[int]:
    """The base, every so many steps, and the steps before and after each jump."""
    before = {int(steps[row - 1]) for row in np.flatnonzero(np.isin(steps, list(landed)))}
    regular = {int(step) for step in steps if step % every == 0}
    return sorted({0, int(steps[-1])} | regular | before | landed)


def predicted(folder: Path, job: Job, result: Draft) -> None:
    """What steps up to ``T_cut`` predict for later ones, on the task and in the weights."""
    store = TrajectoryStore(folder / "run.zarr")
    subject = ARMS[job.arm].subject
    matrices, models = gram(store), Models(store, subject)
    seen, cut = matrices.until(job.steps), job.steps
    asked = [("hold", cut), ("average", cut)]
    asked += [
        (method, round(ratio * cut)) for ratio in subject.ratios for method in subject.methods
    ]
    later = {round(ratio * cut) for ratio in subject.ratios}
    seen_steps = int(np.sum(store.steps <= cut))
    grid = backtest(matrices, methods=subject.methods, prefixes=[seen_steps]).grid
    skill = {(row.method, row.target): row.skill for row in grid}
    done = {(row["method"], row["target"]): row for row in result.get("predictions", [])}
    result |= {"until": cut, "predictions": list(done.values())}
    for method, target in asked:
        if (method, target) in done:
            continue
        weights = predict_weights(seen, [target], Prediction(method=method))[0]
        result["predictions"].append(
            {
                "method": method,
                "target": target,
                "skill": skill.get((method, target)),
                **models.answers(weights),
            }
        )
        result.keep()
    between = [
        s for s in sorted(later) if s <= store.steps[-1] and s % subject.every
    ]  # not on the curve
    result["trained"] = {str(step): models.recorded(step) for step in between}


def preferred(folder: Path, job: Job, result: Draft) -> None:
    """G2D at several K, from the rollouts of the training and from fresh ones."""
    last = int(TrajectoryStore(folder / "run.zarr").steps[-1])
    place = folder.with_name(f"seed-{job.seed}-g2d")
    subject = ARMS[job.arm].subject
    steps, options = subject.preferences
    result["rows"] = []
    for pairs in ("training", "fresh"):
        config = G2DConfig(
            pairs=pairs,
            eval_num_problems=subject.problems,
            generation_rows=subject.generation_rows,
            device="cpu",
            seed=job.seed,
            **options,
        )
        for found in g2d(folder, [k for k in steps if k <= last], place / pairs, config):
            result["rows"].append(
                {
                    "pairs": pairs,
                    "k": found["step"],
                    "before": found["before"]["greedy"]["accuracy"],
                    "after": found["after"]["greedy"]["accuracy"],
                    "informativeness": found["informativeness"],
                }
            )
    shutil.rmtree(place)


def rounded(folder: Path, job: Job, result: Draft) -> None:
    """The run as bfloat16 exports would have it: recorded steps and RELEX from them, rounded to
    nearest and stochastically.
    """
    store = TrajectoryStore(folder / "run.zarr")
    steps = [int(step) for step in store.steps if step % 5 == 0]
    result["float32"] = {}
    exact = Models(store)
    for step in (50, 100):
        result["float32"][str(step)] = exact.recorded(step)
    for rounding in ("nearest", "stochastic"):
        place = folder.with_name(f"seed-{job.seed}-{rounding}")
        for step in steps:
            export = place / "checkpoints" / f"checkpoint-{step}"
            if not export.exists():
                exact_folder = checkout(store, step, place / "exact")
                round_checkpoint(exact_folder, export, rounding=rounding, seed=job.seed)
                shutil.rmtree(exact_folder)
        exported = import_checkpoints(place / "checkpoints", place / "run.zarr", base=FOLDER).store
        models, matrices = Models(exported), gram(exported)
        found: Result = {"recorded": {}, "predictions": []}
        for cut in (50, 100):
            found["recorded"][str(cut)] = models.recorded(cut)
            for method, ratio in (
                ("relex", 1.5),
                ("relex", 2.0),
                ("two-point", 1.5),
                ("two-point", 2.0),
            ):
                target = round(ratio * cut)
                weights = predict_weights(matrices.until(cut), [target], Prediction(method=method))[
                    0
                ]
                found["predictions"].append(
                    {"method": method, "until": cut, "target": target, **models.answers(weights)}
                )
        result[rounding] = found
        shutil.rmtree(place)


QUESTIONS: dict[str, Question] = {
    "train": trained,
    "predict": predicted,
    "g2d": preferred,
    "precision": rounded,
}


# -- doing what is missing -------------------------------------------------------------------------


def is_done(job: Job, results: Path) -> bool:
    """Whether the answer is there, of as many steps as the job wants."""
    place = results / job.result
    if not place.exists():
        return False
    return job.question != "train" or json.loads(place.read_text())["steps"] >= job.steps


def do(job: Job, out: Path, results: Path) -> None:
    """Answer one job, and leave its JSON file among the results."""
    place = results / job.result
    partial = out / "partial" / job.result
    known = next((p for p in (partial, place) if p.exists()), None)
    draft = Draft(partial, {} if known is None else json.loads(known.read_text()))
    draft |= {"arm": job.arm, "seed": job.seed}
    folder, began = run_folder(out, job), time.process_time()
    if job.question != "train":  # another machine may have trained it
        make_run(folder, ARMS[job.arm], job.seed, max(job.steps, _trained_steps(folder)))
    QUESTIONS[job.question](folder, job, draft)
    if job.question == "train" and not ARMS[job.arm].jumps:
        place.parent.mkdir(parents=True, exist_ok=True)
        keep_gram(
            TrajectoryStore(folder / "run.zarr"), place.with_name(f"seed-{job.seed}-gram.npz")
        )
    draft["cpu_seconds"] = draft.get("cpu_seconds", 0.0) + time.process_time() - began
    write_json(place, draft)
    partial.unlink(missing_ok=True)


def _trained_steps(folder: Path) -> int:
    store = folder / "run.zarr"
    return int(TrajectoryStore(store).steps[-1]) if store.exists() else 150


def clear(out: Path, results: Path) -> None:
    """Remove the runs of which no job has anything left to ask."""
    wanted = {run_folder(out, job) for job in jobs() if not is_done(job, results)}
    for folder in (out / "runs").glob("*/seed-*"):
        if folder.name.count("-") == 1 and folder not in wanted:
            shutil.rmtree(folder)


def chosen(arguments: argparse.Namespace) -> Iterable[Job]:
    """The jobs that were asked for, in their order."""
    for job in jobs():
        if (
            job.priority <= arguments.until_priority
            and (arguments.seeds is None or job.seed in arguments.seeds)
            and any(fnmatch.fnmatch(job.arm, pattern) for pattern in arguments.only)
        ):
            yield job


def main() -> int:
    """Do what is missing; the number of jobs that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of arms")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--until-priority", type=int, default=99, metavar="P")
    parser.add_argument("--list", action="store_true", help="what there is to do, and leave")
    arguments = parser.parse_args()
    failed = 0
    for job in chosen(arguments):
        done = is_done(job, arguments.results)
        if arguments.list:
            print(job.priority, job.result, job.question, job.steps, "done" if done else "")
        elif not done:
            print(f"{job.result}: {job.question} {job.steps}", flush=True)
            try:
                do(job, arguments.out, arguments.results)
            except RelexkitError as error:
                failed += 1
                print(f"{job.result}: {error}", flush=True)
            clear(arguments.out, arguments.results)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
