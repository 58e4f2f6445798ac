"""How a store's model is loaded, as one value that commands and calls pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Options of what loads models or tokenizers."""

    trust_remote_code: bool = False
    """run the Python code that lies beside the model (auto_map); never done otherwise"""


@dataclass(frozen=True, kw_only=True)
class Loading(Trust):
    """Where the model of a store computes, and what its weights are rounded to."""

    dtype: Dtype = "float32"
    """round weights as a written checkpoint would be; they compute in float32"""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """to 16 bits"""
    seed: int = 0
    """of the stochastic rounding"""
    device: str = "auto"
    """where the model computes: cpu, cuda or cuda:N; auto takes a GPU if there is one"""
    disable_dropout: bool = True
    """no dropout, whatever the model's configuration says"""


IN_FLOAT32 = Loading()
"""Exact weights, on a GPU if there is one."""
