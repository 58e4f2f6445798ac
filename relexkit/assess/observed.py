"""What is known of a run: the one value that every question starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from relexkit.assess.jump_decision import momentum_of
from relexkit.assess.metrics import Informative, informative_steps
from relexkit.errors import StoreError
from relexkit.gram_matrix import Gram
from relexkit.gram_matrix.compute.settings import DEFAULT, Compute
from relexkit.gram_matrix.jumps import jumps, last_trained
from relexkit.gram_matrix.pca import pca_gram
from relexkit.gram_matrix.segment import segment_gram
from relexkit.results import Result
from relexkit.store import TrajectoryStore, describe_steps


@dataclass(frozen=True, repr=False)
class Observed(Result):
    """A run up to one of its steps.

    Attributes:
        gram: Gram matrices of every moving tensor, with the learning-rate schedule.
        metrics: what was logged, each ``float64 [T]`` over the same steps; NaN where nothing was.
    """

    gram: Gram
    metrics: dict[str, np.ndarray]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each step: distance from the base, and what was logged."""
        distance = np.sqrt(np.einsum("ntt->t", self.gram.matrices))
        return [
            {"step": step, "distance": float(distance[row])}
            | {name: float(values[row]) for name, values in self.metrics.items()}
            for row, step in enumerate(self.gram.steps.tolist())
        ]

    def sentences(self) -> list[str]:
        """How many steps had a gradient, if a metric tells."""
        seen = self.informative
        return [f"{seen.count} of {seen.known} steps were informative."] if seen else []

    def until(self, step: int | None) -> Observed:
        """The prefix of the run up to and including ``step``."""
        gram = self.gram.until(step)
        return Observed(gram, {n: v[: len(gram.steps)] for n, v in self.metrics.items()})

    @property
    def informative(self) -> Informative | None:
        """How many of the steps had a gradient; None if no metric tells."""
        return informative_steps(self.metrics)


def observe(
    store: TrajectoryStore,
    *,
    until: int | None = None,
    since: int | None = None,
    compute: Compute = DEFAULT,
) -> Observed:
    """The run as far as ``until``, or its last step: Gram matrices, learning rates and metrics over
    the same steps.

    Of a run with jumps the steps before the first one. One pass over the deltas the first time; the
    result is kept in the store.

    Args:
        since: only the steps after this one, up to the next jump: a run of its own, whose base is
            the weights there and whose steps count from it. The optimizer's momentum comes from the
            steps before it. One pass over all of them each time, in this process.

    Raises:
        RelexkitError: no recorded step is that early, or none between ``since`` and ``until``; for
            more see ``gram``.
    """
    if since is not None:
        return _segment(store, since, until)
    gram = pca_gram(store, until=until, compute=compute)
    return Observed(gram, store.metrics()).until(int(gram.steps[-1]))


def _segment(store: TrajectoryStore, since: int, until: int | None) -> Observed:
    later = jumps(store)
    later = later[later > since]
    before = store.steps < (later[0] if len(later) else np.inf)
    if until is not None:
        before &= store.steps <= until
    rows = np.flatnonzero((store.steps > since) & before)
    if not len(rows):
        raise StoreError(
            f"{store.path}: no step follows {since} before the next jump or --until; expected one"
            f" of its steps with later ones: {describe_steps(store.steps)}"
        )
    last = int(store.steps[rows[-1]]) - since
    metrics = {name: values[rows] for name, values in store.metrics().items()}
    segment = segment_gram(store, since).until(last)
    if since:
        first = segment_gram(store, 0, last_trained(store, since))
        segment = replace(segment, momentum=momentum_of(first))
    return Observed(segment, metrics)
