"""Which PCA: the exact Gram matrices or randomized ones, by what each would cost on this store.

Exact: ``T^2 D`` operations on what is read once. Randomized: ``4 T D l`` on what is read once or
twice, for long runs. The constants are nanoseconds per element and step on one core, from short
loops on a busy machine with two AMD EPYC cores. Only their ratios matter for the choice. Whole
passes over 2^19 dense float32 elements on one core of it, under load
(``tests/benchmarks/pca_crossover.py``, seed 0, medians of 2): randomized took 1.43, 1.17 and 0.95
of the processor seconds of exact at T = 30, 100 and 300, where the model says 1.88, 1.55 and 1.03;
at 300 their ranges overlap, so the crossover is not resolved closer than that. The passes took 1.1
to 2.2 times the estimated seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.gram_matrix.compute.settings import DEFAULT, Compute
from relexkit.gram_matrix.exact import gram, known_steps
from relexkit.gram_matrix.lowrank.randomized import is_kept, randomized_gram, wanted_components
from relexkit.gram_matrix.matrices import Gram
from relexkit.store import TrajectoryStore
from relexkit.store.encodings.bits import BLOCK

PCA = ("auto", "exact", "randomized")

_READ = 5.0  # read, decompress and count a dense element of a step
_READ_ENTRY = 12.0  # of an entry of the sparse log: read, replay, gather
_MULTIPLY = 0.017  # of an element of a step with each of the T steps
_PROJECT = 0.12  # of an element of a step, both ways, with each column of Q
_PASSES = 1.5  # of the randomized PCA: one or two for smooth runs
_NOTABLE = 10.0  # core-seconds; nothing is approximated to save less
_MARGIN = (
    0.8  # the approximation must promise this share of the exact pass's time to be worth its error
)


@dataclass(frozen=True)
class Choice:
    """``method``, ``exact`` or ``randomized``, and why, in a sentence; ``notable`` if the user
    should read that.
    """

    method: Literal["exact", "randomized"]
    reason: str
    notable: bool = False


def choose(
    store: TrajectoryStore,
    *,
    pca: str = "auto",
    until: int | None = None,
    components: int | None = None,
    device: str = "cpu",
) -> Choice:
    """What ``--pca`` means for a store: as asked, or for ``auto`` by the estimated time. Reads only
    indices.

    Raises:
        RelexkitError: ``pca`` is not in ``PCA``, or more components than steps.
    """
    if pca not in PCA:
        raise RelexkitError(f"--pca {pca} is unknown; choose one of {', '.join(PCA)}")
    num_rows = (
        int(np.count_nonzero(store.steps <= until)) if until is not None else len(store.steps)
    )
    wanted = wanted_components(components, num_rows) if num_rows else 1
    if pca == "exact":
        return Choice("exact", "exact PCA, as asked")
    if pca == "randomized":
        return Choice("randomized", "randomized PCA, as asked")
    if known_steps(store) == len(store.steps):
        return Choice("exact", "exact PCA: its Gram matrices are kept in the store")
    if is_kept(store, until, components):
        return Choice("randomized", "randomized PCA: its result is kept in the store")
    if device != "cpu":
        return Choice("exact", f"exact PCA: on {device} reading takes longer than the products")
    exact, randomized = estimated_seconds(store, num_rows, wanted)
    told = (
        f"about {exact:.2g} core-seconds against {randomized:.2g} of randomized for {num_rows}"
        " steps"
    )
    if exact > _NOTABLE and randomized < _MARGIN * exact:
        return Choice(
            "randomized",
            f"randomized PCA: exact takes {told}; --pca exact computes it all the same",
            notable=True,
        )
    return Choice("exact", f"exact PCA: it takes {told}", notable=exact > _NOTABLE)


def estimated_seconds(
    store: TrajectoryStore, num_rows: int, components: int, oversampling: int = 8
) -> tuple[float, float]:
    """Core-seconds of the exact and of the randomized PCA over the first ``num_rows`` steps,
    whatever the store keeps.
    """
    exact = randomized = 0.0
    all_rows, width = len(store.steps), min(num_rows, components + oversampling)
    for part, spec in enumerate(store.layout.parts):
        if not spec.moves or not spec.numel:
            continue
        if store.encoding(part).is_log:
            columns = float(
                np.minimum(store.entries(part, all_rows), BLOCK).sum()
            )  # that ever change, at most
            read_all, read = (
                _READ_ENTRY * float(store.entries(part, n).sum()) for n in (all_rows, num_rows)
            )
        else:
            columns = float(spec.numel)
            read_all, read = (_READ * columns * n for n in (all_rows, num_rows))
        # the exact pass takes all steps: any later question about a prefix is then free
        exact += read_all + _MULTIPLY * columns * all_rows**2
        randomized += _PASSES * (read + _PROJECT * columns * num_rows * width)
    return exact * 1e-9, randomized * 1e-9


def pca_gram(
    store: TrajectoryStore, *, until: int | None = None, compute: Compute = DEFAULT
) -> Gram:
    """Gram matrices over the steps to ``until``, exact or randomized as ``choose`` says.

    For memory and errors see ``gram`` and ``randomized_gram``.
    """
    c = compute
    choice = c.team.share(
        lambda: choose(store, pca=c.pca, until=until, components=c.components, device=c.device)
    )
    if choice.method == "exact":
        whole = gram(
            store,
            device=c.device,
            team=c.team,
            memory_budget_bytes=c.memory_budget_bytes,
            progress=c.progress,
        )
        return whole.until(until)
    return randomized_gram(store, until=until, compute=c)
