"""``adapter_config.json`` of a PEFT adapter: size and scale of each target's delta, and what makes
it something else than ``scale * B A``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relexkit.checkpoints.small_files import read_small
from relexkit.errors import CheckpointError

CONFIG = "adapter_config.json"
_MAX_ALPHA = 1e30
_MAX_CONFIG_BYTES = 10_000_000
MERGE = (
    "merge every step with PEFT's merge_and_unload() and save_pretrained(), and import the merged"
    " folders"
)

_READ = (
    "r",
    "lora_alpha",
    "fan_in_fan_out",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "peft_type",
)
_WITHOUT_EFFECT = (  # on what the saved factors mean
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "modules_to_save",
    "bias",
)
_REASONS = {
    "use_dora": "DoRA rescales the merged rows, so its delta is not a product of two factors",
    "lora_bias": "its bias delta is not kept",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "its token rows are not kept",
    "target_parameters": "factors of whole parameters (experts) are not kept",
    "alora_invocation_tokens": (
        "an activated LoRA does not act on every token, so it cannot be merged"
    ),
    "use_qalora": "QALoRA pools its inputs",
    "ensure_weight_tying": "tied adapters are not kept",
}
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "true", "True")


@dataclass(frozen=True)
class AdapterSettings:
    """What ``adapter_config.json`` says about the size and the scale of each target's delta."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool

    def rank_of(self, module: str) -> int:
        """Rank of a target module, by pattern or the common one."""
        rank = _by_pattern(self.rank_pattern, module, self.rank)
        if type(rank) is not int or rank < 1:
            raise CheckpointError(
                f"{CONFIG}: gives {module!r} the rank {rank!r}; expected 1 or more"
            )
        return rank

    def scale_of(self, module: str) -> float:
        """Factor of ``B A``: ``alpha / r``, or ``alpha / sqrt(r)``."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        if not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:  # not NaN either
            raise CheckpointError(
                f"{CONFIG}: gives {module!r} the alpha {str(alpha)[:20]}; expected a number"
            )
        return float(alpha) / (rank**0.5 if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the whole module path or a dotted end of it."""
    for pattern, value in patterns.items():
        if module == pattern or module.endswith(f".{pattern}"):
            return value
        _refuse_slow(pattern, module)
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise CheckpointError(
                f"{CONFIG}: {pattern!r} is not a valid pattern of module names"
            ) from None
    return default


def _refuse_slow(pattern: str, module: str) -> None:
    """Refuse a pattern whose search could take longer than a little: few repetitions and choices,
    and none of a group.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]|\(\?:", "", pattern)
    repetitions = len(re.findall(r"[*+?{]", plain))
    if (
        repetitions > 2
        or plain.count("|") > 8
        or re.search(r"\)[*+?{]", plain)
        or max(len(pattern), len(module)) > 500
    ):
        raise CheckpointError(
            f"{CONFIG}: the pattern {pattern[:80]!r} of module names is too complex to be tried"
            " safely; write the names of the modules there"
        )


def read_settings(config: Mapping[str, Any], where: str) -> AdapterSettings:
    """Settings from the content of ``adapter_config.json``; ``where`` names it in messages.

    Raises:
        CheckpointError: it is not LoRA, or uses what makes the delta something else than ``scale *
            B A``; named.
    """
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise CheckpointError(f"{where}: holds an adapter of type {kind!r}; expected LORA: {MERGE}")
    for name, value in config.items():
        if value and name not in _READ and name not in _WITHOUT_EFFECT:
            reason = _REASONS.get(name, "this relexkit does not know what it does to the delta")
            raise CheckpointError(f"{where}: uses {name} ({reason}); {MERGE}")
    initial = config.get("init_lora_weights", True)
    if initial not in _PLAIN_INITIALISATIONS:
        raise CheckpointError(
            f"{where}: was initialised with {initial!r}, which changes the base weights or freezes"
            " a factor; save the steps with PEFT's path_initial_model_for_weight_conversion, or"
            f" {MERGE}"
        )
    try:
        if type(config["r"]) is not int or config["r"] < 1:
            raise ValueError(f"r is {config['r']!r}")
        settings = AdapterSettings(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            rslora=bool(config.get("use_rslora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: r or lora_alpha is missing or not a number ({error}); write or download it"
            " again"
        ) from None
    if settings.alpha == 0 and not any(settings.alpha_pattern.values()):
        raise CheckpointError(
            f"{where}: has lora_alpha 0, so its delta is zero; older releases of verl's merger"
            " wrote that by mistake: put the alpha of the training configuration there"
        )
    return settings


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``adapter_config.json``.

    Raises:
        CheckpointError: it is not valid.
    """
    try:
        config = json.loads(read_small(folder / CONFIG, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: is not valid JSON ({error}); write or download it again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder / CONFIG}: is not a JSON object; write or download it again"
        )
    return config
