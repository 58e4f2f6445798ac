"""Weights over deltas become checkpoints: one streaming pass, any number of targets.

A prediction is ``theta_0 + M^T a``. From dense rows that is a weighted sum of rows; from the sparse log, with ``E`` the
values of the updates, ``M^T a = E^T (L^T a)``: a scatter-add of the log with the suffix sums of ``a``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relexkit.checkpoints import open_checkpoint
from relexkit.checkpoints.hub import REVISIONS_FILE
from relexkit.checkpoints.peft import CONFIG
from relexkit.distributed import ALONE, Team
from relexkit.dtypes import FLOAT_DTYPES, ROUNDINGS, Rounding, bits_dtype, nonfinite_index, round_bits, to_float32
from relexkit.encoding import Update, apply_update, clip_update, content_checksum
from relexkit.errors import CheckpointError, RelexkitError, StoreError
from relexkit.extrapolators import METHODS, Options, check_request, predict_weights, step_text
from relexkit.factors import FactorSums
from relexkit.gram import Gram, check_unchanged
from relexkit.layout import Layout, Segment
from relexkit.linalg import single_threaded_blas
from relexkit.metrics import learning_rates
from relexkit.pca import pca_gram
from relexkit.safetensors_io import SafetensorsFolderWriter, TensorInfo
from relexkit.store import READ_WINDOW, ProgressCallback, TrajectoryStore, WriterLock, blocks, describe_steps
from relexkit.version import __version__

if TYPE_CHECKING:
    import torch

_WORKERS = min(2, os.cpu_count() or 1)
PROVENANCE = "relexkit.json"
"""File in a written folder that says exactly how it was made; a rerun skips a folder that already says the same."""


@dataclass(frozen=True)
class Prediction:
    """What ``extrapolate`` wrote for one target: the folder, and whether it was there already."""

    target: float
    folder: Path
    already: bool


def extrapolate(
    store: TrajectoryStore,
    to: Sequence[float],
    out: str | Path,
    *,
    until: int | None = None,
    method: str = "relex",
    options: Options | None = None,
    scope: str | None = None,
    scale: float = 1.0,
    dtype: str | None = None,
    rounding: Rounding = "stochastic",
    seed: int = 0,
    pca: str = "exact",
    components: int | None = None,
    device: str = "cpu",
    team: Team = ALONE,
    memory_budget_bytes: int = 2**28,
    progress: ProgressCallback | None = None,
) -> list[Prediction]:
    """Write a predicted checkpoint ``OUT/step-TARGET/`` for every target; each loads with ``from_pretrained``.

    Args:
        to: target steps, in optimizer steps.
        until: use only steps up to this one.
        method, options, scope, scale: see ``predict_weights``.
        dtype: of the output; the recorded one if not given. 16-bit outputs are rounded stochastically unless
            ``rounding`` is ``nearest``: nearest rounding erases motion below half a unit in the last place.
        seed: of the stochastic rounding; the result does not depend on how the work is cut.
        pca, components, device, team: how the Gram matrices are found, see ``pca_gram``. The first process writes.

    One pass over the deltas up to ``until`` for all targets together (and one for the Gram matrices if the store has
    none yet). Memory: the budget, whatever the number of steps and parameters.

    Raises:
        ExtrapolationError: see ``predict_weights``.
        StoreError: damaged chunk, or the disk is full; nothing half-written is left.
    """
    check_output(dtype, rounding)
    plans = plan(
        store, to, until=until, method=method, options=options, scope=scope, scale=scale, pca=pca, components=components,
        device=device, team=team, memory_budget_bytes=memory_budget_bytes, progress=progress,
    )  # fmt: skip
    jobs, predictions = [], []
    for planned in plans:
        provenance = {**planned.provenance, "dtype": dtype or "as recorded", "rounding": rounding, "seed": seed}
        folder = Path(out) / f"step-{step_text(planned.target)}"
        already = is_finished(folder, provenance)
        predictions.append(Prediction(planned.target, folder, already))
        if not already:
            jobs.append((folder, planned.weights, provenance, model_card(provenance, planned.variance)))
    if jobs:
        pending = [FolderJob(folder, provenance, card) for folder, _, provenance, card in jobs]
        with PendingFolders(store, pending, dtype) as writers:

            def consume(index: int, segment: Segment, values: np.ndarray) -> None:
                name, start = segment.tensor.name, segment.start
                target_dtype = dtype or segment.tensor.dtype
                bits = round_bits(values, target_dtype, rounding, seed=seed, tensor=name, start=start)
                writers.write(index, segment, bits)

            stream_sums(store, np.stack([w for _, w, _, _ in jobs]), consume, memory_budget_bytes, progress)
            writers.write_fixed()
    return predictions


@dataclass(frozen=True)
class Plan:
    """What will be written for one target: ``weights [N, T]`` over the deltas, and the words that say how they came about."""

    target: float
    weights: np.ndarray
    provenance: dict[str, Any]
    variance: float | None


def plan(
    store: TrajectoryStore,
    to: Sequence[float],
    *,
    until: int | None = None,
    method: str = "relex",
    options: Options | None = None,
    scope: str | None = None,
    scale: float = 1.0,
    pca: str = "exact",
    components: int | None = None,
    device: str = "cpu",
    team: Team = ALONE,
    memory_budget_bytes: int = 2**28,
    progress: ProgressCallback | None = None,
) -> list[Plan]:
    """Weights and provenance for every target, in order; nothing for all but the first process. See ``extrapolate``."""
    options, targets = options or Options(), [float(target) for target in dict.fromkeys(to)]
    check_request(targets, method, options, scale)
    num_used = len(used_steps(store, until))
    needs_gram = METHODS[method].needs_gram
    observed = _shape_only(store).until(until)
    if needs_gram:
        observed = pca_gram(
            store, pca=pca, until=until, components=components, device=device, team=team,
            memory_budget_bytes=memory_budget_bytes, progress=progress,
        )  # fmt: skip
    if team.rank:
        return []
    rates = learning_rates(store.steps, store.metrics())
    weights = predict_weights(observed, targets, method=method, options=options, scope=scope, scale=scale, rates=rates)
    settings = {"method": method, **_used_options(method, options), "scope": scope or METHODS[method].scope, "scale": scale}
    content = f"{content_checksum(store.checksums()[:num_used].ravel().tolist()):08x}"
    with single_threaded_blas():
        variance = _variance(observed) if needs_gram else None
    return [
        Plan(target, weight, {
            "relexkit": __version__, "kind": "extrapolated", "target": target, **settings,
            "steps": [int(s) for s in store.steps[:num_used]], "content": content, "base": store.attributes["base"],
            "source": store.attributes["source"],
        }, variance)
        for target, weight in zip(targets, weights, strict=True)
    ]  # fmt: skip


def apply(
    store: TrajectoryStore,
    model: torch.nn.Module,
    weights: np.ndarray,
    *,
    rounding: Rounding = "stochastic",
    seed: int = 0,
    memory_budget_bytes: int = 2**28,
) -> None:
    """Load ``theta_0 + M^T a`` into a model in place, tensor by tensor, on whatever device it is.

    Tensors that are not float keep the model's values. An error while reading leaves the model partly changed.

    Args:
        model: its ``state_dict`` has the store's tensors (tied ones under either name).
        weights: ``a``, ``[N, T]`` over the store's moving tensors, as one row of ``predict_weights``; all zero for the base.
        rounding: used where a parameter is less precise than float32.

    Raises:
        RelexkitError: the model lacks a tensor, or has it with another shape.
    """
    import torch

    expected = (len(store.layout.moving_tensors), len(store.steps))
    if weights.shape[:1] != expected[:1] or weights.ndim != 2 or weights.shape[1] > expected[1]:
        raise RelexkitError(f"weights of shape {list(weights.shape)}; expected {list(expected)}: one row of predict_weights")
    state = model.state_dict()
    shared = aliases(store.layout)
    flat: dict[str, list[torch.Tensor]] = {}
    for tensor in store.layout.moving_tensors:
        found = [name for name in (tensor.name, *shared.get(tensor.name, ())) if name in state]
        wrong = [name for name in found if tuple(state[name].shape) != tensor.shape]
        for name in found:
            if str(state[name].dtype).removeprefix("torch.") not in FLOAT_DTYPES or not state[name].is_contiguous():
                raise RelexkitError(
                    f"tensor {name!r} of the model is {state[name].dtype}, contiguous {state[name].is_contiguous()}; "
                    f"expected contiguous {', '.join(FLOAT_DTYPES)}"
                )
        if wrong or not found:
            problem = f"has it with shape {list(state[wrong[0]].shape)}" if wrong else "lacks it"
            raise RelexkitError(f"tensor {tensor.name!r} of shape {list(tensor.shape)}: the model {problem}")
        flat[tensor.name] = [state[name].detach().view(-1) for name in found]

    def consume(_: int, segment: Segment, values: np.ndarray) -> None:
        name, start = segment.tensor.name, segment.start
        for target in flat[name]:
            dtype = str(target.dtype).removeprefix("torch.")
            bits = round_bits(values, dtype, rounding, seed=seed, tensor=name, start=start)
            block = torch.from_numpy(bits.view(f"int{bits.itemsize * 8}")).view(target.dtype)
            target[start : start + segment.numel].copy_(block)

    with torch.no_grad():
        stream_sums(store, weights[None], consume, memory_budget_bytes, None)


def checkout(store: TrajectoryStore, step: int, out: str | Path, *, progress: ProgressCallback | None = None) -> Path:
    """Write a recorded step as a checkpoint folder ``out``: bit for bit if the store is exact.

    Step 0 is the base. Float deltas give the weights to the store's mantissa bits, in the recorded dtype. From a store of
    adapters these are the merged weights, rounded stochastically (seed 0) where the base is less precise than the adapter.

    Raises:
        StoreError: the step is not recorded, or a chunk is damaged.
        RelexkitError: something else is at ``out``.
    """
    row = -1 if step == 0 else store.row_of(step)
    content = f"{content_checksum(store.checksums()[row].tolist()):08x}" if row >= 0 else "base"
    exact = "bit for bit" if store.exact or step == 0 else f"to {store.mantissa_bits} mantissa bits of the delta"
    provenance = {
        "relexkit": __version__, "kind": "recorded", "step": step, "exact": exact, "content": content,
        "base": store.attributes["base"], "source": store.attributes["source"],
    }  # fmt: skip
    folder = Path(out)
    if is_finished(folder, provenance):
        return folder
    with PendingFolders(store, [FolderJob(folder, provenance, None)], None) as writers:
        for part, spec in enumerate(store.layout.parts):
            if spec.encoding == "fixed":
                continue
            for begin, end in blocks(spec.numel, READ_WINDOW[spec.encoding]):
                if spec.encoding == "factors" and row >= 0:
                    state = _merged(store, part, row, begin, end)
                else:
                    state = store.read_state(part, row, begin, end)
                for segment in store.layout.segments_in(part, begin, end):
                    low = segment.offset - begin
                    writers.write(0, segment, state[low : low + segment.numel])
                if progress:
                    progress("writing", end, spec.numel)
        writers.write_fixed()
    return folder


def _merged(store: TrajectoryStore, part: int, row: int, begin: int, end: int) -> np.ndarray:
    """Bits of base plus delta of a part with factors; such a part is one tensor."""
    dtype, name = store.layout.parts[part].dtype, store.layout.segments_in(part)[0].tensor.name
    values = to_float32(store.read_base(part, begin, end), dtype) + store.read_row(part, row, begin, end)
    return round_bits(values, dtype, "stochastic", tensor=name, start=begin)


def round_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    rounding: Rounding = "stochastic",
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write a checkpoint folder in another precision, stochastically rounded unless told otherwise.

    Tensors that are not float, and float tensors that ``dtype`` holds exactly, keep their values. One pass, flat memory.

    Raises:
        CheckpointError: the source is damaged or not finite.
        RelexkitError: something else is at ``out``, or a value does not fit ``dtype``.
    """
    check_output(dtype, rounding)
    folder, source = Path(out), Path(source).resolve()
    with closing(open_checkpoint(source)) as checkpoint:
        provenance = {
            "relexkit": __version__, "kind": "rounded", "source": str(source), "dtype": dtype,
            "rounding": rounding, "seed": seed, "weights": _weight_files(source),
        }  # fmt: skip
        if is_finished(folder, provenance):
            return folder
        for name, info in checkpoint.tensors.items():
            if info.dtype.startswith("float") and info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{source}: tensor {name!r} has dtype {info.dtype}; expected float32, bfloat16 or float16: convert it first"
                )
        tensors = {
            name: TensorInfo(info.shape, dtype if info.dtype in FLOAT_DTYPES else info.dtype)
            for name, info in checkpoint.tensors.items()
        }
        with temporary_folder(folder) as temporary:
            with closing(SafetensorsFolderWriter(temporary, tensors)) as writer:
                for done, (name, info) in enumerate(checkpoint.tensors.items(), 1):
                    moving = info.dtype in FLOAT_DTYPES
                    for begin, end in blocks(info.numel if moving else info.num_bytes):
                        raw = np.empty(end - begin, bits_dtype(info.dtype))
                        checkpoint.read_into(name, begin, raw)
                        if moving:
                            bad = nonfinite_index(raw, info.dtype)
                            if bad is not None:
                                raise CheckpointError(
                                    f"{source}: tensor {name!r} is NaN or infinite at element {begin + bad}; "
                                    "expected finite weights"
                                )
                            if info.dtype != dtype:
                                values = to_float32(raw, info.dtype)
                                raw = round_bits(values, dtype, rounding, seed=seed, tensor=name, start=begin)
                        writer.write(name, begin, raw)
                    if progress:
                        progress("rounding", done, len(tensors))
            write_files(temporary, checkpoint.files(), [dtype], provenance, None)
    return folder


def _weight_files(source: Path) -> list[list[str | int]]:
    """Name, size and time of every weight file below a folder: what tells a changed source from the same one."""
    found = sorted(p for kind in ("*.safetensors", "*.bin", "*.pt", "*.distcp") for p in source.rglob(kind))
    return [[str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns] for p in found]


def used_steps(store: TrajectoryStore, until: int | None) -> np.ndarray:
    """The recorded steps up to ``until``.

    Raises:
        StoreError: there are none.
    """
    used = store.steps if until is None else store.steps[store.steps <= until]
    if not len(used):
        held = f"the store holds {describe_steps(store.steps)}"
        raise StoreError(f"{store.path}: holds no steps" if until is None else f"--until {until} keeps no step; {held}")
    return used


def check_output(dtype: str | None, rounding: str) -> None:
    """Refuse an output format or a rounding that is not one of ours."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise RelexkitError(f"--dtype {dtype} is unknown; choose one of {', '.join(FLOAT_DTYPES)}")
    if rounding not in ROUNDINGS:
        raise RelexkitError(f"--rounding {rounding} is unknown; choose {' or '.join(ROUNDINGS)}")


def _shape_only(store: TrajectoryStore) -> Gram:
    """A stand-in for the Gram matrices, for methods whose weights depend on the steps alone."""
    tensors, num_steps = store.layout.moving_tensors, len(store.steps)
    identity = np.broadcast_to(np.eye(num_steps), (len(tensors), num_steps, num_steps))
    counts = np.zeros((len(tensors), num_steps), np.int64)
    sizes = np.array([t.numel for t in tensors], np.int64)
    return Gram(store.steps, tuple(t.name for t in tensors), sizes, identity, counts, counts, counts)


def _used_options(method: str, options: Options) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name in METHODS[method].options}


def _variance(observed: Gram) -> float:
    """Share of the energy on each tensor's own first direction, over the whole model; NaN if nothing moved."""
    from relexkit.spectrum import decompose

    total = np.trace(observed.matrices, axis1=1, axis2=2)
    first = sum(float(decompose(m).singular_values[0] ** 2) for m, t in zip(observed.matrices, total, strict=True) if t > 0)
    return first / float(total.sum()) if total.sum() > 0 else float("nan")


# -- the pass over the deltas -----------------------------------------------------------------------------------------

Consume = Callable[[int, Segment, np.ndarray], None]
"""Receives ``(index of the prediction, piece of a tensor, its float32 values)``; called from several threads."""


def stream_sums(
    store: TrajectoryStore, weights: np.ndarray, consume: Consume, budget: int, progress: ProgressCallback | None,
    *, onto_base: bool = True,
) -> None:  # fmt: skip
    """Pass ``theta_0 + M^T a`` (``M^T a`` alone unless ``onto_base``) for every row of ``weights [P, N, T]`` to ``consume``.

    It receives piece after piece, in any order. Steps beyond the last one with a non-zero weight are not read.

    Raises:
        StoreError: a damaged chunk, or the store was replaced meanwhile: what ``consume`` received is of no use.
    """
    layout = store.layout
    row_of = {t.name: row for row, t in enumerate(layout.moving_tensors)}
    used = np.flatnonzero(weights.any(axis=(0, 1)))
    num_rows = int(used[-1]) + 1 if len(used) else 0
    width = max(2**18, min(READ_WINDOW["float"], budget // (2 * _WORKERS * 4 * (len(weights) + 4)) // 2**16 * 2**16))

    def predict(part: int, begin: int, end: int, updates: list[Update] | FactorSums | None) -> None:
        segments = layout.segments_in(part, begin, end)
        weight = weights[:, [row_of[s.tensor.name] for s in segments], :num_rows]
        base = store.read_base(part, begin, end)
        if isinstance(updates, FactorSums):
            sums = updates.columns(begin, end)
        elif updates is None:
            sums = _dense_sums(store, part, begin, end, base, segments, weight)
        else:
            sums = _sparse_sums(layout.parts[part].dtype, begin, end, base, updates, segments, weight)
        original = to_float32(base, layout.parts[part].dtype)
        for index, values in enumerate(sums):
            if onto_base:
                values = np.where(values == 0, original, values + original)  # a -0.0 that does not move stays one
            for segment in segments:
                low = segment.offset - begin
                consume(index, segment, values[low : low + segment.numel])

    with ThreadPoolExecutor(_WORKERS) as pool:
        for part, spec in enumerate(layout.parts):
            if spec.encoding == "fixed":
                continue
            stretches: Iterable[tuple[int, int, list[Update] | FactorSums | None]] = [(0, spec.numel, None)]
            if spec.encoding == "sparse":
                stretches = store.read_log(part, num_rows, budget // 2, pool)
            elif spec.encoding == "factors":
                weight = weights[:, row_of[layout.segments_in(part)[0].tensor.name]]
                stretches = [(0, spec.numel, FactorSums(store, part, weight, budget // 2))]
            for begin, end, updates in stretches:
                spans = [(part, begin + low, begin + high, updates) for low, high in blocks(end - begin, width)]
                list(pool.map(lambda span: predict(*span), spans))
                if progress:
                    progress("predicting", part * 100 + 100 * end // spec.numel, len(layout.parts) * 100)
    check_unchanged(store)


def _sparse_sums(
    dtype: str, begin: int, end: int, base: np.ndarray, updates: list[Update], segments: list[Segment], weights: np.ndarray
) -> np.ndarray:
    """``M^T a``, ``float32 [P, n]``, of columns ``begin:end`` of a sparse part; ``weights [P, S, T]``."""
    suffix = weights[:, :, ::-1].cumsum(axis=2)[:, :, ::-1].astype(np.float32)
    state = base.copy()
    sums = np.zeros((len(weights), end - begin), np.float32)
    edges = np.array([*(s.offset - begin for s in segments), end - begin], np.int32)
    for row, update in enumerate(updates):
        local, differences = clip_update(update, begin, end)
        before, after = apply_update(state, local, differences)
        values = to_float32(after, dtype) - to_float32(before, dtype)
        counts = np.diff(np.searchsorted(local, edges))
        for target, total in enumerate(sums):
            total[local] += np.repeat(suffix[target, :, row], counts) * values
    return sums


def _dense_sums(
    store: TrajectoryStore, part: int, begin: int, end: int, base: np.ndarray, segments: list[Segment], weights: np.ndarray
) -> np.ndarray:
    """``M^T a``, ``float32 [P, n]``, of columns ``begin:end`` of a dense part; ``weights [P, S, T]``."""
    sums = np.zeros((len(weights), end - begin), np.float32)
    for row in np.flatnonzero(weights.any(axis=(0, 1))):
        delta = store.read_delta(part, int(row), begin, end, base)
        for index, segment in enumerate(segments):
            low = segment.offset - begin
            for target, total in enumerate(sums):
                total[low : low + segment.numel] += np.float32(weights[target, index, row]) * delta[low : low + segment.numel]
    return sums


# -- folders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderJob:
    """A checkpoint folder to be written, what ``relexkit.json`` will say, and its README (None for none)."""

    folder: Path
    provenance: dict[str, Any]
    card: str | None


class PendingFolders:
    """Checkpoint folders of a store's tensors under temporary names; renamed when the block succeeds, else removed."""

    def __init__(self, store: TrajectoryStore, jobs: list[FolderJob], dtype: str | None):
        self._store, self._jobs, self._dtype = store, jobs, dtype
        self._aliases = aliases(store.layout)
        sizes = Counter[str]()
        for part in store.layout.parts:
            sizes[part.dtype] += part.numel if part.encoding != "fixed" else 0
        self._dtypes = [dtype] if dtype else [name for name, _ in sizes.most_common()]

    def __enter__(self) -> PendingFolders:
        tensors = {
            t.name: TensorInfo(t.shape, (self._dtype or t.dtype) if t.dtype in FLOAT_DTYPES else t.dtype)
            for t in self._store.layout.tensors
        }
        with ExitStack() as stack:
            self._folders = [stack.enter_context(temporary_folder(job.folder)) for job in self._jobs]
            self._writers = [stack.enter_context(closing(SafetensorsFolderWriter(f, tensors))) for f in self._folders]
            self._stack = stack.pop_all()
        return self

    def write(self, index: int, segment: Segment, bits: np.ndarray) -> None:
        """Write a piece of a tensor, and of every tensor tied to it, into folder ``index``."""
        for name in (segment.tensor.name, *self._aliases.get(segment.tensor.name, ())):
            self._writers[index].write(name, segment.start, bits)

    def write_fixed(self) -> None:
        """Write the tensors that are not float into every folder."""
        for part, spec in enumerate(self._store.layout.parts):
            if spec.encoding != "fixed":
                continue
            for begin, end in blocks(spec.numel):
                raw = self._store.read_base(part, begin, end)
                for segment in self._store.layout.segments_in(part, begin, end):
                    low = segment.offset - begin
                    for index in range(len(self._jobs)):
                        self.write(index, segment, raw[low : low + segment.numel])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            for folder, job in zip(self._folders, self._jobs, strict=True):
                write_files(folder, self._store.files(), self._dtypes, job.provenance, job.card)


def aliases(layout: Layout) -> dict[str, list[str]]:
    """Name of a tensor -> names of the tensors that are tied to it."""
    found: dict[str, list[str]] = {}
    for tensor in layout.tensors:
        if tensor.tied_to:
            found.setdefault(tensor.tied_to, []).append(tensor.name)
    return found


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its name if the block succeeds and vanishes if it does not.

    Raises:
        StoreError: the disk is full or the place cannot be written.
    """
    temporary = folder.parent / f".{folder.name}.partial"
    with WriterLock(str(temporary)):  # two commands may be asked for the same folder
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # a killed run may have left one
            temporary.mkdir(parents=True)
            yield temporary
            os.replace(temporary, folder)
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be written ({error.strerror or error}); nothing was left there: "
                "free space or choose another -o"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_finished(folder: Path, provenance: Mapping[str, Any]) -> bool:
    """True if ``folder`` is a finished result of the same request; False if nothing is there.

    Raises:
        RelexkitError: something else is there.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / PROVENANCE).read_text())
    except (OSError, ValueError):
        found = None
    if found == json.loads(json.dumps(provenance)):
        return True
    raise RelexkitError(f"{folder}: exists and holds something else; remove it or choose another -o")


def write_files(
    folder: Path, files: Mapping[str, bytes], dtypes: list[str], provenance: Mapping[str, Any], card: str | None
) -> None:
    """Write configuration, tokenizer, provenance and README into a checkpoint folder.

    A configuration that names another dtype than those of the weights (most frequent first) would make a loader round
    them, so it is corrected.
    """
    for name, content in files.items():
        if name in (CONFIG, REVISIONS_FILE):
            continue  # a loader would look for an adapter beside merged weights; commits belong to the store
        if name == "config.json":
            content = _with_dtype(content, dtypes)
        (folder / name).write_bytes(content)
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    if card is not None:
        (folder / "README.md").write_text(card)


def _with_dtype(config: bytes, dtypes: list[str]) -> bytes:
    def corrected(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: dtypes[0] if key in ("dtype", "torch_dtype") and inner not in dtypes else corrected(inner)
            for key, inner in value.items()
        }

    try:
        document = json.loads(config)
    except ValueError:
        return config
    changed = corrected(document)
    return config if changed == document or not dtypes else (json.dumps(changed, indent=2) + "\n").encode()


def model_card(provenance: Mapping[str, Any], variance: float | None) -> str:
    """README.md of a predicted checkpoint: what it is and how it was made."""
    steps, base = provenance["steps"], provenance["base"]
    options = [f.name for f in fields(Options) if provenance.get(f.name) is not None]
    said = ", ".join(f"{name} {provenance[name]}" for name in options if name != "degree" or provenance["fit"] == "polynomial")
    rows = {
        "base": f"{base['description']} (sha256 `{base['sha256']}`)",
        "source": provenance["source"],
        "steps used": f"{len(steps)}, from {steps[0]} to {steps[-1]}",
        "target step": step_text(provenance["target"]),
        "method": provenance["method"] + (f" ({said})" if said else ""),
        "fitted per": provenance["scope"],
        "scale": f"{provenance['scale']:g}",
        "dtype, rounding": f"{provenance['dtype']}, {provenance['rounding']} (seed {provenance['seed']})",
        "relexkit": provenance["relexkit"],
    }
    if variance is not None and variance == variance:  # NaN: nothing moved
        rows["variance on each tensor's first direction"] = f"{100 * variance:.1f} %"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "---\ntags:\n- relexkit\n- extrapolated\nlibrary_name: transformers\n---\n\n"
        f"# Extrapolated checkpoint, step {step_text(provenance['target'])}\n\n"
        f"These weights were not trained: they were predicted from the updates of steps {steps[0]} to {steps[-1]}. "
        "Evaluate them before use.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )
