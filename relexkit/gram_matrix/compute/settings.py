"""How Gram matrices are computed, as one value that commands and calls pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relexkit.gram_matrix.compute.distributed import ALONE, Team
from relexkit.store import ProgressCallback


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Which PCA, where, and within which memory."""

    pca: Literal["auto", "exact", "randomized"] = "auto"
    """exact, or randomized for very long runs; auto takes what is cheaper"""
    components: int | None = None
    """directions that a randomized PCA resolves; None for 8, or as many as there are steps"""
    device: str = "cpu"
    """where products are computed: cpu, cuda or cuda:N"""
    team: Team = ALONE
    """the processes that share the passes; all of them make the same calls"""
    memory_budget_bytes: int = 2**28
    """of the deltas that are in memory at once"""
    progress: ProgressCallback | None = None
    """told how far each pass is"""


DEFAULT = Compute()
"""In this process, on the processor, whatever is cheaper."""
