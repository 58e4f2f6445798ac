"""``torch.distributed.checkpoint`` folders: torchtitan, prime-rl, NeMo-RL, and accelerate's sharded
state dicts.

``.metadata`` is a pickle of names, shapes and the place of each chunk; every chunk is a small
``torch.save`` archive inside a ``.distcp`` file. Both are read as data. PyTorch's own reader
unpickles ``.metadata`` without any restriction (pytorch issue 189308) and loads optimizer states
too.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints.formats.huggingface import trainer_metrics
from relexkit.checkpoints.formats.key_names import model_names
from relexkit.checkpoints.small_files import merged_files, model_files
from relexkit.checkpoints.torchfile.regions import (
    Block,
    Chunk,
    PiecewiseTensor,
    PiecewiseTensors,
    ReadOnlyFile,
)
from relexkit.checkpoints.torchfile.safe_pickle import MAX_BYTES, Global, Record, load_data
from relexkit.checkpoints.torchfile.torch_files import (
    StoredTensor,
    TorchFile,
    dtype_name,
    empty_dictionary,
    shape_of,
)
from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import ITEM_BYTES, TensorInfo

_INSIDE = (
    ".",
    "trainer",
    "policy/weights",
    "policy/weights/model",
    "pytorch_model_fsdp_0",
    "weights",
)
_CONFIGURATION = (".", "..", "../tokenizer", "../../tokenizer")
_MAX_DEPTH = 16  # of dictionaries in dictionaries
_METADATA = "torch.distributed.checkpoint.metadata."
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata."


def _enum_member(kind: Any, name: Any) -> Record:
    """Python 3.11 pickles a member of an enumeration as a call of ``getattr``; no other use of it
    is known.
    """
    if not isinstance(kind, Global) or not kind.name.endswith("MEM_FORMAT_ENCODING"):
        raise CheckpointError(
            "cannot be read safely: it refers to 'builtins.getattr', which no checkpoint needs;"
            " nothing was executed"
        )
    return Record(kind.name, (name,))


_ALLOWED: dict[str, Any] = {
    **{
        home + name: None
        for home in (_METADATA, _OLD_METADATA)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "MEM_FORMAT_ENCODING",
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": None,
    "torch.distributed._shard.metadata.ShardMetadata": None,
    "torch.distributed.remote_device._remote_device": None,
    "torch.Size": shape_of,
    "torch.serialization._get_layout": None,
    "collections.OrderedDict": empty_dictionary,
    "pathlib.Path": None,
    "pathlib.PosixPath": None,
    "pathlib.PurePosixPath": None,
    "pathlib._local.PosixPath": None,
    "builtins.getattr": _enum_member,
    "builtins.set": None,
    **{
        f"torch.{name}": None
        for name in (
            "float32",
            "float64",
            "float16",
            "bfloat16",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint64",
            "uint32",
            "uint16",
            "uint8",
            "bool",
            "float8_e4m3fn",
            "float8_e5m2",
            "complex64",
            "complex128",
        )
    },
}
_OTHER_ROOTS = (
    "optimizer",
    "optimizers",
    "optim",
    "lr_scheduler",
    "scheduler",
    "dataloader",
    "train_state",
    "rng_state",
    "rng",
    "ft_dataloader",
    "app.optimizers",
    "app.optimizer",
    "app.scheduler",
    "app.progress",
    "app.lr_scheduler",
)


def find(folder: Path) -> Path | None:
    """The folder with ``.distcp`` files, in or below a step's folder."""
    for inside in _INSIDE:
        place = folder / inside
        if (place / "common.pt").is_file():  # Megatron's, which looks alike
            continue
        if (place / ".metadata").is_file() or (place.is_dir() and any(place.glob("*.distcp"))):
            return place
    return None


class DcpCheckpoint(PiecewiseTensors):
    """The model's tensors of one distributed checkpoint. Opening reads ``.metadata`` and the header
    of each chunk.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.description = f"torch.distributed.checkpoint folder {folder}"
        metadata = _read_metadata(folder)
        files: dict[str, ReadOnlyFile] = {}
        storage = _storage_by_chunk(folder, metadata.get("storage_data"))
        tensors = {}
        wanted = _model_tensors(folder, metadata.get("state_dict_metadata"))
        inner = _inner_names(wanted, metadata.get("planner_data"))
        names = model_names(inner.values())
        for key, name in ((key, names[inner[key]]) for key in wanted):
            try:
                tensors[name] = _assemble(folder, key, wanted[key], storage, files)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: tensor {name!r}: {error}") from None
        if len(tensors) != len(wanted):
            raise CheckpointError(
                f"{folder}: several keys mean the same tensor; expected one model in a checkpoint"
            )
        super().__init__(tensors)

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files near the weights, if the trainer wrote any."""
        files: dict[str, bytes] = {}
        for place in _CONFIGURATION:
            files = merged_files(model_files(self.folder / place), files)
        return files

    def metrics(self) -> dict[str, float]:
        """What Trainer logged, if it wrote the folder; the other trainers keep metrics
        elsewhere.
        """
        return trainer_metrics(self.folder.parent)

    def close(self) -> None:
        """Nothing is held open."""


def _read_metadata(folder: Path) -> Record:
    path = folder / ".metadata"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no .metadata, which is written last: it was being written"
        )
    file = ReadOnlyFile(path)
    if file.size > MAX_BYTES:
        raise CheckpointError(f"{path}: has {file.size:,} bytes; expected at most {MAX_BYTES:,}")
    metadata = load_data(file.read(0, file.size), _ALLOWED, where=str(path))
    if not isinstance(metadata, Record) or not metadata.kind.endswith(".Metadata"):
        raise CheckpointError(
            f"{path}: is not a description of a distributed checkpoint; write or copy it again"
        )
    return metadata


def _model_tensors(folder: Path, described: Any) -> dict[str, Record]:
    if not isinstance(described, dict):
        raise CheckpointError(f"{folder}: .metadata describes no tensors; write or copy it again")
    tensors = {
        key: entry
        for key, entry in described.items()
        if isinstance(key, str)
        and isinstance(entry, Record)
        and entry.kind.endswith(".TensorStorageMetadata")
        and not _is_below(key, _OTHER_ROOTS)
    }
    if not tensors:
        raise CheckpointError(
            f"{folder}: holds no tensors of a model; expected weights, not only an optimizer's"
            " state"
        )
    return tensors


def _inner_names(keys: Iterable[str], paths: Any) -> dict[str, str]:
    """Key -> its name inside the dictionaries that were saved, where all lie in the same one
    (``{"model": {...}}``).
    """
    as_they_are = {key: key for key in keys}
    if not isinstance(paths, dict):
        return as_they_are
    inner, outer = {}, set()
    for key in as_they_are:
        path = paths.get(key)
        if (
            not isinstance(path, tuple)
            or not 0 < len(path) < _MAX_DEPTH
            or not all(isinstance(p, str) for p in path)
        ):
            return as_they_are
        inner[key] = path[-1]
        outer.add(path[:-1])
    return inner if len(outer) == 1 and len(set(inner.values())) == len(inner) else as_they_are


def _is_below(key: str, roots: Iterable[str]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)


def _storage_by_chunk(folder: Path, storage: Any) -> dict[str, dict[tuple[int, ...], Record]]:
    """Tensor -> offsets of a chunk -> where it lies."""
    if not isinstance(storage, dict):
        raise CheckpointError(
            f"{folder}: .metadata does not say where the data lies; write or copy it again"
        )
    places: dict[str, dict[tuple[int, ...], Record]] = {}
    for index, place in storage.items():
        if (
            isinstance(index, Record)
            and isinstance(place, Record)
            and isinstance(index.get("fqn"), str)
        ):
            offset = index.get("offset")
            places.setdefault(index.get("fqn"), {})[offset if isinstance(offset, tuple) else ()] = (
                place
            )
    return places


def _assemble(
    folder: Path,
    key: str,
    entry: Record,
    storage: dict[str, dict[tuple[int, ...], Record]],
    files: dict[str, ReadOnlyFile],
) -> PiecewiseTensor:
    try:
        info = TensorInfo(
            shape_of(entry.get("size")), dtype_name(_dtype_of(entry.get("properties")))
        )
        boxes = [
            (shape_of(chunk.get("offsets")), shape_of(chunk.get("sizes")))
            for chunk in entry.get("chunks")
        ]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(
            f"is not described as tensors are ({error}); .metadata is damaged"
        ) from None
    chunks = []
    places = storage.get(key, {})
    for offsets, sizes in boxes:
        if 0 in sizes:
            continue
        if offsets not in places:
            raise CheckpointError(
                f"the chunk at {list(offsets)} is stored nowhere; .metadata is damaged"
            )
        chunks.append(_chunk(folder, places[offsets], info.dtype, offsets, sizes, files))
    return PiecewiseTensor(info, chunks)


def _dtype_of(properties: Any) -> Any:
    """Of ``TensorProperties``: the first of its pickled state, or an attribute in older
    versions.
    """
    state = properties.state
    return state[0] if isinstance(state, tuple) else state["dtype"]


def _chunk(
    folder: Path,
    place: Record,
    dtype: str,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    files: dict[str, ReadOnlyFile],
) -> Chunk:
    name, begin, length = place.get("relative_path"), place.get("offset"), place.get("length")
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"is stored with the transform {place.get('transform_descriptors')!r}; expected plain"
            " chunks"
        )
    if (
        not isinstance(name, str)
        or type(begin) is not int
        or type(length) is not int
        or begin < 0
        or length < 0
    ):
        raise CheckpointError("has an impossible place; .metadata is damaged")
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"lies in {name!r}; expected a plain file name in the same folder")
    if name not in files:
        files[name] = ReadOnlyFile(folder / name)
    if prod(sizes) * ITEM_BYTES.get(dtype, 1) > length:
        raise CheckpointError(
            f"the chunk of shape {list(sizes)} is recorded with {length} bytes; .metadata is"
            " damaged"
        )
    if begin + length > files[name].size:
        raise CheckpointError(
            f"lies at bytes {begin} to {begin + length} of {name}, which has {files[name].size}: it"
            " is truncated; write or copy it again"
        )
    return Chunk(offsets, _ArchivedChunk(files[name], begin, length, sizes, dtype))


class _ArchivedChunk:
    """A chunk whose archive is opened when it is first read: a checkpoint has thousands of them."""

    def __init__(
        self, file: ReadOnlyFile, begin: int, length: int, shape: tuple[int, ...], dtype: str
    ):
        self.shape = shape
        self._place = (file, begin, length)
        self._dtype = dtype
        self._block: Block | None = None

    def _resolve(self) -> Block:
        if self._block is None:
            archive = TorchFile(*self._place)
            tensor = archive.content
            if (
                not isinstance(tensor, StoredTensor)
                or tensor.shape != self.shape
                or tensor.dtype != self._dtype
            ):
                file, begin, _ = self._place
                raise CheckpointError(
                    f"{file.path}: at byte {begin} is not the chunk that .metadata describes; copy"
                    " it again"
                )
            self._block = archive.block(tensor)
        return self._block

    def read_into(self, start: int, out: np.ndarray) -> None:
        self._resolve().read_into(start, out)

    def as_bytes(self) -> Block:
        return self._resolve().as_bytes()
