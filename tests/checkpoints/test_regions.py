"""Tensors put together from boxes: any tiling and any range gives what slicing gives, and bad
tilings are refused.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relexkit.checkpoints.torchfile.regions import (
    Block,
    Chunk,
    PiecewiseTensor,
    ReadOnlyFile,
    contiguous_stride,
)
from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import TensorInfo


def tiling(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """A grid of boxes with drawn cuts along every dimension."""
    boxes: list[tuple[slice, ...]] = [()]
    for extent in shape:
        cuts = sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=2))})
        spans = [slice(a, b) for a, b in pairwise(cuts)] or [slice(0, 0)]
        boxes = [(*box, span) for box in boxes for span in spans]
    return draw(st.permutations(boxes))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]], int, int, bool]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    numel = int(np.prod(shape))
    begin = draw(st.integers(0, numel - 1))
    return shape, tiling(draw, shape), begin, draw(st.integers(begin, numel)), draw(st.booleans())


def stored(
    path: Path, array: np.ndarray, boxes: list[tuple[slice, ...]], transposed: bool = False
) -> list[Chunk]:
    """Write the boxes one after the other, in row-major or column-major order."""
    content, chunks = b"", []
    places = []
    for box in boxes:
        piece = array[box]
        places.append((len(content), piece.shape, tuple(s.start for s in box)))
        content += piece.tobytes(order="F" if transposed else "C")
    path.write_bytes(content + b"end")
    file = ReadOnlyFile(path)
    for position, shape, offsets in places:
        stride = (
            tuple(contiguous_stride(shape[::-1])[::-1]) if transposed else contiguous_stride(shape)
        )
        chunks.append(Chunk(offsets, Block(file, position, array.itemsize, shape, stride)))
    return chunks


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cases())
def test_any_range_of_any_tiling_is_what_slicing_gives(tmp_path: Path, case: tuple) -> None:
    shape, boxes, begin, end, transposed = case
    array = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    tensor = PiecewiseTensor(
        TensorInfo(shape, "float32"), stored(tmp_path / "f", array, boxes, transposed)
    )
    out = np.zeros(end - begin, np.uint32)
    tensor.read_into(begin, out)
    np.testing.assert_array_equal(out, array.reshape(-1)[begin:end])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)
@given(cases())
def test_a_tensor_that_is_not_float_is_read_by_bytes(tmp_path: Path, case: tuple) -> None:
    shape, boxes, begin, end, transposed = case
    array = np.random.default_rng(0).integers(0, 2**63, shape, np.int64)
    tensor = PiecewiseTensor(
        TensorInfo(shape, "int64"), stored(tmp_path / "f", array, boxes, transposed)
    )
    out = np.zeros(8 * end - (8 * begin + 3) if end > begin else 0, np.uint8)
    tensor.read_into(8 * begin + 3, out)
    np.testing.assert_array_equal(
        out, array.reshape(-1).view(np.uint8)[8 * begin + 3 : 8 * begin + 3 + len(out)]
    )


def test_large_transposed_blocks_are_gathered_in_pieces(tmp_path: Path) -> None:
    array = np.arange(700 * 900, dtype=np.uint32).reshape(700, 900)
    tensor = PiecewiseTensor(
        TensorInfo(array.shape, "float32"),
        stored(tmp_path / "f", array, [(slice(0, 700), slice(0, 900))], True),
    )
    out = np.empty(600_000, np.uint32)
    tensor.read_into(1234, out)
    np.testing.assert_array_equal(out, array.reshape(-1)[1234:601_234])


def boxes_of(tmp_path: Path, *boxes: tuple[tuple[int, int], tuple[int, int]]) -> list[Chunk]:
    (tmp_path / "f").write_bytes(bytes(400))
    file = ReadOnlyFile(tmp_path / "f")
    return [Chunk(o, Block(file, 0, 4, s, contiguous_stride(s))) for o, s in boxes]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [((0, 0), (2, 6))],
            "its pieces hold 12 of 24 elements; a piece is missing or saved twice",
        ),
        ([((0, 0), (2, 6)), ((2, 0), (2, 6)), ((0, 0), (4, 6))], "48 of 24 elements"),
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "its pieces overlap"),
        ([((0, 0), (4, 3)), ((0, 2), (4, 3))], "its pieces overlap"),
        ([((0, 0), (2, 4)), ((0, 4), (4, 2)), ((1, 0), (2, 4))], "its pieces overlap"),
        (
            [((2, 0), (4, 6))],
            r"a piece of shape \[4, 6\] at \[2, 0\] lies outside of shape \[4, 6\]",
        ),
        ([((-1, 0), (4, 6))], "lies outside"),
    ],
)
def test_a_bad_tiling_is_refused(tmp_path: Path, boxes: list, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PiecewiseTensor(TensorInfo((4, 6), "float32"), boxes_of(tmp_path, *boxes))


def test_a_piece_with_other_dimensions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a piece has 2 dimensions; expected 1"):
        PiecewiseTensor(TensorInfo((24,), "float32"), boxes_of(tmp_path, ((0, 0), (4, 6))))


def test_a_file_that_changes_or_shrinks_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    file = ReadOnlyFile(path)
    assert file.read(90, 50) == bytes(10)
    path.write_bytes(bytes(50))
    with pytest.raises(
        CheckpointError,
        match="f: changed while it was read; wait until the trainer has finished writing",
    ):
        file.read(0, 10)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"f: cannot be opened \(No such file"):
        file.read(0, 10)


def test_pipes_folders_and_symlink_loops_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (
        ("pipe", "is not a file"),
        ("folder", "is not a file"),
        ("loop", "cannot be opened"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            ReadOnlyFile(tmp_path / name)
