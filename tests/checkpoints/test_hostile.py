"""Hostile input: random damage to every format, in processes that may use little memory and are
watched.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import closing
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import zstandard
from fuzz_readers import WRITERS, read_all, write_chain
from runs import write_checkpoint
from safetensors import safe_open
from safetensors.numpy import save_file
from sharded import Malicious, write_dcp

from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.checkpoints.chain import ChainedRun
from relexkit.checkpoints.formats.peft_config import read_settings
from relexkit.cli import main
from relexkit.errors import CheckpointError, StoreError
from relexkit.store import TrajectoryStore
from relexkit.store.format import json_checksum
from relexkit.weights.dtypes import bits_dtype

SCRIPT = Path(__file__).parents[1].joinpath("fuzz_readers.py")
FORMATS = (
    "safetensors",
    "safetensors-index",
    "bin",
    "verl",
    "dcp",
    "sharded-safetensors",
    "zero-2",
    "zero-3",
    "peft",
    "peft-bin",
    "weight-sync",
    "weight-sync-overwrite",
    "weight-sync-skyrl",
    "store",
)


def fuzz(folder: Path, count: int, *formats: str) -> dict[str, dict[str, int]]:
    command = [
        sys.executable,
        str(SCRIPT),
        str(folder),
        "--count",
        str(count),
        "--formats",
        *formats,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(outcomes: dict[str, dict[str, int]], count: int) -> None:
    for name, outcome in outcomes.items():
        assert outcome["refused"] + outcome["read"] == count
        assert outcome["refused"] > count / 4, f"{name}: the damage hardly matters"


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    check(fuzz(tmp_path, 16, *FORMATS), 16)


def test_links_that_lead_back_are_neither_followed_for_ever_nor_taken_for_steps(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoint-1", {"w": torch.ones(3)})
    (run / "checkpoint-2").symlink_to(run / "checkpoint-2")
    (run / "_actor").symlink_to(run)
    (run / "checkpoint-1" / "actor").symlink_to(run / "checkpoint-1")
    (run / "checkpoint-1" / "huggingface").symlink_to(run / "checkpoint-1" / "huggingface")
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "model.safetensors").symlink_to(
        run / "checkpoint-3" / "model.safetensors"
    )
    assert open_run(run).steps == [1]


def test_a_chunk_that_claims_more_than_its_bytes_is_refused_when_opened(tmp_path: Path) -> None:
    write_dcp(tmp_path, {"w": torch.ones(3)}, 1)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    huge = torch.Size([2**40])
    metadata.state_dict_metadata["w"].size = metadata.state_dict_metadata["w"].chunks[0].sizes = (
        huge
    )
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"the chunk of shape \[1099511627776\] is recorded with \d+ bytes"
    ):
        open_checkpoint(tmp_path)


def test_a_dtype_that_no_store_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp", {"w": torch.ones(3, dtype=torch.complex64)}, 1)
    torch.save({"w": torch.ones(3, dtype=torch.complex64)}, tmp_path / "pytorch_model.bin")
    for folder in (tmp_path / "dcp", tmp_path):
        with pytest.raises(CheckpointError, match=r"complex64|ComplexFloatStorage"):
            open_checkpoint(folder)


PICKLED = [
    name
    for name in FORMATS
    if name not in ("safetensors", "safetensors-index", "sharded-safetensors", "peft", "store")
    and not name.startswith("weight-sync")
]


def pickled_files(folder: Path) -> list[Path]:
    return [
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
    ]


@pytest.mark.parametrize("name", PICKLED)
def test_code_in_any_file_of_any_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "step")
    files = pickled_files(tmp_path / "step")
    assert files
    for path in files:
        original = path.read_bytes()
        if (
            path.suffix == ".distcp"
        ):  # a chunk lies at its place: the pickle of the archive is exchanged
            continue  # tests/test_dcp.py
        if original[:2] == b"PK":
            torch.save(Malicious(tmp_path / "executed"), path)
        else:
            path.write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
        with pytest.raises(
            CheckpointError, match=r"cannot be read safely: it refers to 'posix\.mkdir'"
        ):
            read_all(tmp_path / "step")
        path.write_bytes(original)
    read_all(tmp_path / "step")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", PICKLED)
def test_an_archive_that_would_unpack_to_more_than_its_size_is_refused_unread(
    tmp_path: Path, name: str
) -> None:
    WRITERS[name](tmp_path / "step")
    bomb = tmp_path / "bomb"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**27))
    for path in pickled_files(tmp_path / "step"):
        original = path.read_bytes()
        path.write_bytes(bomb.read_bytes())
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            read_all(tmp_path / "step")
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("safetensors", "config.json"),
        ("safetensors-index", "model.safetensors.index.json"),
        ("weight-sync", "weight_v000002/model.safetensors.index.json"),
        ("weight-sync-skyrl", "delta-00000002/manifest.json"),
        ("peft", "adapter_config.json"),
        ("verl", "huggingface/tokenizer.json"),
    ],
)
def test_a_small_file_that_is_huge_is_refused_unread(tmp_path: Path, name: str, file: str) -> None:
    WRITERS[name](tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(CheckpointError, match=rf"{Path(file).name}: has more than [\d,]+ bytes"):
        read_all(tmp_path)


def edited(path: Path, **changes: object) -> dict:
    """A JSON file with other values, at the place that ``a.b`` names."""
    document = json.loads(path.read_text())
    for place, value in changes.items():
        *inner, last = place.split("__")
        target = document
        for key in inner:
            target = target[int(key) if key.isdecimal() else key]
        target[last] = value
    path.write_text(json.dumps(document))
    return document


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata__version": "3"}, "says that it is version 3; it was moved"),
        ({"metadata__base_version": "2"}, "applies to version 2, which does not come before it"),
        ({"metadata__base_version": "9"}, "applies to version 9, which does not come before it"),
        ({"metadata__base_version": "9" * 400}, "does not describe a version"),
        ({"metadata__base_version": True}, "does not describe a version"),
        ({"metadata__delta_encoding": "sum"}, "has the encoding 'sum'; expected one of xor"),
        ({"metadata__compression_format": "none"}, "has the compression 'none'; expected zstd"),
        ({"metadata__checksum_format": "crc"}, "has the checksum format 'crc'; expected one of"),
        ({"metadata": [1]}, "version 2 lacks tensor"),
        ({"weight_map": 7}, "does not describe a version"),
        (
            {"weight_map": {"model.norm.weight": "../x.safetensors"}},
            r"names the file '\.\./x\.safetensors'; expected a plain \.safetensors file name",
        ),
        (
            {"weight_map": {"model.norm.weight": "/etc/passwd"}},
            "names the file '/etc/passwd'; expected a plain",
        ),
        ({"weight_map": {"w": "model-00007-of-00009.safetensors"}}, "which does not exist"),
        ({"weight_map": {}}, "holds model-00000-of-00002.safetensors, which its list does not"),
    ],
    ids=str,
)
def test_a_version_that_lies_about_itself_is_left_out_with_the_reason(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_chain(tmp_path, "xor")
    edited(tmp_path / "weight_v000002" / "model.safetensors.index.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors__0__payload_file": "../../x"}, r"names the file '\.\./\.\./x'"),
        ({"tensors__0__payload_key": "other"}, "its tensors are not those that the version lists"),
        ({"tensors__0__uncompressed_num_bytes": 2**50}, "contradict one another or the file"),
        ({"tensors__0__compressed_num_bytes": 3}, "contradict one another or the file"),
        ({"tensors__0__shape": [10, -4]}, "does not describe a version|contradict"),
        ({"tensors__0__shape": [2**62, 2**62]}, "contradict one another or the file"),
        ({"tensors__0__dtype": "float4"}, "contradict|does not describe"),
        ({"tensors__0__checksum": "zz"}, "has no checksum of tensor"),
        ({"tensors__0__checksum_algorithm": "md5"}, "has the checksum format 'md5'"),
        ({"tensors__0__checksum": "0" * 32}, "checksum differs from the declared one"),
        ({"tensors__0__name": "model.norm.weight"}, "twice|the base has"),
        ({"tensors__0__name": "nothing"}, "changes tensor 'nothing', which the base does not"),
        ({"tensors": {"a": 1}}, "does not describe a version"),
        ({"version": 1.5}, "does not describe a version"),
    ],
    ids=str,
)
def test_a_manifest_that_lies_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_chain(tmp_path, "skyrl")
    edited(tmp_path / "delta-00000002" / "manifest.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_all(tmp_path)


def replaced_frame(folder: Path, name: str, content: bytes) -> None:
    """Exchange the stored bytes of one tensor's delta, with the checksums that were there."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            metadata, names = file.metadata(), list(file.keys())
            tensors = {n: file.get_tensor(n) for n in names}
        if name in tensors:
            tensors[name] = np.frombuffer(content, np.uint8)
            save_file(tensors, path, metadata=metadata)


def packed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


NORM = 16  # bytes of model.norm.weight


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("xor", packed(bytes(2**28)), "unpacks to more than the tensor holds"),
        ("xor", packed(bytes(NORM - 1)), "unpacks to 15 bytes; the tensor has 16"),
        ("xor", b"", "unpacks to 0 bytes; the tensor has 16"),
        ("xor", b"no frame at all", "is not a whole zstd frame"),
        ("xor", packed(bytes(NORM))[:-3], "unpacks to|is not a whole zstd frame"),
        ("xor", packed(bytes(NORM)), "checksum differs from the declared one"),
        ("overwrite", packed(struct.pack("<I", 2**32 - 1)), "claims 4,294,967,295 changed bytes"),
        ("overwrite", packed(bytes(2**28)), "unpacks to more than the tensor holds"),
        ("overwrite", packed(struct.pack("<IIB", 1, 16, 7)), "changes byte 16; the tensor has 16"),
        ("overwrite", packed(struct.pack("<IIIBB", 2, 5, 5, 7, 7)), "do not ascend"),
        ("overwrite", packed(struct.pack("<IIIBB", 2, 5, 4, 7, 7)), "do not ascend"),
        ("overwrite", packed(struct.pack("<II", 1, 5)), "ends too early"),
        ("overwrite", packed(b"\x01"), "ends too early"),
    ],
    ids=range(13),
)
def test_a_delta_that_is_a_bomb_or_does_not_fit_is_refused_in_little_memory(
    tmp_path: Path, kind: str, content: bytes, message: str
) -> None:
    write_chain(tmp_path, kind)
    replaced_frame(tmp_path / "weight_v000002", "model.norm.weight", content)
    tracemalloc.start()
    with pytest.raises(
        CheckpointError, match=rf"step 2: version 2: tensor 'model\.norm\.weight': .*{message}"
    ):
        read_all(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize("kind", ["xor", "overwrite", "skyrl"])
def test_every_flipped_byte_of_a_delta_is_refused(tmp_path: Path, kind: str) -> None:
    """Or is without effect: what is read is then what was written."""
    write_chain(tmp_path, kind)
    folder = sorted(p for p in tmp_path.iterdir() if p.name != "base")[1]
    path = sorted(folder.glob("*.safetensors"))[0]
    original = path.read_bytes()
    expected = chain_content(tmp_path)
    for at in range(0, len(original), 7):
        changed = bytearray(original)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        try:
            found = chain_content(tmp_path)
        except CheckpointError:
            continue
        assert found == expected, at


def chain_content(folder: Path) -> dict[str, bytes]:
    """Bytes of the last version's floats."""
    run = open_run(folder)
    if len(run.steps) < 2:
        raise CheckpointError("left out")
    with closing(open_checkpoint(folder / "base")) as base:
        checkpoint = ChainedRun(run, base).checkpoint(2)  # type: ignore[arg-type]
        content = {}
        for name, info in checkpoint.tensors.items():
            out = np.empty(
                info.num_bytes // bits_dtype(info.dtype).itemsize, bits_dtype(info.dtype)
            )
            checkpoint.read_into(name, 0, out)
            content[name] = out.tobytes()
        return content


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*b", "a?" * 30 + "a" * 30, "(a|a)" * 30, ".*.*.*.*.*x", "a{1,9}{1,9}{1,9}"],
)
def test_a_pattern_that_could_be_tried_for_ever_is_refused(pattern: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {pattern: 1}}
    with pytest.raises(CheckpointError, match="of module names is too complex to be tried safely"):
        read_settings(config, "x").rank_of("a" * 60 + "!")


def test_an_index_of_a_store_that_points_far_beyond_its_shard_is_refused(tmp_path: Path) -> None:
    WRITERS["store"](tmp_path / "store")
    shard = next(
        p
        for p in sorted((tmp_path / "store" / "base").rglob("*"))
        if p.is_file() and p.name != "zarr.json"
    )
    content = bytearray(shard.read_bytes())
    count = 1
    content[-20:-4] = struct.pack("<QQ", 0, 2**40) * count
    content[-4:] = struct.pack("<I", google_crc32c.value(bytes(content[-20:-4])))
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="the shard is truncated"):
        TrajectoryStore(tmp_path / "store").verify()


ODD = (None, -1, 2**70, 1.5, "\ud800", [], {}, [[1]])


@pytest.mark.parametrize(
    "place",
    [("source",), ("relexkit_version",), ("mantissa_bits",), ("files",), ("base",),
     ("base", "sha256"), ("base", "description"), ("layout",), ("layout", "tensors"),
     ("layout", "parts")],
    ids=".".join,
)  # fmt: skip
def test_an_odd_description_of_a_store_ends_in_one_line(
    place: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS["store"](tmp_path / "store")
    path = tmp_path / "store/zarr.json"
    document = json.loads(path.read_text())
    for odd in (*ODD, "missing"):
        attributes = json.loads(json.dumps(document["attributes"]["relexkit"]))
        del attributes["checksum"]
        inner = attributes[place[0]] if len(place) > 1 else attributes
        if odd == "missing":
            inner.pop(place[-1], None)
        else:
            inner[place[-1]] = odd
        changed = {**attributes, "checksum": json_checksum(attributes)}
        path.write_text(json.dumps({**document, "attributes": {"relexkit": changed}}))
        for command in ("info", "verify"):
            status = main([command, str(tmp_path / "store")])
            said = capsys.readouterr().err
            assert status in (0, 1)
            assert len(said.splitlines()) == status, said


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_changes_to_every_format_are_refused_or_harmless(
    tmp_path: Path, name: str
) -> None:
    check(fuzz(tmp_path, 10_000, name), 10_000)
