"""The block-wise reader and writer against the safetensors package, and against files that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import raw_bits, same_bits
from safetensors.torch import load_file, save_file

from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import SafetensorsFile, SafetensorsFolderWriter, TensorInfo

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bytes in the dtype: every bit pattern may occur."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(np.prod(shape, dtype=np.int64))
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return ((raw & 1) if dtype == torch.bool else raw).view(dtype).reshape(shape)


def all_kinds() -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": random_tensor((3, 5 + i), dtype, i) for i, dtype in enumerate(DTYPES)}
    return tensors | {
        "scalar": random_tensor((), torch.float32),
        "empty": torch.empty(4, 0, 2),
        "weird \u00e9\n\"'/..": torch.ones(1),
    }


def read_all(file: SafetensorsFile, name: str, like: torch.Tensor) -> np.ndarray:
    out = np.empty_like(raw_bits(like))
    file.read_into(name, 0, out)
    return out


def test_reads_what_the_safetensors_package_wrote(tmp_path: Path) -> None:
    tensors = all_kinds()
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "x": "y"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert info == TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert info.num_bytes == tensor.nbytes
        np.testing.assert_array_equal(read_all(file, name, tensor), raw_bits(tensor))
    file.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_any_range_of_elements_can_be_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "before": random_tensor((7,), torch.uint8),
        "w": random_tensor((11, 13), dtype),
        "after": random_tensor((3,), torch.int8),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    bits = raw_bits(tensors["w"])
    file = SafetensorsFile(tmp_path / "m.safetensors")
    for start, stop in [(0, 1), (5, 5), (17, 99), (len(bits) - 1, len(bits)), (0, len(bits))]:
        out = np.empty(stop - start, bits.dtype)
        file.read_into("w", start, out)
        np.testing.assert_array_equal(out, bits[start:stop])
    file.close()


def write_raw(path: Path, header: Any, data: bytes, *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [begin, end],
    }


LIES: dict[str, tuple[Any, str]] = {
    "offset beyond the file": (
        {"w": entry(begin=8, end=16)},
        "is truncated: tensor 'w' ends at byte 16",
    ),
    "negative offset": (
        {"w": entry(begin=-8, end=0)},
        "tensor 'w' .* claims bytes -8:0; the header is damaged",
    ),
    "shape larger than its bytes": (
        {"w": entry(shape=(3,))},
        r"tensor 'w' of shape \[3\] and dtype float32 claims bytes 0:8",
    ),
    "shape smaller than its bytes": ({"w": entry(shape=(1,))}, "the header is damaged"),
    "negative shape": ({"w": entry(shape=(-1, -2))}, "the header is damaged"),
    "huge shape": ({"w": entry(shape=(2**62, 2**62))}, "the header is damaged"),
    "reversed offsets": ({"w": entry(begin=8, end=0)}, "the header is damaged"),
    "unknown dtype": (
        {"w": entry(dtype="F4")},
        "tensor 'w' has dtype 'F4'; expected one of F32, BF16",
    ),
    "dtype that is a list": ({"w": entry(dtype=["F32"])}, "m.safetensors: "),
    "offsets that are words": ({"w": entry(begin="a", end="b")}, "the header is not valid"),
    "offsets that are fractions": ({"w": entry(begin=0.5, end=8.5)}, "m.safetensors: "),
    "offsets that are whole floats": ({"w": entry(begin=0.0, end=8.0)}, "the header is"),
    "shape that is a word": ({"w": entry(shape="ab")}, "the header is not valid"),
    "three offsets": (
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        "the header is not valid",
    ),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "the header is not valid"),
    "an entry that is a number": ({"w": 3}, "the header is not valid"),
    "a list": ([1, 2], "the header is not valid"),
    "null": (None, "the header is not valid"),
    "not JSON": (b"{'w': 1}", "the header is not valid"),
    "not UTF-8": (b'{"\xff": 1}', "the header is not valid"),
    "deep nesting": (b"[" * 100_000, "the header is not valid"),
    "an infinite number": (
        b'{"w": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
        "the header is not valid",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_sentence(tmp_path: Path, lie: str) -> None:
    header, message = LIES[lie]
    path = write_raw(tmp_path / "m.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    """As the reference implementation does: two names for the same bytes are a damaged header."""
    path = write_raw(
        tmp_path / "m.safetensors", {"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)
    )
    with pytest.raises(CheckpointError, match=r"damaged|not valid|overlap"):
        SafetensorsFile(path)


def test_metadata_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"__metadata__": 3, "w": entry()}, bytes(8))
    with pytest.raises(CheckpointError, match="the header is not valid"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 2**20, 75])
def test_a_header_length_beyond_the_file_is_refused_without_reading_it(
    tmp_path: Path, length: int
) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"w": entry()}, bytes(8), length=length)
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        SafetensorsFile(path)


def test_every_truncation_of_a_file_is_noticed_when_it_is_opened(tmp_path: Path) -> None:
    save_file({"a": torch.randn(5), "b": torch.randn(3, 2).to(torch.bfloat16)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "m.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.safetensors: "):
            SafetensorsFile(path)


def test_a_file_that_shrinks_while_open_is_an_error_not_zeros(tmp_path: Path) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    with open(tmp_path / "m.safetensors", "r+b") as handle:
        handle.truncate((tmp_path / "m.safetensors").stat().st_size - 40)
    with pytest.raises(CheckpointError, match="ends inside tensor 'w'"):
        file.read_into("w", 0, np.empty(100, np.uint32))
    file.close()


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()], ids=["missing", "folder"])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: "):
        SafetensorsFile(tmp_path / "m.safetensors")


# -- writing ---------------------------------------------------------------------------------------


def write_in_pieces(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    infos = {
        n: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for n, t in tensors.items()
    }
    writer = SafetensorsFolderWriter(folder, infos, max_shard_bytes)
    pieces = []
    for name, tensor in tensors.items():
        bits = raw_bits(tensor)
        cut = len(bits) // 3
        pieces += [(name, 0, bits[:cut]), (name, cut, bits[cut:])]
    for name, start, bits in reversed(pieces):  # any order
        writer.write(name, start, bits)
    writer.close()


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 400, 10**9])
def test_the_safetensors_package_reads_what_was_written(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    tensors = all_kinds()
    write_in_pieces(tmp_path, tensors, max_shard_bytes)
    found = loaded(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor), name
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    index_path = tmp_path / "model.safetensors.index.json"
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        assert not index_path.exists()
        return
    index = json.loads(index_path.read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    for path in tmp_path.glob("*.safetensors"):
        shard = load_file(path)
        assert (
            sum(t.nbytes for t in shard.values()) <= max_shard_bytes
            or sum(t.nbytes > 0 for t in shard.values()) == 1
        )


@pytest.mark.parametrize("max_shard_bytes", [2000, 10**9])
def test_transformers_loads_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    from runs import LLAMA_CONFIG
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_CONFIG, tie_word_embeddings=False))
    state = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}
    write_in_pieces(tmp_path, state, max_shard_bytes)
    model.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert set(again) == set(state)
    for name, tensor in state.items():
        assert same_bits(again[name], tensor), name


def test_the_data_starts_at_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    for extra in range(1, 9):
        folder = tmp_path / str(extra)
        folder.mkdir()
        write_in_pieces(folder, {"n" * extra: torch.ones(3)}, 10**9)
        raw = (folder / "model.safetensors").read_bytes()
        assert struct.unpack("<Q", raw[:8])[0] % 8 == 0


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        SafetensorsFolderWriter(tmp_path, {"w": TensorInfo((2,), "float32")})
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
