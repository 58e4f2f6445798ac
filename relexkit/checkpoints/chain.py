"""Chains of deltas over a base: the weights of one version at a time, and what changed on the way
to it.

A version is known only after those before it, so the weights lie in an anonymous file, as large as
the model, and move from version to version. Each delta is applied in blocks, checked against the
checksum of the new tensor, and the elements that it changed are kept for the store's log.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints.formats.huggingface import HuggingFaceCheckpoint
from relexkit.checkpoints.formats.weight_sync import DeltaFiles, TensorDelta
from relexkit.checkpoints.protocol import Checkpoint, WholeTensors
from relexkit.checkpoints.same_tensors import check_tensors
from relexkit.checkpoints.stored import stored_pieces
from relexkit.checkpoints.version_run import WeightSyncRun
from relexkit.errors import CheckpointError
from relexkit.store import blocks
from relexkit.weights.byte_deltas import BLOCK_BYTES, CHECKSUMS, ENCODINGS
from relexkit.weights.dtypes import bits_dtype
from relexkit.weights.safetensors_io import TensorInfo

Changes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ascending elements of a tensor ``int64 [n]`` whose bits changed, their bits before and after."""

Arrival = tuple[int, dict[str, Changes], dict[str, bytes]]
"""The version that a chain came from, what changed since, and the files of a whole version."""

_WORKERS = min(4, os.cpu_count() or 1)
_NOWHERE = -1


class ChainedRun:
    """A run of versions over its base; see ``relexkit.checkpoints.Run``.

    Opening steps in ascending order reads each delta once. Disk: one copy of the model, in an
    anonymous file. Memory: the changes of the step that is open, and a few blocks.
    """

    def __init__(self, run: WeightSyncRun, base: Checkpoint):
        self._run = run
        self.description, self.steps, self.notes, self.left_out = (
            run.description,
            run.steps,
            run.notes,
            run.left_out,
        )
        self._chain = _Chain(run, base)

    def checkpoint(self, step: int) -> ChainedCheckpoint:
        """Open one step; the deltas up to it are applied and checked.

        Raises:
            CheckpointError: a delta is damaged, or the base is not the one that it applies to; the
                message names the step.
        """
        self._run.check_step(step)
        try:
            return ChainedCheckpoint(self._chain, self._run, step)
        except CheckpointError as error:
            raise CheckpointError(f"step {step}: {error}") from None


class ChainedCheckpoint(WholeTensors):
    """The weights of one version; see ``relexkit.checkpoints.ChangingCheckpoint``."""

    def __init__(self, chain: _Chain, run: WeightSyncRun, step: int):
        self._chain, self._version = chain, run.versions[step]
        self._metrics = run.metrics_of(step)
        origin, self._changes, self._files = chain.move_to(self._version)
        self.since = chain.step_of(origin)
        self.description = f"version {self._version} of {run.description}"
        self.tensors: Mapping[str, TensorInfo] = chain.tensors

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``relexkit.checkpoints.Checkpoint``."""
        self._chain.read_into(self._version, name, start, out)

    def changed(self, name: str) -> Changes:
        """See ``relexkit.checkpoints.ChangingCheckpoint``."""
        nothing = np.empty(0, bits_dtype(self.tensors[name].dtype))
        return self._changes.get(name, (np.empty(0, np.int64), nothing, nothing))

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer of a whole version; deltas have none."""
        return self._files

    def metrics(self) -> dict[str, float]:
        """The version's number, if it is not the step."""
        return self._metrics

    def close(self) -> None:
        """Forget the changes."""
        self._changes = {}


class _Chain:
    """The weights of every tensor at one version, and how to get to another."""

    def __init__(self, run: WeightSyncRun, base: Checkpoint):
        self._run, self._base = run, base
        self.tensors = base.tensors
        self._steps = {version: step for step, version in run.versions.items()} | {0: 0}
        if run.kept is not None and run.kept_version is not None:
            self._steps[run.kept_version] = int(run.kept.steps[-1])
        self._lock = threading.Lock()
        self._version = _NOWHERE
        self._arrived: Arrival = (_NOWHERE, {}, {})
        self._state: _State | None = None

    def step_of(self, version: int) -> int | None:
        """Optimizer step of a version; None for one that a step map leaves out."""
        return self._steps.get(version)

    def read_into(self, version: int, name: str, start: int, out: np.ndarray) -> None:
        """Bits of a tensor at a version."""
        if version != self._version:
            self.move_to(version)
        assert self._state is not None
        self._state.read_into(name, start * out.itemsize, out.data.cast("B"))

    def move_to(self, version: int) -> Arrival:
        """Make the state that of ``version``."""
        with self._lock:
            if version == self._version:
                return self._arrived
            path, root = self._path(version)
            if root is not None:
                self._reset(root)
            origin, changes, files = self._version, dict[str, Changes](), dict[str, bytes]()
            self._version, self._arrived = _NOWHERE, (_NOWHERE, {}, {})  # until all went well
            for number in path:
                applied, files = self._apply(number)
                for name, change in applied.items():
                    changes[name] = _merged(changes[name], change) if name in changes else change
            if version == self._run.kept_version and not path and self._run.has(version):
                self._verify(version)
            self._version, self._arrived = version, (origin, changes, files)
            return self._arrived

    def _path(self, version: int) -> tuple[list[int], int | None]:
        """Versions to apply, and the version to begin with, None for where the state is."""
        path: list[int] = []
        at = version
        while at not in (self._version, 0, self._run.kept_version):
            path.append(at)
            parent = self._run.parents[at]
            if parent is None:  # whole: whatever was before does not matter
                return path[::-1], (0 if self._version == _NOWHERE else None)
            at = parent
        return path[::-1], (None if at == self._version else at)

    def _reset(self, root: int) -> None:
        """Begin at the base, or at the last step of the store that is continued."""
        if self._state is None:
            self._state = _State(self.tensors, self._run.scratch)
        kept = self._run.kept
        if root and kept is not None:
            pieces: Iterable[Any] = stored_pieces(kept, len(kept.steps) - 1)
        else:
            pieces = _pieces(self._base)
        for name, start, bits in pieces:
            self._state.write(name, start * bits.itemsize, bits)
        self._version = root

    def _apply(self, version: int) -> tuple[dict[str, Changes], dict[str, bytes]]:
        """Go to a version from the one before; what changed, and its files."""
        where = f"version {version}"
        whole = self._run.parents[version] is None
        with self._run.opened(version, whole=whole) as opened, ThreadPoolExecutor(_WORKERS) as pool:
            if isinstance(opened, HuggingFaceCheckpoint):
                expected = {n: (i.shape, i.dtype) for n, i in self.tensors.items()}
                check_tensors(expected, opened, "the base", where)
                streams: dict[str, Any] = {n: _Whole(opened, n) for n in self.tensors}
                wanted: Mapping[str, TensorDelta] = {}
            else:
                self._check(opened, where)
                wanted = opened.deltas
                streams = dict.fromkeys(wanted)

            def change(name: str) -> Changes:
                try:
                    return self._change(name, streams[name], wanted.get(name))
                except CheckpointError as error:
                    raise CheckpointError(f"{where}: tensor {name!r}: {error}") from None

            changes = dict(zip(streams, pool.map(change, streams), strict=True))
            return changes, opened.files()

    def _check(self, opened: DeltaFiles, where: str) -> None:
        for name, delta in opened.deltas.items():
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(
                    f"{where}: changes tensor {name!r}, which the base does not have; give the"
                    " model that the engines were started with as --base"
                )
            if delta.info is not None and delta.info != info:
                raise CheckpointError(
                    f"{where}: tensor {name!r} is {delta.info.dtype} of shape"
                    f" {list(delta.info.shape)}; the base has {info.dtype} {list(info.shape)}"
                )

    def _change(self, name: str, stream: Any, delta: TensorDelta | None) -> Changes:
        """Apply one delta to one tensor and compare the checksum."""
        assert self._state is not None
        info = self.tensors[name]
        bits = bits_dtype(info.dtype)
        if delta is not None:
            stream = ENCODINGS[delta.encoding](delta.open_frame, info.num_bytes)
            hasher = CHECKSUMS[delta.algorithm]()
        elements, before, after = [np.empty(0, np.int64)], [np.empty(0, bits)], [np.empty(0, bits)]
        buffers = [np.empty(min(info.num_bytes, BLOCK_BYTES), np.uint8) for _ in range(2)]
        for begin, end in blocks(
            info.num_bytes, BLOCK_BYTES
        ):  # fresh pages cost as much as reading
            old, new = (buffer[: end - begin] for buffer in buffers)
            self._state.read_into(name, begin, old.data)
            np.copyto(new, old)
            stream.apply(begin, new)
            if delta is not None:
                hasher.update(new.data)
            pair = old.view(bits), new.view(bits)
            differing = np.flatnonzero(pair[0] != pair[1])
            if len(differing):
                self._state.write(name, begin, new)
                elements.append(differing + begin // bits.itemsize)
                before.append(pair[0][differing])
                after.append(pair[1][differing])
        if delta is not None:
            stream.finish()
            if hasher.hexdigest() != delta.checksum:
                raise CheckpointError(
                    f"its {delta.algorithm} checksum differs from the declared one after the delta;"
                    " the base is not the one that the deltas were made for, or a file is damaged"
                )
        return np.concatenate(elements), np.concatenate(before), np.concatenate(after)

    def _verify(self, version: int) -> None:
        """The state, which came from a store, has the checksums that the version declares."""
        if self._run.parents[version] is None:
            return
        with self._run.opened(version, whole=False) as opened:
            assert isinstance(opened, DeltaFiles)
            self._check(opened, f"version {version}")
            for name, delta in opened.deltas.items():
                hasher = CHECKSUMS[delta.algorithm]()
                for begin, end in blocks(self.tensors[name].num_bytes, BLOCK_BYTES):
                    block = np.empty(end - begin, np.uint8)
                    assert self._state is not None
                    self._state.read_into(name, begin, block.data)
                    hasher.update(block.data)
                if hasher.hexdigest() != delta.checksum:
                    raise CheckpointError(
                        f"tensor {name!r} in the store does not have the checksum that version"
                        f" {version} declares: this is another run; choose another -o"
                    )


class _Whole:
    """A tensor of a whole version in place of a delta."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint, self._name = checkpoint, name
        self._bits = bits_dtype(checkpoint.tensors[name].dtype)

    def apply(self, begin: int, block: np.ndarray) -> None:
        """See ``relexkit.weights.byte_deltas.Delta``."""
        self._checkpoint.read_into(self._name, begin // self._bits.itemsize, block.view(self._bits))


class _State:
    """The raw bytes of every tensor in an anonymous file."""

    def __init__(self, tensors: Mapping[str, TensorInfo], scratch: Path | None):
        self._begin: dict[str, int] = {}
        size = 0
        for name, info in tensors.items():
            self._begin[name] = size
            size += info.num_bytes
        with tempfile.TemporaryFile(dir=scratch) as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """Fill ``view`` (bytes) from byte ``begin`` of a tensor. Thread-safe."""
        position = self._begin[name] + begin
        while view:
            count = os.preadv(self._fd, [view], position)
            assert count, "the whole state was written"
            view, position = view[count:], position + count

    def write(self, name: str, begin: int, bits: np.ndarray) -> None:
        """Write from byte ``begin`` of a tensor. Thread-safe."""
        view, position = np.ascontiguousarray(bits).data.cast("B"), self._begin[name] + begin
        while view:
            count = os.pwrite(self._fd, view, position)
            view, position = view[count:], position + count


def _pieces(checkpoint: Checkpoint) -> Iterator[tuple[str, int, np.ndarray]]:
    """Every tensor in blocks: name, first element, bits."""
    for name, info in checkpoint.tensors.items():
        bits = bits_dtype(info.dtype)
        for begin, end in blocks(info.num_bytes // bits.itemsize):
            out = np.empty(end - begin, bits)
            checkpoint.read_into(name, begin, out)
            yield name, begin, out


def _merged(first: Changes, second: Changes) -> Changes:
    """What changed over two versions."""
    elements = np.concatenate([first[0], second[0]])
    order = np.argsort(elements, kind="stable")
    elements = elements[order]
    before = np.concatenate([first[1], second[1]])[order]
    after = np.concatenate([first[2], second[2]])[order]
    differs = elements[1:] != elements[:-1]
    opens, closes = np.append(True, differs), np.append(differs, True)
    if not len(elements):
        return first
    elements, before, after = elements[opens], before[opens], after[closes]
    moved = before != after
    return elements[moved], before[moved], after[moved]
