"""Randomized PCA: low-rank Gram matrices of long runs by block subspace iteration over the store.

For ``Q [T, l]`` with orthonormal columns one pass gives ``Y = M (M^T Q) = G Q`` at ``4 T D l``
operations instead of the ``T^2 D`` of the exact matrix, and the exact row norms with it (Halko,
Martinsson and Tropp 2011). ``Q`` starts from the leading eigenvectors of each tensor's Gram matrix
over a sample of its columns and a few random vectors; every further pass starts from ``Y``. Of
``G`` the pass knows

- its action on ``Q``: the Nystrom approximation ``Y (Q^T Y)^-1 Y^T`` has ``G Q`` exactly and leaves
  a remainder that is positive semidefinite and vanishes on ``Q``;
- the norm of every delta and the length of every step.

The remainder is filled with what these allow: a walk plus independent noise, away from ``Q``, whose
diagonal is the exact one. So the trace, the denominator of every ratio, is exact, and the result is
positive semidefinite and of full rank: spectrum, extrapolators, backtest and the trajectory model
take it like any Gram matrix.

Shape suffixes: S segments of a part, T steps, L columns of Q.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from relexkit.errors import RelexkitError
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.gram_matrix.compute.device import PIECE, open_engine
from relexkit.gram_matrix.compute.settings import DEFAULT, Compute
from relexkit.gram_matrix.jumps import last_trained
from relexkit.gram_matrix.lowrank.subspace import complete, good_enough, orthonormal
from relexkit.gram_matrix.matrices import Gram
from relexkit.gram_matrix.onepass import Pass, Span, Tick, ticker, updates_of
from relexkit.gram_matrix.parts import Work, assemble, moving_parts, run_shared
from relexkit.gram_matrix.rates import learning_rates
from relexkit.store import TrajectoryStore, describe_steps
from relexkit.store.encodings.bits import BLOCK
from relexkit.store.kept import identity, keep, kept

_COMPONENTS = 8

_NUM_RANDOM = (
    4  # random columns of Q beside those from the sample, for what the sample does not show
)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    components: int
    oversampling: int
    max_passes: int
    seed: int


def randomized_gram(
    store: TrajectoryStore,
    *,
    until: int | None = None,
    oversampling: int = 8,
    max_passes: int = 4,
    seed: int = 0,
    compute: Compute = DEFAULT,
) -> Gram:
    """Approximate Gram matrices of every moving tensor over the steps to ``until``, for long runs.

    One pass over the deltas if the sample's directions are good enough, else up to ``max_passes``;
    ``Gram.uncertainty`` says how far the first two directions may be off. The result is kept in the
    store and used again for the same arguments.

    Args:
        oversampling: directions that are carried beside ``compute.components``, the leading ones
            that must be good (8, or all if there are fewer).
        seed: of the sample and of the random part of the first ``Q``.
        compute: where and by whom; which PCA it names does not matter here.

    Raises:
        RelexkitError: more components than steps, or as ``gram``.
    """
    parts = moving_parts(store)
    num_rows = _num_rows(store, until)
    components = wanted_components(compute.components, num_rows)
    work = Work(store, open_engine(compute.device), compute.team, compute.memory_budget_bytes)
    settings = _Settings(
        components=components, oversampling=oversampling, max_passes=max_passes, seed=seed
    )
    total = sum(store.layout.parts[part].numel for part in parts)
    tick = ticker(compute.progress, "randomized PCA", total)
    images_of_part = {p: _part(work, p, num_rows, settings, tick) for p in parts}
    store.check_unchanged()
    steps, tensors = store.steps[:num_rows], store.layout.moving_tensors
    arrays: dict[int, list[np.ndarray]] = {}
    with single_threaded_blas():
        for part, images in images_of_part.items():
            made = [complete(*images.segment(s), steps) for s in range(len(images.bases))]
            arrays[part] = [np.stack([m for m, _ in made]), np.stack([u for _, u in made])]
    (matrices, uncertainty), counts = assemble(
        store, arrays, {p: images.counts for p, images in images_of_part.items()}
    )
    sizes = np.array([t.numel for t in tensors], np.int64)
    changed, moved, unit_moves = counts
    return Gram(
        steps,
        tuple(t.name for t in tensors),
        sizes,
        matrices,
        changed,
        moved,
        unit_moves,
        uncertainty,
        learning_rates(store.steps, store.metrics()),
    )


def _num_rows(store: TrajectoryStore, until: int | None) -> int:
    until = last_trained(store, until)
    count = (
        len(store.steps)
        if until is None
        else int(np.searchsorted(store.steps, until, side="right"))
    )
    if count == 0:
        raise RelexkitError(
            f"--until {until} keeps no step; the store holds {describe_steps(store.steps)}"
        )
    return count


def wanted_components(components: int | None, num_steps: int) -> int:
    """The number of directions to resolve: as given, else 8 or as many as there are steps.

    Raises:
        RelexkitError: it is not between 1 and the number of steps.
    """
    if components is None:
        return min(_COMPONENTS, num_steps)
    if not 1 <= components <= num_steps:
        raise RelexkitError(
            f"--components {components} of {num_steps} recorded step{'s' * (num_steps != 1)};"
            f" expected 1 to {num_steps}: ask for fewer or record more steps"
        )
    return components


@dataclass
class _Images:
    """``Q`` and ``G Q``, ``[S, T, L]``; squared norms of deltas and of the steps between them,
    ``norms [S, 2, T]``; counts.
    """

    bases: np.ndarray
    images: np.ndarray
    norms: np.ndarray
    counts: np.ndarray

    def segment(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.bases[index], self.images[index], self.norms[index]


@dataclass(frozen=True)
class _Subspace:
    """Kernel of a pass: ``rows (rows^T Q)``; with ``norms`` also squared norms of rows and of
    updates, which on a line would be lost in a difference of the former.
    """

    bases: np.ndarray
    norms: bool
    of_updates: bool = False

    @property
    def width(self) -> int:
        return max(
            256, min(PIECE, 2**17 // self.bases.shape[1])
        )  # rows of a piece take half a MiB: two products read them

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        num_rows = self.bases.shape[1]
        return (self.bases.shape[1:], *(((num_rows,), (num_rows,)) if self.norms else ()))

    def constants(self, segment: int) -> tuple[np.ndarray, ...]:
        return (self.bases[segment].astype(np.float32),)

    def product(self, rows: Any, *constants: Any) -> list[Any]:
        [basis] = constants
        image = rows @ (basis.T @ rows).T
        if not self.norms:
            return [image]
        updates = updates_of(rows)
        return [image, (rows * rows).sum(1), (updates * updates).sum(1)]


@dataclass(frozen=True)
class _SampleProducts:
    """Kernel of the sample: the Gram matrix of a few columns."""

    num_rows: int
    of_updates: bool = False
    width: int = PIECE

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.num_rows, self.num_rows),)

    def constants(self, segment: int) -> tuple[np.ndarray, ...]:
        return ()

    def product(self, rows: Any, *constants: Any) -> list[Any]:
        return [rows @ rows.T]


def _part(work: Work, part: int, num_rows: int, settings: _Settings, tick: Tick) -> _Images:
    store, team = work.store, work.team
    known = team.share(lambda: _load(store, part, num_rows, settings))
    if known is not None:
        tick(store.layout.parts[part].numel)
        return known
    num_columns = min(num_rows, settings.components + settings.oversampling)
    bases = _first_bases(work, part, num_rows, num_columns, settings.seed)
    norms, counts = np.empty((0, 0, 0)), np.empty(0, np.int64)
    for number in range(settings.max_passes):
        kernel = _Subspace(bases, norms=number == 0)
        quiet: Tick = tick if number == 0 else lambda columns: None
        sums = run_shared(work, part, kernel, num_rows, 0, quiet)
        images = sums.products[0]
        if number == 0:
            norms, counts = np.stack(sums.products[1:], axis=1), sums.counts
            if store.encoding(part).is_log:
                counts[:, 1] = counts[:, 1].cumsum(axis=1)
        with single_threaded_blas():
            traces = norms[:, 0].sum(axis=1)
            if all(
                good_enough(q, y, float(t)) for q, y, t in zip(bases, images, traces, strict=True)
            ):
                break
            if number + 1 < settings.max_passes:
                bases = np.stack([orthonormal(y) for y in images])
    result = _Images(bases, images, norms, counts)
    if team.rank == 0:
        arrays = {"bases": bases, "images": images, "norms": norms, "counts": counts}
        keep(store, f"randomized/{part}", arrays, _key(store, part, num_rows, settings))
    return result


def _key(store: TrajectoryStore, part: int, num_rows: int, settings: _Settings) -> dict[str, Any]:
    return {**identity(store, part, num_rows), **vars(settings)}


def _load(store: TrajectoryStore, part: int, num_rows: int, settings: _Settings) -> _Images | None:
    attributes, arrays = kept(store, f"randomized/{part}", ("bases", "images", "norms", "counts"))
    key = _key(store, part, num_rows, settings)
    if {name: attributes.get(name) for name in key} != key:
        return None
    shape = (
        len(store.layout.segments_in(part)),
        num_rows,
        min(num_rows, settings.components + settings.oversampling),
    )
    return _Images(**arrays) if arrays["bases"].shape == shape else None


def is_kept(store: TrajectoryStore, until: int | None, components: int | None = None) -> bool:
    """Whether a result for the steps to ``until``, with default settings otherwise, is in the
    store.
    """
    num_rows = _num_rows(store, until)
    settings = _Settings(
        components=wanted_components(components, num_rows), oversampling=8, max_passes=4, seed=0
    )
    return all(_load(store, part, num_rows, settings) is not None for part in moving_parts(store))


# -- the first Q -----------------------------------------------------------------------------------


def _first_bases(work: Work, part: int, num_rows: int, num_columns: int, seed: int) -> np.ndarray:
    store, team = work.store, work.team
    spans = sample_spans(store, part, seed)[team.rank :: team.size]
    sample = Pass(
        store=store,
        part=part,
        kernel=_SampleProducts(num_rows),
        num_rows=num_rows,
        spans=spans,
        budget=work.budget,
        engine=work.engine,
    )
    with team.together():
        products = sample.run().products
    [matrices] = [team.sum(product) for product in products]
    bases = []
    with single_threaded_blas():
        for segment, matrix in zip(store.layout.segments_in(part), matrices, strict=True):
            random = _random(seed, segment.tensor.name, part)
            leading = np.linalg.eigh(matrix)[1][:, ::-1][:, : max(0, num_columns - _NUM_RANDOM)]
            drawn = random.standard_normal((num_rows, num_columns - leading.shape[1]))
            bases.append(orthonormal(np.hstack([leading, drawn])))
    return np.stack(bases)


def sample_spans(store: TrajectoryStore, part: int, seed: int) -> list[Span]:
    """At most ``PIECE`` columns of every segment of a dense part; of a sparse part the whole blocks
    of the log around them.
    """
    spec, spans = store.layout.parts[part], set()
    for segment in store.layout.segments_in(part):
        random = _random(seed + 1, segment.tensor.name, part)
        width = min(PIECE, segment.numel)
        begin = segment.offset + int(random.integers(0, segment.numel - width + 1))
        if not store.encoding(part).is_log:
            spans.add((begin, begin + width))
            continue
        block = begin // BLOCK * BLOCK
        spans.add((block, min(block + BLOCK, spec.numel)))
    return sorted(spans)


def _random(seed: int, name: str, part: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), part])
