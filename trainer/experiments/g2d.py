"""G2D (arXiv 2605.21266): a few steps of GRPO, then one pass of DPO on preference pairs from their
rollouts.

    relexkit g2d RUN --steps K... -o OUT [--option value ...]

Every ``K`` takes the recorded weights and the logged rollouts of one training run, so a sweep over
``K`` trains nothing online again. ``OUT/step-K/`` gets ``final/`` (the model), ``pairs.jsonl``
(TRL's preference format), ``metrics.jsonl`` (of DPO) and
``summary.json``: the number of pairs and what else governs the result, and accuracies before and
after.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexkit import RelexkitError
from relexkit.extension import say, temporary_folder

if TYPE_CHECKING:
    import pyarrow

    from relexkit.trainer.config import G2DConfig, GRPOConfig
    from relexkit.trainer.evaluation.evaluate import Evaluation
    from relexkit.trainer.tasks import Task

_LARGEST_DIFFERENCE = 0.1
"""Mean difference, in nats a token, by which a log-probability may differ that is computed again;
recorded weights are rounded.
"""


def g2d(
    run_folder: str | Path,
    steps: Sequence[int],
    out: Path,
    config: G2DConfig,
    *,
    rollouts: Path | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """G2D from each of ``steps`` of a training run; the summaries, in their order.

    Memory: three times the model in float32 beside its activations (gradients and moments), loaded
    once.

    Raises:
        RelexkitError: no such run or step, rollouts of another tokenizer or run, no pairs, or
            ``out`` has other settings.
    """
    source = _Run(Path(run_folder), config, rollouts, trust_remote_code)
    source.check(steps)
    summaries = []
    for step in steps:
        settings = dataclasses.asdict(config) | {
            "run": str(run_folder),
            "rollouts": str(rollouts or ""),
        }
        folder = out / f"step-{step}"
        summary = _finished(folder, settings)
        if summary is None:
            say(f"step {step}: pairs, DPO, evaluation")
            with temporary_folder(folder) as temporary:
                summary = _train_from(source, step, temporary, config) | {"settings": settings}
                (temporary / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        summaries.append(summary)
    return summaries


class _Run:
    """A training run, its one loaded model, and the rollouts."""

    def __init__(
        self, folder: Path, config: G2DConfig, rollouts: Path | None, trust_remote_code: bool
    ):
        from relexkit import TrajectoryStore
        from relexkit.trainer.config import load_config
        from relexkit.trainer.loop.rollout_log import read_rollouts
        from relexkit.trainer.policy.loading import Loading
        from relexkit.trainer.policy.setup import choose_device
        from relexkit.trainer.policy.stored_model import StoredModel
        from relexkit.trainer.tasks import load_task

        if not (folder / "config.yaml").is_file():
            raise RelexkitError(
                f"{folder}: is not the folder of a training run; expected config.yaml, run.zarr and"
                " rollouts/"
            )
        self.trained: GRPOConfig = load_config(folder / "config.yaml")
        self.store = TrajectoryStore(folder / "run.zarr")
        self.task: Task = load_task(self.trained.task)
        device = choose_device(config)
        self.autocast = config.bf16 if config.bf16 is not None else device.type == "cuda"
        loading = Loading(
            device=config.device,
            disable_dropout=config.disable_dropout,
            trust_remote_code=trust_remote_code,
        )
        self.stored = StoredModel(self.store, loading)
        self.rollouts: pyarrow.Table = read_rollouts(rollouts or folder / "rollouts")
        self._where = rollouts or folder / "rollouts"
        self.config = config

    def put(self, which: str, step: int) -> Any:
        """The model with the weights of the base, or (``warm``) of the step."""
        self.stored.put_step(0 if which == "base" else step)
        return self.stored.model

    def pad(self) -> int:
        """The padding token."""
        from relexkit.trainer.policy.sampling import pad_token

        return pad_token(self.stored.tokenizer)

    def check(self, steps: Sequence[int]) -> None:
        """Refuse steps that are not recorded, and rollouts that this run's tokenizer or policy did
        not make.
        """
        from relexkit.trainer.policy.sampling import encode_prompt

        for step in steps:
            self.store.row_of(step)
        known = {0, *self.store.steps.tolist()}
        firsts = [
            step for step in self.rollouts.column("step").unique().to_pylist() if step - 1 in known
        ]
        if not firsts:
            raise RelexkitError(
                f"{self._where}: no rollouts of a recorded policy; expected those of the run"
                f" {self.store.path}"
            )
        rows = (
            self.rollouts.filter(_equal(self.rollouts, "step", firsts[0])).slice(0, 8).to_pylist()
        )
        tokenizer = self.stored.tokenizer
        for row in rows:
            text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
            if encode_prompt(tokenizer, row["prompt"]) != row["prompt_ids"] or text != row["text"]:
                raise RelexkitError(
                    f"{self._where}: was written with another tokenizer than that of"
                    f" {self.store.path}; expected its own log"
                )
        self._check_policy(rows, firsts[0])

    def _check_policy(self, rows: list[dict[str, Any]], first: int) -> None:
        import torch

        from relexkit.trainer.policy.log_probabilities import sampled_logprobs
        from relexkit.trainer.policy.sampling import Completion

        completions = [
            Completion(row["prompt_ids"], row["completion_ids"], row["text"], row["truncated"])
            for row in rows
        ]
        model = self.put("warm" if first > 1 else "base", first - 1)
        shared = (
            self.trained.temperature,
            self.config.micro_batch_tokens,
            self.pad(),
            self.autocast,
        )
        again = torch.cat(sampled_logprobs(model, completions, *shared)).cpu()
        logged = torch.tensor([value for row in rows for value in row["logprobs"]])
        difference = float((again - logged).abs().mean()) if len(logged) else 0.0
        if difference > _LARGEST_DIFFERENCE:
            raise RelexkitError(
                f"{self._where}: was not sampled by the run of {self.store.path}: its"
                f" log-probabilities differ by {difference:.2g} nats a token from those of step"
                f" {first - 1}; expected the rollouts of this run"
            )

    def until(self, step: int) -> pyarrow.Table:
        """The rollouts that pairs are made of: of the steps up to ``step``, or fresh ones to their
        prompts.
        """
        import pyarrow.compute as pc

        logged = self.rollouts.filter(pc.less_equal(self.rollouts.column("step"), step))
        return logged if self.config.pairs == "training" else self._fresh(step, logged)

    def _fresh(self, step: int, logged: pyarrow.Table) -> pyarrow.Table:
        """A group of rollouts of every prompt that was trained on, by the policy of ``step``."""
        from relexkit.trainer.credit.token_states import TokenStates
        from relexkit.trainer.loop.rollout_log import Rollout, as_table
        from relexkit.trainer.policy.sampling import Sampling, generate
        from relexkit.trainer.tasks import prompt_text, score_all

        seen = set(logged.column("problem").to_pylist())
        problems = [problem for problem in self.task.problems("train") if problem.key in seen]
        rows = [
            (problem, sample)
            for problem in problems
            for sample in range(self.trained.num_generations)
        ]
        sampling = Sampling(
            max_completion_length=self.trained.max_completion_length,
            temperature=self.trained.temperature,
            top_k=self.trained.top_k,
            top_p=self.trained.top_p,
            seed=self.config.seed,
            batch_size=self.config.generation_rows,
        )
        prompts = [prompt_text(problem, self.stored.tokenizer) for problem, _ in rows]
        model = self.put("warm", step)
        states = TokenStates(model, self.trained.temperature, keep_states=False)
        keys = [("g2d", step, problem.key, sample) for problem, sample in rows]
        completions = generate(
            model, self.stored.tokenizer, prompts, keys, sampling, watcher=states
        )
        scores = score_all(self.task, [p for p, _ in rows], [c.text for c in completions])
        return as_table(
            [
                Rollout(
                    step=step,
                    problem=problem.key,
                    prompt=prompt,
                    text=c.text,
                    prompt_ids=c.prompt_ids,
                    completion_ids=c.completion_ids,
                    logprobs=logp.tolist(),
                    truncated=c.truncated,
                    reward=score.reward,
                    right=score.right,
                    advantage=0.0,
                )
                for (problem, _), prompt, c, logp, score in zip(
                    rows, prompts, completions, states.logp, scores, strict=True
                )
            ]
        )

    def evaluate(self) -> Evaluation:
        """Greedy accuracy of the model as it is."""
        from relexkit.trainer.evaluation.evaluate import evaluate
        from relexkit.trainer.evaluation.settings import EvaluationSettings

        return evaluate(
            self.stored.model,
            self.stored.tokenizer,
            self.task,
            EvaluationSettings(
                num_problems=self.config.eval_num_problems,
                max_completion_length=self.trained.max_completion_length,
                seed=self.trained.seed,
                batch_size=self.config.generation_rows,
            ),
        )


def _train_from(source: _Run, step: int, folder: Path, config: G2DConfig) -> dict[str, Any]:
    """Everything for one ``K``, written into ``folder``; its summary."""
    from relexkit.extension import Processes
    from relexkit.trainer.experiments.dpo import reference_margins, train_dpo
    from relexkit.trainer.experiments.preferences import informativeness, make_pairs, write_pairs
    from relexkit.trainer.loop.folder import save_model

    rollouts = source.until(step)
    pairs = make_pairs(
        rollouts,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        max_length=config.max_length,
        difficulty=(config.min_difficulty, config.max_difficulty),
        seed=config.seed,
    )
    write_pairs(folder / "pairs.jsonl", pairs)
    reference = reference_margins(
        source.put(config.reference, step), pairs, config, source.pad(), source.autocast
    )
    model = source.put(config.start, step)
    before = source.evaluate()
    number = 0
    with open(folder / "metrics.jsonl", "w") as file:
        updates = train_dpo(model, pairs, reference, config, source.pad(), source.autocast)
        for number, entry in enumerate(updates, 1):
            print(json.dumps({"step": number, **entry}), file=file, flush=True)
    after = source.evaluate()
    save_model(folder / "final", model, source.stored.tokenizer, Processes())
    difference = after.minus(before)
    return {
        "step": step,
        "informativeness": dataclasses.asdict(informativeness(rollouts, pairs)),
        "dpo_steps": number,
        "before": before.summary(),
        "after": after.summary(),
        "difference": {"accuracy": difference.difference, "interval": list(difference.interval)},
    }


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished ``K`` with the same settings, or None.

    Raises:
        RelexkitError: the folder holds something else.
    """
    if not folder.exists():
        return None
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        summary = {}
    if summary.get("settings") != settings:
        raise RelexkitError(
            f"{folder}: exists and was not made with these settings; choose another --out"
        )
    return summary


def _equal(table: pyarrow.Table, column: str, value: int) -> Any:
    import pyarrow.compute as pc

    return pc.equal(table.column(column), value)
