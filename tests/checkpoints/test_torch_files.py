"""``torch.save`` archives read without PyTorch: every view and dtype, and every damage by name."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import raw_bits
from sharded import Malicious

from relexkit.checkpoints.torchfile.regions import PiecewiseTensor, ReadOnlyFile
from relexkit.checkpoints.torchfile.torch_files import StoredTensor, TorchFile, tensors_in
from relexkit.errors import CheckpointError


def opened(path: Path, content: Any, **options: Any) -> TorchFile:
    torch.save(content, path, **options)
    return TorchFile(ReadOnlyFile(path))


def read(file: TorchFile, tensor: StoredTensor, like: torch.Tensor) -> np.ndarray:
    out = np.empty_like(raw_bits(like))
    file.whole(tensor).read_into(0, out)
    return out


DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "float8_e4m3fn",
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(-3, 9).to(getattr(torch, dtype)).reshape(3, 4)
    file = opened(tmp_path / "x.pt", {"t": tensor})
    assert (file.content["t"].shape, file.content["t"].dtype) == ((3, 4), dtype)
    np.testing.assert_array_equal(read(file, file.content["t"], tensor), raw_bits(tensor))


def test_views_parameters_and_subclasses_come_back(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "t": whole.permute(2, 0, 1),
        "slice": whole[1:, ::2, 3],
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(whole[0]),
        "buffer": torch.nn.Buffer(whole[1]),
    }
    file = opened(tmp_path / "x.pt", state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(
            read(file, file.content[name], tensor.detach()), raw_bits(tensor.detach()), err_msg=name
        )


def test_a_state_dict_of_a_module_is_a_dictionary_of_tensors(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    file = opened(tmp_path / "x.pt", module.state_dict())
    assert dict(tensors_in(file.content)).keys() == module.state_dict().keys()


def test_an_archive_inside_a_larger_file_is_read_by_its_place(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(5.0), buffer)
    (tmp_path / "x").write_bytes(b"before" + buffer.getvalue() + b"after")
    file = TorchFile(ReadOnlyFile(tmp_path / "x"), 6, len(buffer.getvalue()))
    np.testing.assert_array_equal(
        read(file, file.content, torch.arange(5.0)), raw_bits(torch.arange(5.0))
    )
    with pytest.raises(
        CheckpointError, match=r"x: is truncated: bytes 6 to 9006 of \d+ are needed"
    ):
        TorchFile(ReadOnlyFile(tmp_path / "x"), 6, 9000)


def test_an_expanded_tensor_is_refused_since_a_few_bytes_could_stand_for_any_size(
    tmp_path: Path,
) -> None:
    file = opened(tmp_path / "x.pt", {"t": torch.ones(1).expand(10**9)})
    with pytest.raises(
        CheckpointError,
        match=r"x.pt: a tensor of shape \[1000000000\] .* needs more than the 4 bytes",
    ):
        file.whole(file.content["t"])


def whole_tensor(path: Path) -> PiecewiseTensor:
    file = TorchFile(ReadOnlyFile(path))
    return file.whole(file.content["t"])


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with entries changed by ``change(name, data)`` (None: left out)."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    out = path.with_name("changed.pt")
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in entries.items():
            new = change(name.partition("/")[2], data)
            if new is not None:
                archive.writestr(name, new)
    return out


def test_damaged_archives_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"t": torch.arange(100.0)}, path)

    def refused(changed: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            whole_tensor(changed)

    refused(
        rewritten(path, lambda n, d: d, zipfile.ZIP_DEFLATED),
        "is compressed; torch.save never does that",
    )
    refused(
        rewritten(path, lambda n, d: b"big" if n == "byteorder" else d), "is in big-endian order"
    )
    refused(rewritten(path, lambda n, d: None if n == "data.pkl" else d), "has no entry 'data.pkl'")
    refused(rewritten(path, lambda n, d: None if n == "data/0" else d), "has no entry 'data/0'")
    refused(
        rewritten(path, lambda n, d: d[:-1] if n == "data/0" else d),
        "needs more than the 399 bytes of its storage",
    )
    refused(
        rewritten(path, lambda n, d: d[:-1] if n == "data.pkl" else d),
        r"its pickle is damaged \(it ends early\)",
    )
    whole = path.read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refused(tmp_path / "cut.pt", r"cut\.pt: cannot be read")


def test_a_directory_that_lies_about_sizes_and_places_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"t": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))
    for offset, value in ((20, 2**31), (24, 2**31), (42, 2**31), (42, 1)):
        changed = bytearray(whole)
        changed[entry + offset : entry + offset + 4] = value.to_bytes(4, "little")
        if offset in (20, 24):  # both sizes, so that the entry does not look compressed
            changed[entry + 20 : entry + 28] = value.to_bytes(4, "little") * 2
        (tmp_path / "lie.pt").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"lie\.pt: (entry|cannot be read)"):
            whole_tensor(tmp_path / "lie.pt")


def test_code_in_an_archive_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"x\.pt: cannot be read safely: it refers to 'posix.mkdir'"
    ):
        opened(tmp_path / "x.pt", {"t": torch.ones(2), "x": Malicious(tmp_path / "executed")})
    assert not (tmp_path / "executed").exists()


def test_no_part_of_the_packages_unpickles_with_another_library() -> None:
    """The versions of PyTorch whose safe reader was not safe cannot matter: it is not called."""
    root = Path(__file__).resolve().parents[2] / "relexkit"
    for path in root.rglob("*.py"):
        text = path.read_text()
        for call in (
            "torch.load",
            "pickle.load",
            "import pickle",
            "Unpickler(",
            "allow_pickle=True",
        ):
            assert call not in text, f"{path.name} uses {call}"
