"""Files that ``torch.save`` wrote, read without PyTorch: names and shapes from the pickle, data by
offset.

Such a file is an uncompressed zip archive with one pickle and one entry for each storage. The
pickle goes through ``safe_pickle``; the storages are never loaded, only located. PyTorch's own safe
reader maps whole files and depends on the installed version (code execution up to 2.5,
CVE-2025-32434; memory corruption up to 2.9, CVE-2026-24747); this one does neither.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from relexkit.checkpoints.torchfile.regions import (
    MAX_DIMENSIONS,
    Block,
    Chunk,
    PiecewiseTensor,
    ReadOnlyFile,
    contiguous_stride,
)
from relexkit.checkpoints.torchfile.safe_pickle import (
    MAX_BYTES,
    Builders,
    Global,
    Record,
    load_data,
)
from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import ITEM_BYTES, TensorInfo

_STORAGES = {
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_MAX_DIRECTORY_BYTES = 2**26
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a pickle refers to: its entry in the archive and, unless untyped, its
    dtype.
    """

    key: str
    dtype: str | None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as pickled: a strided view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """A DTensor as pickled by one rank: its local part, and what is known of the whole."""

    local: StoredTensor
    shape: tuple[int, ...]
    placements: tuple[Record, ...]
    mesh: Record


def shape_of(values: Any = ()) -> tuple[int, ...]:
    """A pickled shape, offset or stride, checked: a few whole numbers that are not negative.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        raise ValueError("a shape has too many dimensions")
    if any(type(n) is not int or not 0 <= n < 2**62 for n in values):
        raise ValueError("a shape holds something that is not a whole number")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> StoredTensor:
    """``_rebuild_tensor`` and its versions 2 and 3; the third has the dtype in its fourth further
    argument.
    """
    dtype = dtype_name(rest[2]) if len(rest) > 2 and isinstance(rest[2], Global) else storage.dtype
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError("a tensor without a storage")
    shape, steps = shape_of(size), shape_of(stride)
    if len(shape) != len(steps) or type(offset) is not int or not 0 <= offset < 2**62:
        raise ValueError("a tensor with an impossible view")
    return StoredTensor(storage, offset, shape, steps, dtype)


def dtype_name(value: Any) -> str:
    """``float32`` of a pickled ``torch.float32``.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Global) or not value.name.startswith("torch."):
        raise ValueError("a dtype is not one of PyTorch's")
    return value.name.removeprefix("torch.")


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def empty_dictionary() -> dict[Any, Any]:
    """What an ``OrderedDict`` begins as; its items follow one by one."""
    return {}


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Subclasses of tensors: DTensor is a local tensor and a description, others are their data."""
    if isinstance(function, Global) and function.name == "torch._utils._rebuild_wrapper_subclass":
        attributes = (
            state[1] if isinstance(state, tuple) else state
        )  # (__dict__, slots) where the class has slots
        local, spec = attributes["_local_tensor"], attributes["_spec"]
        placements, mesh = spec.get("placements"), spec.get("mesh")
        if (
            not isinstance(local, StoredTensor)
            or not isinstance(placements, tuple)
            or not isinstance(mesh, Record)
        ):
            raise ValueError("a DTensor without placement")
        if len(placements) > MAX_DIMENSIONS or not all(
            isinstance(placement, Record) for placement in placements
        ):
            raise ValueError("a DTensor with something else for a placement")
        return ShardedTensor(local, shape_of(arguments[2]), placements, mesh)
    return function.build(*arguments)


_TENSORS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_wrapper_subclass": None,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": None,
    "torch.nn.parameter.Buffer": None,
    "torch.Tensor": None,
    "torch.Size": shape_of,
    "torch.device": None,
    "torch.serialization._get_layout": None,
    "torch.storage.UntypedStorage": None,
    "torch.storage.TypedStorage": None,
    "collections.OrderedDict": empty_dictionary,
    "builtins.set": None,
    "__builtin__.set": None,
    "_codecs.encode": None,
    **{f"torch.{name}": None for name in _STORAGES},
    **{f"torch.{name}": None for name in ITEM_BYTES},
}

DTENSOR_NAMES: dict[str, Any] = {
    f"{module}.{name}": None
    for modules, names in (
        (
            (
                "torch.distributed.tensor",
                "torch.distributed._tensor",
                "torch.distributed._tensor.api",
                "torch.distributed.tensor._api",
            ),
            ("DTensor",),
        ),
        (
            ("torch.distributed.tensor._dtensor_spec", "torch.distributed._tensor.placement_types"),
            ("DTensorSpec", "TensorMeta", "ShardOrderEntry"),
        ),
        (
            (
                "torch.distributed.tensor.placement_types",
                "torch.distributed._tensor.placement_types",
            ),
            ("Shard", "Replicate", "Partial", "_Partial", "_StridedShard"),
        ),
        (
            ("torch.distributed.device_mesh", "torch.distributed._tensor.device_mesh"),
            ("DeviceMesh",),
        ),
        (("torch.distributed._mesh_layout",), ("_MeshLayout", "_FlatLayout")),
    )
    for module in modules
    for name in names
}
"""What a pickled DTensor is made of, in the homes that PyTorch 2.2 to 2.13 gave it."""


class _Window(io.RawIOBase):
    """Bytes ``begin:begin+length`` of a file, for ``zipfile``."""

    def __init__(self, file: ReadOnlyFile, begin: int, length: int):
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError(22, "negative position")
        return self._at

    def read(self, size: int = -1) -> bytes:
        count = max(0, self._length - self._at) if size < 0 else size
        if count > _MAX_DIRECTORY_BYTES:
            raise CheckpointError(
                f"{self._file.path}: cannot be read: its directory is absurdly large; write or copy"
                " it again"
            )
        return super().read(count) or b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.read_into(self._begin + self._at, view)
        self._at += len(view)
        return len(view)


class TorchFile:
    """The content of one archive that ``torch.save`` wrote.

    Args:
        file: where it lies.
        begin, length: the part of the file that is the archive; the whole file if not given.
        extra: further names that the pickle may hold, with their builders
            (``safe_pickle.Builders``).

    Attributes:
        content: what was saved, with ``StoredTensor`` and ``ShardedTensor`` in place of tensors.

    Raises:
        CheckpointError: damaged, not written by ``torch.save``, or with names that are not allowed.
    """

    def __init__(
        self,
        file: ReadOnlyFile,
        begin: int = 0,
        length: int | None = None,
        *,
        extra: Builders | None = None,
        extra_prefixes: tuple[str, ...] = (),
    ):
        self.path = file.path
        self._file = file
        self._begin = begin
        self._length = file.size - begin if length is None else length
        if begin < 0 or self._length < 0 or begin + self._length > file.size:
            raise CheckpointError(
                f"{file.path}: is truncated: bytes {begin} to {begin + self._length} of {file.size}"
                " are needed; write or copy it again"
            )
        self._entries = self._read_directory()
        pickled = self._entry("data.pkl")
        if pickled[1] > MAX_BYTES:
            raise CheckpointError(
                f"{file.path}: its pickle has {pickled[1]:,} bytes; expected at most {MAX_BYTES:,}"
            )
        if "byteorder" in self._entries and self._read_entry("byteorder", 16) != b"little":
            raise CheckpointError(
                f"{file.path}: is in big-endian order, which is not supported; save it again"
                " elsewhere"
            )
        self.content = load_data(
            self._read_entry("data.pkl", MAX_BYTES),
            {**_TENSORS, **(extra or {})},
            where=str(file.path),
            allowed_prefixes=extra_prefixes,
            persistent=self._persistent,
        )

    def _read_directory(self) -> dict[str, tuple[int, int]]:
        """Entry -> (position of its local header in the window, size)."""
        path = self._file.path
        tail = self._file.read(self._begin + max(0, self._length - 22), 22)
        if self._file.read(self._begin, 4) != b"PK\x03\x04":
            raise CheckpointError(
                f"{path}: cannot be read safely: it is not a zip archive as torch.save writes since"
                f" PyTorch 1.6 ({self._length} bytes); write or copy it again, or convert it to"
                " safetensors"
            )
        if tail[:4] != b"PK\x05\x06":
            raise CheckpointError(
                f"{path}: cannot be read: it is truncated ({self._length} bytes); write or copy it"
                " again"
            )
        try:
            with zipfile.ZipFile(_Window(self._file, self._begin, self._length)) as archive:
                infos = archive.infolist()
        except CheckpointError:
            raise
        except Exception as error:  # zipfile raises many kinds
            reason = str(error) or type(error).__name__
            raise CheckpointError(
                f"{path}: cannot be read: its directory is damaged ({reason}); write or copy it"
                " again"
            ) from None
        entries = {}
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise CheckpointError(
                    f"{path}: cannot be read: entry {info.filename[:80]!r} is compressed;"
                    " torch.save never does that"
                )
            entries[info.filename.partition("/")[2]] = (info.header_offset, info.file_size)
        return entries

    def _entry(self, name: str) -> tuple[int, int]:
        """Position in the file and size of an entry's data, both inside the archive."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self._file.path}: has no entry {name!r}; expected a file that torch.save wrote"
            )
        offset, size = entry
        header = (
            self._file.read(self._begin + offset, _LOCAL_HEADER.size)
            if 0 <= offset < self._length
            else b""
        )
        fields = _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"",) * 11
        if fields[0] != b"PK\x03\x04":
            raise CheckpointError(
                f"{self._file.path}: entry {name!r} is damaged; write or copy the file again"
            )
        start = offset + _LOCAL_HEADER.size + fields[9] + fields[10]
        if start + size > self._length:
            raise CheckpointError(
                f"{self._file.path}: entry {name!r} lies outside of the file; write or copy it"
                " again"
            )
        return self._begin + start, size

    def _read_entry(self, name: str, limit: int) -> bytes:
        position, size = self._entry(name)
        return self._file.read(position, min(size, limit))

    def _persistent(self, identifier: Any) -> Storage:
        kind, storage, key, *_ = identifier
        if kind != "storage" or not isinstance(key, str) or not isinstance(storage, Global):
            raise ValueError("an unknown kind of external data")
        return Storage(key, _STORAGES.get(storage.name.removeprefix("torch.")))

    def block(self, tensor: StoredTensor, shape: tuple[int, ...] | None = None) -> Block:
        """Where a tensor of ``content`` lies; ``shape`` if a contiguous one is to be seen in
        another shape.

        Raises:
            CheckpointError: its dtype is not supported, or elements lie outside of the file.
        """
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{self._file.path}: dtype {tensor.dtype} is not supported")
        position, size = self._entry(f"data/{tensor.storage.key}")
        item = ITEM_BYTES[tensor.dtype]
        count = prod(tensor.shape)
        last = tensor.offset + sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True)
        )
        if count and (last >= size // item or count > size // item):
            raise CheckpointError(
                f"{self._file.path}: a tensor of shape {list(tensor.shape)} and dtype"
                f" {tensor.dtype} needs more than the {size} bytes of its storage; write or copy"
                " the file again"
            )
        block = Block(
            self._file, position + tensor.offset * item, item, tensor.shape, tensor.stride
        )
        if shape is None:
            return block
        if not block.is_contiguous or prod(shape) != count:
            raise CheckpointError(
                f"{self._file.path}: a flat part is not contiguous; expected partitions as they are"
                " saved"
            )
        return Block(self._file, block.position, item, shape, contiguous_stride(shape))

    def whole(self, tensor: StoredTensor) -> PiecewiseTensor:
        """A tensor that lies in this file only."""
        block = self.block(tensor)
        return PiecewiseTensor(
            TensorInfo(tensor.shape, tensor.dtype), [Chunk((0,) * len(tensor.shape), block)]
        )


def tensors_in(content: Any) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a state dict.

    Raises:
        CheckpointError: it is not a dictionary of tensors; the message does not name the file.
    """
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, StoredTensor | ShardedTensor)
        for name, tensor in content.items()
    ):
        raise CheckpointError("is not a dictionary of tensors; expected the weights of a model")
    yield from content.items()
