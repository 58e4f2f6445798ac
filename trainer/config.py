"""Configuration of a training run: one flat dataclass, under TRL's names where TRL has the option; YAML and command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from relexkit import RelexkitError

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GRPOConfig:
    """Everything a run depends on; the resolved form is kept beside the run, and with it the run is reproducible.

    Attributes:
        model: folder of the model that training starts from, loaded in float32 whatever its dtype.
        task: name of a task, or a mapping with its ``name`` and options (docs/tasks.md).
        output: folder of the run.
        seed: of the order of the prompts, the rollouts and dropout.
        max_steps: optimizer steps.
        generation_batch_size: rollouts of one generation, over all processes.
        num_generations: rollouts of one prompt, a group.
        steps_per_generation: optimizer steps into which a generation is split, each on its own prompts.
        num_iterations: times that a generation is used.
        max_completion_length: tokens of a completion, the end-of-sequence token included.
        temperature, top_p, top_k: of the sampling; log-probabilities are those at ``temperature``, without the cuts.
        loss_type: how token losses become one number, see ``trainer.loss``.
        beta: weight of the KL divergence to the starting model; 0 loads no reference.
        use_bias_correction_kl: multiply the divergence by the importance ratio.
        epsilon, epsilon_high: the importance ratio is clipped to [1 - epsilon, 1 + epsilon_high] (epsilon if None).
        delta: cap of the ratio where the advantage is negative (two-sided clipping); None for none.
        scale_rewards: divide advantages by the standard deviation of the ``group``, of the ``batch``, or not (``none``).
        importance_sampling_level: ratio of each ``token``, or of the whole ``sequence`` (GSPO).
        mask_truncated_completions: completions without an end do not count.
        learning_rate, lr_scheduler_type, warmup_steps: names of the schedules are those of transformers.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay, max_grad_norm: AdamW and clipping.
        micro_batch_tokens: most tokens (padding included) in one forward and backward pass; gradients accumulate, exactly.
        generation_rows: rows of one batch of the generation, in each process.
        gradient_checkpointing: recompute activations in the backward pass.
        bf16: bfloat16 autocast; None is on for a GPU and off for a CPU. Weights and optimizer are float32 always.
        device: ``auto``, ``cpu`` or ``cuda``.
        record_every: record the weights after the steps that are multiples of this; 0 records nothing.
        mantissa_bits: of the recorded float deltas.
        eval_steps, eval_num_problems: validation accuracy, greedy, every so many steps; 0 never.
        save_steps: keep the full state for a resume every so many steps, and at the end; 0 only at the end.
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
    delta: float | None = None
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    mask_truncated_completions: bool = False
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
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    record_every: int = 1
    mantissa_bits: int = 10
    eval_steps: int = 0
    eval_num_problems: int = 200
    save_steps: int = 50

    def __post_init__(self) -> None:
        """Refuse what cannot work, by name."""
        positive = (
            "max_steps", "generation_batch_size", "num_generations", "steps_per_generation", "num_iterations",
            "max_completion_length", "micro_batch_tokens", "generation_rows", "learning_rate", "temperature", "max_grad_norm",
            "eval_num_problems",
        )  # fmt: skip
        not_negative = ("beta", "epsilon", "warmup_steps", "record_every", "eval_steps", "save_steps", "weight_decay")
        for name in (*positive, *not_negative):
            value = getattr(self, name)
            if value < 0 or (value == 0 and name in positive):
                raise RelexkitError(
                    f"{name}: {value} is too small; expected {'more than' if name in positive else 'at least'} 0"
                )
        if self.num_generations < 2:
            raise RelexkitError("num_generations: 1 leaves nothing to compare a rollout with; expected 2 or more")
        unit = self.num_generations * self.steps_per_generation
        if self.generation_batch_size % unit:
            raise RelexkitError(
                f"generation_batch_size: {self.generation_batch_size} does not split into {self.steps_per_generation} steps of "
                f"whole groups of {self.num_generations}; expected a multiple of {unit}"
            )
        if self.delta is not None and self.delta <= 1 + self.upper_epsilon:
            raise RelexkitError(f"delta: {self.delta} would cap below the clip range; expected more than 1 + epsilon_high")
        if not 1 <= self.mantissa_bits <= 23:
            raise RelexkitError(f"mantissa_bits: {self.mantissa_bits} is out of range; expected 1 to 23")
        schedules = ("constant", "constant_with_warmup", "linear", "cosine")
        if self.lr_scheduler_type not in schedules:
            raise RelexkitError(f"lr_scheduler_type: {self.lr_scheduler_type!r} is unknown; expected {', '.join(schedules)}")

    @property
    def upper_epsilon(self) -> float:
        """Upper clip range."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def num_prompts(self) -> int:
        """Prompts of one generation."""
        return self.generation_batch_size // self.num_generations

    @property
    def steps_of_generation(self) -> int:
        """Optimizer steps that are taken on one generation."""
        return self.steps_per_generation * self.num_iterations


def load_config(path: str | Path | None, overrides: Mapping[str, str] | None = None) -> GRPOConfig:
    """A configuration from a YAML file, and options given as YAML text, which win.

    Raises:
        RelexkitError: the file cannot be read or is not a mapping; an option is unknown, missing, of another type, or out of
            range. The message names it.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise RelexkitError(f"{path}: cannot be read ({error}); expected a YAML file of options") from None
        except yaml.YAMLError as error:
            raise RelexkitError(f"{path}: is not valid YAML ({error})") from None
        if not isinstance(loaded, dict):
            raise RelexkitError(f"{path}: holds no options; expected lines such as `learning_rate: 1.0e-6`")
        values = loaded
    return build_config(values | {name: yaml.safe_load(text) for name, text in (overrides or {}).items()})


def build_config(values: Mapping[str, Any]) -> GRPOConfig:
    """A configuration from a mapping; raises as ``load_config`` does."""
    names = [field.name for field in dataclasses.fields(GRPOConfig)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `relexkit train --help`"
            raise RelexkitError(f"option {name!r} is unknown; {hint}")
    converted = {name: _as_number(name, value) for name, value in values.items()}
    try:
        return GRPOConfig(**converted)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(piece) for piece in first["loc"][:1])
        if first["type"] == "missing":
            raise RelexkitError(f"{place}: is missing; expected a value for it in the file or as --{place}") from None
        raise RelexkitError(f"{place}: {values.get(place)!r} does not fit ({first['msg'].lower()})") from None


def dump_config(config: GRPOConfig) -> str:
    """The resolved configuration as YAML; ``load_config`` of it gives the same run."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _as_number(name: str, value: Any) -> Any:
    """YAML 1.1 reads ``1e-6`` as text, and whole numbers are good where a float is asked for."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(GRPOConfig)}
    if "float" in kinds[name] and (isinstance(value, str) or type(value) is int):
        try:
            return float(value)
        except ValueError:
            return value
    return value
