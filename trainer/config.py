"""Configuration of a training run: one flat dataclass, under TRL's names where TRL has the option;
YAML and command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from relexkit import RelexkitError
from relexkit.extension import FixedJumps, JumpRule, Jumps

_STRICT = ConfigDict(extra="forbid", strict=True)
_FEWEST_PROMPTS = 4  # of a generation, in whose rewards a jump is tested


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GRPOConfig:
    """Everything a run depends on; the resolved form is kept beside the run, and with it the run is
    reproducible.

    Attributes:
        model: folder of the model that training starts from, loaded in ``precision`` whatever its
            dtype.
        task: name of a task, or a mapping with its ``name`` and options (docs/tasks.md).
        output: folder of the run.
        seed: of the order of the prompts, the rollouts and dropout.
        max_steps: optimizer steps.
        generation_batch_size: rollouts of one generation, over all processes.
        num_generations: rollouts of one prompt, a group.
        steps_per_generation: optimizer steps into which a generation is split, each on its own
            prompts.
        num_iterations: times that a generation is used.
        max_completion_length: tokens of a completion, the end-of-sequence token included.
        temperature, top_p, top_k: of the sampling; log-probabilities are those at ``temperature``,
            without the cuts.
        loss_type: how token losses become one number, see ``trainer.credit.loss``.
        beta: weight of the KL divergence to the starting model; 0 loads no reference.
        use_bias_correction_kl: multiply the divergence by the importance ratio.
        epsilon, epsilon_high: the importance ratio is clipped to [1 - epsilon, 1 + epsilon_high]
            (epsilon if None).
        entropy_coef: subtract so many times the mean entropy of the step's tokens from the loss,
            for every ``loss_type``; 0 does not.
        delta: cap of the ratio where the advantage is negative (two-sided clipping); None for none.
        scale_rewards: divide advantages by the standard deviation of the ``group``, of the
            ``batch``, or not (``none``).
        importance_sampling_level: ratio of each ``token``, or of the whole ``sequence`` (GSPO).
        mask_truncated_completions: completions without an end do not count.
        advantage: ``group``, or ``lampo``, pairwise (docs/credit.md); ``scale_rewards`` belongs to
            the former.
        lampo_temperature, lampo_length_normalized: how sharply, and by which log-probabilities,
            LamPO weights pairs.
        rouge_weight: add so many times ROUGE-L against the task's reference solution to the reward.
        token_weighting: ``delta`` multiplies the surrogate of each token by a coefficient of DelTA;
            ``none``.
        delta_iterations, delta_min, delta_max: refinements of DelTA's centroids, and the range of
            its coefficients.
        token_shares: log which classes of tokens carry the update, and keep the numbers with the
            rollouts.
        gradient_noise_parts: log the noise and the signal of the gradient from so many parts of
            each step; 0 does not.
        regrounding: ``{train_steps: m, jump_steps: n, method: relex}``: after ``m`` steps of
            training jump to the weights that are predicted for ``n`` steps later, and again; None
            never.
        jumps: ``adaptive``, or ``{every: 25, methods: [drift, relex, two-point]}``: after so many
            steps of training ask the run's own record how far to jump, and let the rewards of the
            next rollouts decide whether the jump stays (docs/jumps.md); None never.
        disable_dropout: no dropout in the update, whatever the model's configuration says: the
            policy that is updated is the one that samples. With dropout the importance ratio
            compares it with the sampling policy, and is not 1 on the first step either.
        learning_rate, lr_scheduler_type, warmup_steps: names of the schedules are those of
            transformers.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay, max_grad_norm: AdamW and clipping.
        micro_batch_tokens: most tokens (padding included) in one forward and backward pass;
            gradients accumulate, exactly.
        generation_rows: rows of one batch of the generation, in each process.
        engine: what samples: None for the policy itself, or ``FILE.py:FUNCTION``, which makes a
            ``trainer.loop.engine.Engine`` (docs/training.md).
        vllm_importance_sampling_correction, vllm_importance_sampling_mode: of an engine's tokens,
            multiply the surrogate by the ratio of the policy's probabilities to the engine's, of
            the token or the sequence, cut to or masked outside of the range below.
        vllm_importance_sampling_clip_min, vllm_importance_sampling_clip_max: that range; None for
            no end.
        gradient_checkpointing: recompute activations in the backward pass.
        precision: of weights, gradients and optimizer: ``float32``, or bfloat16 alone, with updates
            rounded to nearest (``bfloat16_nearest``), stochastically (``bfloat16_stochastic``), or
            with their remainders kept (``bfloat16_compensated``, Kahan); docs/training.md.
        bf16: compute in bfloat16 (autocast) on float32 weights; None is on for a GPU and off for a
            CPU.
        device: ``auto``, ``cpu`` or ``cuda``.
        record_every: record the weights after the steps that are multiples of this; 0 records
            nothing.
        mantissa_bits: of the recorded float deltas.
        eval_steps, eval_num_problems: validation accuracy, greedy, every so many steps; 0 never.
        report_to: where metrics go beside ``metrics.jsonl``: ``tensorboard``, ``trackio``,
            ``wandb``, a list of them, ``all`` that are installed, or ``none``.
        save_steps: keep the full state for a resume every so many steps, and at the end; 0 only at
            the end.
    """

    model: str
    task: str | dict[str, Any]
    output: str
    seed: int = 0
    max_steps: int = 100
    generation_batch_size: int = 64
    num_generations: int = 8
    steps_per_generation: int = 1
    num_iterations: int = 1
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    beta: float = 0.0
    use_bias_correction_kl: bool = False
    epsilon: float = 0.2
    epsilon_high: float | None = None
    entropy_coef: float = 0.0
    delta: float | None = None
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    mask_truncated_completions: bool = False
    advantage: Literal["group", "lampo"] = "group"
    lampo_temperature: float = 1.0
    lampo_length_normalized: bool = True
    rouge_weight: float = 0.0
    token_weighting: Literal["none", "delta"] = "none"
    delta_iterations: int = 1
    delta_min: float = 0.8
    delta_max: float = 1.2
    token_shares: bool = False
    gradient_noise_parts: int = 0
    regrounding: dict[str, Any] | None = None
    jumps: Literal["adaptive"] | dict[str, Any] | None = None
    disable_dropout: bool = True
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 8192
    generation_rows: int = 64
    engine: str | None = None
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    gradient_checkpointing: bool = False
    precision: Literal[
        "float32", "bfloat16_nearest", "bfloat16_stochastic", "bfloat16_compensated"
    ] = "float32"
    bf16: bool | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    record_every: int = 1
    mantissa_bits: int = 10
    eval_steps: int = 0
    eval_num_problems: int = 200
    report_to: str | list[str] = "tensorboard"
    save_steps: int = 50

    def __post_init__(self) -> None:
        """Refuse what cannot work, by name."""
        positive = (
            "max_steps",
            "generation_batch_size",
            "num_generations",
            "steps_per_generation",
            "num_iterations",
            "max_completion_length",
            "micro_batch_tokens",
            "generation_rows",
            "learning_rate",
            "temperature",
            "max_grad_norm",
            "eval_num_problems",
            "lampo_temperature",
            "delta_max",
        )
        not_negative = (
            "beta",
            "epsilon",
            "entropy_coef",
            "warmup_steps",
            "record_every",
            "eval_steps",
            "save_steps",
            "weight_decay",
            "rouge_weight",
            "delta_iterations",
            "delta_min",
            "gradient_noise_parts",
        )
        _check_ranges(self, positive, not_negative)
        if self.num_generations < 2:
            raise RelexkitError(
                "num_generations: 1 leaves nothing to compare a rollout with; expected 2 or more"
            )
        unit = self.num_generations * self.steps_per_generation
        if self.generation_batch_size % unit:
            raise RelexkitError(
                f"generation_batch_size: {self.generation_batch_size} does not split into"
                f" {self.steps_per_generation} steps of whole groups of {self.num_generations};"
                f" expected a multiple of {unit}"
            )
        if self.delta is not None and self.delta <= 1 + self.upper_epsilon:
            raise RelexkitError(
                f"delta: {self.delta} would cap below the clip range; expected more than 1 +"
                " epsilon_high"
            )
        if self.delta_min > self.delta_max:
            raise RelexkitError(
                f"delta_min: {self.delta_min} is more than delta_max, {self.delta_max}; expected at"
                " most that"
            )
        groups = self.generation_batch_size // unit
        if self.gradient_noise_parts == 1 or self.gradient_noise_parts > groups:
            raise RelexkitError(
                f"gradient_noise_parts: {self.gradient_noise_parts} parts cannot be compared;"
                f" expected 2 to {groups}, the groups of a step, or 0"
            )
        self.jump_rule  # noqa: B018 (refuses what it cannot be)
        _check_engine(self)
        if self.precision != "float32" and self.bf16 is not None:
            raise RelexkitError(
                f"bf16: is for precision float32 only, and {self.precision} always computes in"
                " bfloat16; leave bf16 out"
            )
        if not 1 <= self.mantissa_bits <= 23:
            raise RelexkitError(
                f"mantissa_bits: {self.mantissa_bits} is out of range; expected 1 to 23"
            )
        _check_schedule(self.lr_scheduler_type)

    @property
    def upper_epsilon(self) -> float:
        """Upper clip range."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def jump_rule(self) -> JumpRule | None:
        """``regrounding`` or ``jumps``, checked.

        Raises:
            RelexkitError: both, an unknown key or method, a number that is too small, nothing is
                recorded to predict from, or too few prompts for the test of a jump.
        """
        if self.regrounding is not None and self.jumps is not None:
            raise RelexkitError("jumps: are adaptive, regrounding is fixed; expected one of them")
        rule: JumpRule
        if self.regrounding is not None:
            rule, name = _rule(FixedJumps, "regrounding", self.regrounding), "regrounding"
        elif self.jumps is not None:
            asked = {} if self.jumps == "adaptive" else self.jumps
            rule, name = _rule(Jumps, "jumps", asked), "jumps"
        else:
            return None
        if self.record_every != 1 or rule.every % self.generation_interval:
            raise RelexkitError(
                f"{name}: predicts from recorded steps, between generations; expected record_every"
                f" 1, and {rule.every} trained steps to be a multiple of"
                f" {self.generation_interval}, the steps of a generation"
            )
        if rule.tested and self.num_prompts < _FEWEST_PROMPTS:
            raise RelexkitError(
                f"{name}: {self.num_prompts} prompts of a generation do not tell whether a jump"
                f" hurt; expected {_FEWEST_PROMPTS} or more, or regrounding"
            )
        return rule

    @property
    def num_prompts(self) -> int:
        """Prompts of one generation."""
        return self.generation_batch_size // self.num_generations

    @property
    def generation_interval(self) -> int:
        """Optimizer steps that are taken on one generation."""
        return self.steps_per_generation * self.num_iterations


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class G2DConfig:
    """How preference pairs are made of rollouts, and how DPO trains on them.

    Attributes:
        pairs: from the rollouts of the ``training`` up to step K, or from ``fresh`` ones of the
            policy of step K to their prompts.
        start, reference: the policy that DPO begins with, and the one that it is held to: of step K
            (``warm``), or the ``base``.
        max_pairs_per_prompt: most pairs of a prompt.
        max_length: most tokens of a completion in them; None for any.
        min_difficulty, max_difficulty: only prompts whose share of right rollouts lies between
            these.
        beta, label_smoothing, average_log_prob: of the loss, see ``trainer.experiments.dpo``.
        disable_dropout: no dropout in the update, whatever the model's configuration says.
        learning_rate, lr_scheduler_type, weight_decay, max_grad_norm: AdamW and its schedule.
        num_train_epochs: passes over the pairs.
        train_batch_size: pairs of an optimizer step.
        micro_batch_tokens: most tokens (padding included) in one forward and backward pass.
        seed: of the choice of pairs, their order, fresh rollouts, and dropout.
        eval_num_problems: validation problems, answered greedily.
        generation_rows: rows of one batch of a generation.
        bf16: bfloat16 autocast; None is on for a GPU and off for a CPU.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    pairs: Literal["training", "fresh"] = "training"
    start: Literal["warm", "base"] = "warm"
    reference: Literal["warm", "base"] = "warm"
    max_pairs_per_prompt: int = 4
    max_length: int | None = None
    min_difficulty: float = 0.0
    max_difficulty: float = 1.0
    beta: float = 0.1
    label_smoothing: float = 0.0
    average_log_prob: bool = False
    disable_dropout: bool = True
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_epochs: int = 1
    train_batch_size: int = 32
    micro_batch_tokens: int = 8192
    seed: int = 0
    eval_num_problems: int = 200
    generation_rows: int = 64
    bf16: bool | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot work, by name."""
        positive = (
            "max_pairs_per_prompt",
            "beta",
            "learning_rate",
            "max_grad_norm",
            "num_train_epochs",
            "train_batch_size",
            "micro_batch_tokens",
            "eval_num_problems",
            "generation_rows",
        )
        _check_ranges(self, positive, ("weight_decay",))
        if not 0 <= self.label_smoothing < 0.5:
            raise RelexkitError(
                f"label_smoothing: {self.label_smoothing} is out of range; expected 0 to less"
                " than 0.5"
            )
        if not 0 <= self.min_difficulty <= self.max_difficulty <= 1:
            raise RelexkitError(
                f"min_difficulty {self.min_difficulty}, max_difficulty {self.max_difficulty}:"
                " expected shares between 0 and 1, the smaller first"
            )
        _check_schedule(self.lr_scheduler_type)


GROUPS = {
    "model": "the run",
    "generation_batch_size": "rollouts",
    "loss_type": "loss",
    "advantage": "credit",
    "regrounding": "jumps",
    "disable_dropout": "optimizer",
    "micro_batch_tokens": "memory, speed and precision",
    "record_every": "recording, evaluation and saving",
    "pairs": "pairs",
    "beta": "loss",
    "num_train_epochs": "the run",
}
"""Headings of the help: a group begins with this option and goes on to the next one here."""


def option_groups(kind: type) -> list[tuple[str, list[dataclasses.Field[Any]]]]:
    """The options of a configuration in groups, in their order: heading and fields."""
    groups: list[tuple[str, list[dataclasses.Field[Any]]]] = []
    fields = dataclasses.fields(kind)
    split = "loss_type" if any(field.name == "loss_type" for field in fields) else "pairs"
    for field in fields:
        begins = field.name in GROUPS and not (split == "loss_type" and field.name == "beta")
        if begins or not groups:
            groups.append((GROUPS[field.name], []))
        groups[-1][1].append(field)
    return groups


def option_meanings(kind: type) -> dict[str, str]:
    """What the docstring of a configuration says of each option; options described together share
    their text.
    """
    text = (kind.__doc__ or "").partition("Attributes:")[2]
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n {8}(?=\w)", text)[1:]:
        names, _, meaning = " ".join(entry.split()).partition(": ")
        meanings |= dict.fromkeys(names.split(", "), meaning)
    return meanings


_Config = TypeVar("_Config", GRPOConfig, G2DConfig)


_Rule = TypeVar("_Rule", FixedJumps, Jumps)


def _rule(kind: type[_Rule], option: str, asked: Mapping[str, Any]) -> _Rule:
    """The rule that an option's mapping describes."""
    fields = dataclasses.fields(kind)
    for name in asked:
        if name not in (known := [field.name for field in fields]):
            raise RelexkitError(f"{option}: key {name!r} is unknown; expected {', '.join(known)}")
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    lacking = [name for name in needed if name not in asked]
    if lacking:
        raise RelexkitError(
            f"{option}: lacks {' and '.join(lacking)}; expected {' and '.join(needed)}"
        )
    try:
        return kind(**asked)
    except RelexkitError as error:
        raise RelexkitError(f"{option}: {error}") from None


def _check_engine(config: GRPOConfig) -> None:
    """Refuse what an engine cannot do, and options that belong to one where there is none."""
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    if config.engine is None:
        for name, default in defaults.items():
            if name.startswith("vllm_") and getattr(config, name) != default:
                raise RelexkitError(f"{name}: belongs to an engine; give --engine, or leave it out")
        return
    if config.token_weighting != "none" or config.token_shares or config.advantage == "lampo":
        raise RelexkitError(
            "engine: token_weighting, token_shares and lampo look into the model while it"
            " generates; expected none of them, or no engine"
        )
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        raise RelexkitError(
            f"vllm_importance_sampling_clip_min: {low} is not below"
            f" vllm_importance_sampling_clip_max, {high}"
        )
    if low is high is None and config.vllm_importance_sampling_mode.endswith("truncate"):
        raise RelexkitError(
            "vllm_importance_sampling_mode: needs a range to cut to; expected"
            " vllm_importance_sampling_clip_min or vllm_importance_sampling_clip_max"
        )


def _check_ranges(
    config: GRPOConfig | G2DConfig, positive: Sequence[str], not_negative: Sequence[str]
) -> None:
    for name in (*positive, *not_negative):
        value = getattr(config, name)
        if value < 0 or (value == 0 and name in positive):
            raise RelexkitError(
                f"{name}: {value} is too small; expected"
                f" {'more than' if name in positive else 'at least'} 0"
            )


def _check_schedule(name: str) -> None:
    schedules = ("constant", "constant_with_warmup", "linear", "cosine")
    if name not in schedules:
        raise RelexkitError(
            f"lr_scheduler_type: {name!r} is unknown; expected {', '.join(schedules)}"
        )


def load_config(
    path: str | Path | None,
    overrides: Mapping[str, str] | None = None,
    kind: type[_Config] = GRPOConfig,  # type: ignore[assignment]
) -> _Config:
    """A configuration from a YAML file, and options given as YAML text, which win.

    Raises:
        RelexkitError: the file cannot be read or is not a mapping; an option is unknown, missing,
            of another type, or out of range. The message names it.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise RelexkitError(
                f"{path}: cannot be read ({error}); expected a YAML file of options"
            ) from None
        except yaml.YAMLError as error:
            raise RelexkitError(f"{path}: is not valid YAML ({error})") from None
        if not isinstance(loaded, dict):
            raise RelexkitError(
                f"{path}: holds no options; expected lines such as `learning_rate: 1.0e-6`"
            )
        values = loaded
    return build_config(
        values | {name: yaml.safe_load(text) for name, text in (overrides or {}).items()}, kind
    )


def build_config(
    values: Mapping[str, Any],
    kind: type[_Config] = GRPOConfig,  # type: ignore[assignment]
) -> _Config:
    """A configuration from a mapping; raises as ``load_config`` does."""
    names = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"see `relexkit {'train' if kind is GRPOConfig else 'g2d'} --help`"
            )
            raise RelexkitError(f"option {name!r} is unknown; {hint}")
    converted = {name: _as_number(kind, name, value) for name, value in values.items()}
    try:
        return kind(**converted)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(piece) for piece in first["loc"][:1])
        if first["type"] == "missing":
            raise RelexkitError(
                f"{place}: is missing; expected a value for it in the file or as --{place}"
            ) from None
        raise RelexkitError(
            f"{place}: {values.get(place)!r} does not fit ({first['msg'].lower()})"
        ) from None


def dump_config(config: GRPOConfig | G2DConfig) -> str:
    """The resolved configuration as YAML; ``load_config`` of it gives the same run."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _as_number(kind: type, name: str, value: Any) -> Any:
    """YAML 1.1 reads ``1e-6`` as text, and whole numbers are good where a float is asked for."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if "float" in kinds[name] and (isinstance(value, str) or type(value) is int):
        try:
            return float(value)
        except ValueError:
            return value
    return value
