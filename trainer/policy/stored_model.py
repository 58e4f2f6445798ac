"""One loaded model into which the weights of a store's steps, recorded or predicted, are put one
after the other.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relexkit import TrajectoryStore, apply, checkout
from relexkit.extension import apply_step
from relexkit.trainer.policy.loading import IN_FLOAT32, Loading
from relexkit.trainer.policy.setup import choose_device, load_model


class StoredModel:
    """The model of a store, in float32 whatever precision its weights are rounded to.

    It computes with the weights rounded as ``loading`` says, so that models in different precisions
    differ by their weights alone. Memory: one model, and a second one in ``loading.dtype`` if that
    is not float32. Code that the store carries for its model runs only with
    ``loading.trust_remote_code``.

    Attributes:
        model, tokenizer: as loaded from the store; the model holds what ``put`` has put last, at
            first the base.
    """

    def __init__(self, store: TrajectoryStore, loading: Loading = IN_FLOAT32):
        self.store, self._loading = store, loading
        trusted = loading.trust_remote_code
        with tempfile.TemporaryDirectory(prefix="relexkit-") as folder:
            base = str(checkout(store, 0, Path(folder) / "base"))
            where = choose_device(loading)
            self.model, self.tokenizer = load_model(
                base,
                where,
                disable_dropout=loading.disable_dropout,
                trust_remote_code=trusted,
            )
            self._rounded: Any = None
            if loading.dtype != "float32":
                rounded, _ = load_model(base, where, trust_remote_code=trusted)
                self._rounded = rounded.to(dtype=getattr(torch, loading.dtype))

    def put(self, weights: np.ndarray) -> None:
        """Put ``theta_0 + M^T a`` into the model, ``a`` as ``relexkit.apply`` takes it. One pass
        over the deltas.
        """
        if self._rounded is None:
            apply(self.store, self.model, weights)
            return
        how = self._loading
        apply(self.store, self._rounded, weights, rounding=how.rounding, seed=how.seed)
        self._take_over()

    def put_step(self, step: int) -> None:
        """Put a recorded step into the model, 0 for the base, bit for bit where the store is exact.

        Raises:
            StoreError: the step is not recorded.
        """
        if self._rounded is None:
            apply_step(self.store, self.model, step)
            return
        how = self._loading
        apply_step(self.store, self._rounded, step, rounding=how.rounding, seed=how.seed)
        self._take_over()

    def _take_over(self) -> None:
        with torch.no_grad():
            for parameter, rounded in zip(
                self.model.parameters(), self._rounded.parameters(), strict=True
            ):
                parameter.copy_(rounded)
