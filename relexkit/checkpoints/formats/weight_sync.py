"""Weight-sync deltas: what a trainer writes after every sync so that its inference engines can
follow, one folder a version.

Two layouts, after their writers' sources:

- slime, miles, modelexpress and SGLang's ``/pull_weights``: ``weight_v{N:06d}/`` is a Hugging Face
  folder, either whole or, if the metadata of ``model.safetensors.index.json`` has
  ``delta_encoding``, with one compressed delta for each tensor that changed; the files' own
  metadata have the checksums of the new tensors.
- SkyRL: ``delta-{N:08d}/manifest.json`` lists the deltas of the tensors that changed.

A delta applies to its declared base version only, so a version counts if all versions down to a
whole one, or to the base model (version 0), are there. ``relexkit.checkpoints.chain`` applies them.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from relexkit.checkpoints.protocol import WholeTensors
from relexkit.checkpoints.small_files import read_small
from relexkit.errors import CheckpointError
from relexkit.weights.byte_deltas import CHECKSUMS, ENCODINGS
from relexkit.weights.safetensors_io import ITEM_BYTES, SafetensorsFile, TensorInfo

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorDelta:
    """The delta of one tensor.

    Attributes:
        open_frame: gives a new binary file at the beginning of the compressed frame.
        encoding, algorithm: keys of ``ENCODINGS`` and ``CHECKSUMS``.
        checksum: of the tensor's new bytes.
        info: shape and dtype, if the version says them.
    """

    open_frame: Callable[[], StoredBytes]
    encoding: str
    algorithm: str
    checksum: str
    info: TensorInfo | None = None


@dataclass(frozen=True)
class Header:
    """What a version says of itself: its number, and that of the version it applies to (None: it is
    whole).
    """

    number: int
    base: int | None


class StoredBytes:
    """A tensor of bytes in a safetensors file, as a file of its own for a decompressor."""

    def __init__(self, file: SafetensorsFile, name: str):
        self._file, self._name, self._position = file, name, 0
        self._size = file.tensors[name].num_bytes

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most ``size``."""
        left = self._size - self._position
        out = np.empty(left if size < 0 else min(size, left), np.uint8)
        self._file.read_into(self._name, self._position, out)
        self._position += len(out)
        return out.tobytes()


class DeltaFiles(WholeTensors):
    """The deltas of one version, as they are stored: compressed bytes; see
    ``relexkit.checkpoints.Checkpoint``.

    Attributes:
        deltas: by the names of the tensors that changed.
    """

    def __init__(
        self,
        folder: Path,
        by_file: Mapping[str, list[str]],
        describe: Callable[[str, SafetensorsFile], tuple[str, TensorDelta]],
    ):
        """``by_file`` names the stored arrays of each file; ``describe`` gives tensor and delta of
        one.
        """
        self.description = f"weight-sync deltas in {folder}"
        self.deltas: dict[str, TensorDelta] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, tuple[SafetensorsFile, str]] = {}
        self._open: list[SafetensorsFile] = []
        try:
            self._check_files(folder, by_file)
            for name, keys in by_file.items():
                file = SafetensorsFile(folder / name)
                self._open.append(file)
                self._check_keys(file, keys)
                for key in keys:
                    tensor, delta = describe(key, file)
                    if tensor in self.deltas:
                        raise CheckpointError(f"{folder}: lists tensor {tensor!r} twice")
                    _check_delta(folder, tensor, delta)
                    self.deltas[tensor] = delta
                    self.tensors[tensor] = file.tensors[key]
                    self._stored[tensor] = file, key
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _check_files(folder: Path, by_file: Mapping[str, list[str]]) -> None:
        for name in by_file:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder}: names the file {name!r}; expected a plain .safetensors file name in"
                    " the same folder"
                )
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder}: names {name}, which does not exist; the version is incomplete"
                )
        others = {p.name for p in folder.glob("*.safetensors")} - by_file.keys()
        if others:
            raise CheckpointError(
                f"{folder}: holds {min(others)}, which its list does not name; an engine would"
                " apply it too: remove it, or copy the version again"
            )

    @staticmethod
    def _check_keys(file: SafetensorsFile, keys: list[str]) -> None:
        odd = sorted(file.tensors.keys() ^ set(keys))
        if odd or len(set(keys)) < len(keys):
            raise CheckpointError(
                f"{file.path}: its tensors are not those that the version lists, among them"
                f" {(odd or keys)[0]!r}; copy the version again"
            )
        for key, info in file.tensors.items():
            if info.dtype != "uint8" or len(info.shape) != 1:
                raise CheckpointError(
                    f"{file.path}: {key!r} is {info.dtype} of shape {list(info.shape)}; expected"
                    " the bytes of a compressed delta"
                )

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Compressed bytes."""
        file, key = self._stored[name]
        file.read_into(key, start, out)

    def files(self) -> dict[str, bytes]:
        """Nothing: configuration and tokenizer are the base's."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Nothing: trainers keep metrics elsewhere."""
        return {}

    def close(self) -> None:
        """Close the files."""
        while self._open:
            self._open.pop().close()


def _check_delta(folder: Path, tensor: str, delta: TensorDelta) -> None:
    for what, value, known in (
        ("encoding", delta.encoding, ENCODINGS),
        ("checksum format", delta.algorithm, CHECKSUMS),
    ):
        if value not in known:
            raise CheckpointError(
                f"{folder}: has the {what} {str(value)[:40]!r}; expected one of {', '.join(known)}"
            )
    if not isinstance(delta.checksum, str) or not re.fullmatch("[0-9a-f]{8,128}", delta.checksum):
        raise CheckpointError(
            f"{folder}: has no checksum of tensor {tensor!r}; copy the version again"
        )


# -- the layouts -----------------------------------------------------------------------------------


class Layout(ABC):
    """How one family of trainers names and describes its versions.

    Attributes:
        title: as in messages.
        pattern: of a version's folder; its first group is the number.
        manifest: the file that describes a version and is written last.
        has_whole: folders of that name may also be whole checkpoints.
    """

    title: str
    pattern: re.Pattern[str]
    manifest: str
    has_whole: bool

    @abstractmethod
    def header(self, manifest: dict[str, Any]) -> Header | None:
        """Numbers from the content of the manifest; None if it is that of something else."""

    @abstractmethod
    def deltas(self, folder: Path, manifest: dict[str, Any]) -> DeltaFiles:
        """Open the deltas of a local folder."""


class _PullWeights(Layout):
    title = "weight-sync versions (slime, miles, modelexpress)"
    pattern = re.compile(r"weight_v(\d{1,15})")
    manifest = _INDEX
    has_whole = True

    def header(self, manifest: dict[str, Any]) -> Header | None:
        metadata = manifest.get("metadata")
        if not isinstance(metadata, dict) or "delta_encoding" not in metadata:
            return None
        return Header(_number(metadata["version"]), _number(metadata["base_version"]))

    def deltas(self, folder: Path, manifest: dict[str, Any]) -> DeltaFiles:
        metadata = manifest["metadata"]
        if metadata.get("compression_format") != "zstd":
            compression = str(metadata.get("compression_format"))[:40]
            raise CheckpointError(f"{folder}: has the compression {compression!r}; expected zstd")
        by_file: dict[str, list[str]] = {}
        for tensor, file in manifest["weight_map"].items():
            by_file.setdefault(str(file), []).append(tensor)

        def describe(key: str, file: SafetensorsFile) -> tuple[str, TensorDelta]:
            return key, TensorDelta(
                lambda: StoredBytes(file, key),
                metadata["delta_encoding"],
                metadata.get("checksum_format", ""),
                file.metadata.get(key, ""),
            )

        return DeltaFiles(folder, by_file, describe)


class _SkyRL(Layout):
    title = "weight-sync deltas of SkyRL"
    pattern = re.compile(r"delta-(\d{8})(?:_[0-9a-f]{16})?")
    manifest = "manifest.json"
    has_whole = False

    def header(self, manifest: dict[str, Any]) -> Header | None:
        if "base_version" not in manifest or "tensors" not in manifest:
            return None
        return Header(_number(manifest["version"]), _number(manifest["base_version"]))

    def deltas(self, folder: Path, manifest: dict[str, Any]) -> DeltaFiles:
        records: dict[tuple[str, str], dict[str, Any]] = {}
        by_file: dict[str, list[str]] = {}
        for record in manifest["tensors"]:
            by_file.setdefault(str(record["payload_file"]), []).append(record["payload_key"])
            records[str(record["payload_file"]), record["payload_key"]] = record

        def describe(key: str, file: SafetensorsFile) -> tuple[str, TensorDelta]:
            record = records[file.path.name, key]
            info = TensorInfo(tuple(record["shape"]), record["dtype"])
            stored = file.tensors[key].num_bytes
            if any(type(extent) is not int or extent < 0 for extent in info.shape):
                raise ValueError(f"shape {info.shape}")
            if (
                info.dtype not in ITEM_BYTES
                or record["uncompressed_num_bytes"] != info.num_bytes
                or record["compressed_num_bytes"] != stored
            ):
                raise CheckpointError(
                    f"{folder}: the sizes it states of tensor {record['name']!r} contradict one"
                    " another or the file; copy the version again"
                )
            older = "checksum" not in record
            return record["name"], TensorDelta(
                lambda: StoredBytes(file, key),
                "xor",
                "sha256" if older else record.get("checksum_algorithm", "xxh3-128"),
                record["sha256"] if older else record["checksum"],
                info,
            )

        return DeltaFiles(folder, by_file, describe)


LAYOUTS: tuple[Layout, ...] = (_PullWeights(), _SkyRL())


def _number(value: Any) -> int:
    """A version number, which is an integer or decimal digits."""
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,15}", text):
        raise ValueError(f"the version {text[:40]!r} is not a number")
    return int(text)


_MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    LookupError,
    RecursionError,
    OverflowError,
)


def parse(layout: Layout, content: bytes, where: str) -> tuple[dict[str, Any], Header | None]:
    """Content of a manifest, and the header in it.

    Raises:
        CheckpointError: it is not valid.
    """
    try:
        manifest = json.loads(content)
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
        return manifest, layout.header(manifest)
    except _MALFORMED as error:
        raise _malformed(layout, where, error) from None


def _malformed(layout: Layout, where: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{where}/{layout.manifest}: does not describe a version ({type(error).__name__}:"
        f" {str(error)[:100]}); copy it again"
    )


def open_deltas(layout: Layout, folder: Path) -> DeltaFiles:
    """Open the deltas of a local folder. Reads headers.

    Raises:
        CheckpointError: a file is missing or damaged, or does not hold what the manifest says.
    """
    manifest, _ = parse(layout, read_small(folder / layout.manifest), str(folder))
    try:
        return layout.deltas(folder, manifest)
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise _malformed(layout, str(folder), error) from None


def find(folder: Path) -> Path | None:
    """The folder, if it holds the deltas of a version."""
    for layout in LAYOUTS:
        if layout.pattern.fullmatch(folder.name) and (folder / layout.manifest).is_file():
            with suppress(CheckpointError):
                if parse(layout, read_small(folder / layout.manifest), str(folder))[1]:
                    return folder
    return None


def refuse_single(folder: Path) -> NoReturn:
    """A delta alone is not a checkpoint.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"{folder}: holds weight-sync deltas, which mean nothing without the versions before; give"
        f" the folder of all versions, {folder.parent}"
    )
