"""What is to be written, and what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relexkit.materialize.versions import WeightSync


@dataclass(frozen=True, kw_only=True)
class Output:
    """How predicted weights are written."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the output (default: as recorded)"""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """to 16 bits; nearest erases motion below half a unit in the last place"""
    seed: int = 0
    """of the stochastic rounding"""
    adapter: int | None = None
    """from a store of PEFT adapters: write an adapter of this rank; 0 for the smallest that fits"""
    sync: WeightSync | None = None
    """versions ``OUT/weight_v{N}`` that an inference engine pulls, each against the one before"""


AS_RECORDED = Output()
"""Checkpoints in the recorded dtype, stochastically rounded."""


@dataclass(frozen=True)
class Written:
    """What was written for one target.

    Attributes:
        already: whether it was there before.
        rank, error: of an adapter, and the relative error that the cut to that rank leaves.
    """

    target: float
    folder: Path
    already: bool
    rank: int | None = None
    error: float | None = None
