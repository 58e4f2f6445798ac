"""One loaded model into which the weights of a store's steps, recorded or predicted, are put one
after the other.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from relexkit import TrajectoryStore, apply, checkout
from relexkit.extension import apply_step
from relexkit.trainer.policy.setup import load_model

Dtype = Literal["float32", "bfloat16", "float16"]


class StoredModel:
    """The model of a store, in float32 whatever precision its weights are rounded to.

    ``dtype`` and ``rounding`` say what a written checkpoint would be rounded to: its values are
    what is computed with, so that models in different precisions differ by their weights alone.
    Memory: one model, and a second one in ``dtype``. Code that the store carries for its model runs
    only with ``trust_remote_code``.

    Attributes:
        model, tokenizer: as loaded from the store; the model holds what ``put`` has put last, at
            first the base.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        *,
        dtype: Dtype = "float32",
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        device: torch.device | None = None,
        disable_dropout: bool = True,
        trust_remote_code: bool = False,
    ):
        self.store = store
        self._rounding, self._seed = rounding, seed
        with tempfile.TemporaryDirectory(prefix="relexkit-") as folder:
            base = str(checkout(store, 0, Path(folder) / "base"))
            where = device or torch.device("cpu")
            self.model, self.tokenizer = load_model(
                base, where, disable_dropout=disable_dropout, trust_remote_code=trust_remote_code
            )
            self._rounded: Any = None
            if dtype != "float32":
                rounded, _ = load_model(base, where, trust_remote_code=trust_remote_code)
                self._rounded = rounded.to(dtype=getattr(torch, dtype))

    def put(self, weights: np.ndarray) -> None:
        """Put ``theta_0 + M^T a`` into the model, ``a`` as ``relexkit.apply`` takes it. One pass
        over the deltas.
        """
        if self._rounded is None:
            apply(self.store, self.model, weights)
            return
        apply(self.store, self._rounded, weights, rounding=self._rounding, seed=self._seed)
        self._take_over()

    def put_step(self, step: int) -> None:
        """Put a recorded step into the model, 0 for the base, bit for bit where the store is exact.

        Raises:
            StoreError: the step is not recorded.
        """
        if self._rounded is None:
            apply_step(self.store, self.model, step)
            return
        apply_step(self.store, self._rounded, step, rounding=self._rounding, seed=self._seed)
        self._take_over()

    def _take_over(self) -> None:
        with torch.no_grad():
            for parameter, rounded in zip(
                self.model.parameters(), self._rounded.parameters(), strict=True
            ):
                parameter.copy_(rounded)
