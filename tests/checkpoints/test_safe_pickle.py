"""Pickles as data: what the standard library writes comes back, nothing runs, and no few bytes cost
much.
"""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sharded import Malicious

from relexkit.checkpoints.torchfile.safe_pickle import Global, Record, load_data
from relexkit.errors import CheckpointError

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(0, 9), inner)
    ),
    max_leaves=20,
)


@given(trees, st.integers(2, 5))
def test_plain_data_comes_back_from_every_protocol(tree: Any, protocol: int) -> None:
    allowed = {
        "_codecs.encode": lambda text, encoding: text.encode(encoding),
        "builtins.bytes": bytes,
        "__builtin__.bytes": bytes,
    }
    assert load_data(pickle.dumps(tree, protocol), allowed, where="x") == tree


@given(trees)
def test_the_pure_python_pickler_is_read_too(tree: Any) -> None:
    buffer = io.BytesIO()
    pickle._Pickler(buffer, 4).dump(tree)  # type: ignore[attr-defined]
    assert load_data(buffer.getvalue(), {}, where="x") == tree


def test_shared_objects_stay_shared_and_cycles_close() -> None:
    shared = [1]
    found = load_data(pickle.dumps({"a": shared, "b": shared}), {}, where="x")
    assert found["a"] is found["b"]
    cycle: list[Any] = []
    cycle.append(cycle)
    found = load_data(pickle.dumps(cycle), {}, where="x")
    assert found[0] is found


def test_allowed_classes_become_records_and_never_the_classes() -> None:
    data = pickle.dumps(pickle.PickleBuffer, 2)
    name = load_data(data, {}, where="x", allowed_prefixes=("_pickle.", "pickle."))
    assert isinstance(name, Global)
    record = load_data(
        pickle.dumps(ValueError("words"), 4), {"builtins.ValueError": None}, where="x"
    )
    assert isinstance(record, Record)
    assert (record.kind, record.arguments) == ("builtins.ValueError", ("words",))
    record = load_data(
        pickle.dumps(Plain(), 2),
        {f"{__name__}.Plain": None, "copyreg._reconstructor": None},
        where="x",
    )
    assert record.get("value") == 3
    assert record.get("other", 7) == 7


class Plain:
    def __init__(self) -> None:
        self.value = 3


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("inside", [False, True])
def test_code_is_refused_by_name_and_does_not_run(
    tmp_path: Path, protocol: int, inside: bool
) -> None:
    marker = tmp_path / "executed"
    value: Any = {"w": [1, Malicious(marker)]} if inside else Malicious(marker)
    with pytest.raises(
        CheckpointError, match=r"file.pt: cannot be read safely: it refers to 'posix.mkdir'"
    ):
        load_data(pickle.dumps(value, protocol), {"collections.OrderedDict": None}, where="file.pt")
    assert not marker.exists()
    pickle.loads(pickle.dumps(value, protocol))
    assert marker.exists(), "the pickle of this test does what it claims"


def test_a_prefix_allows_inert_names_only() -> None:
    data = pickle.dumps(collections.Counter("ab"), 2)
    with pytest.raises(CheckpointError, match=r"refers to 'collections\.Counter'"):
        load_data(data, {}, where="x", allowed_prefixes=("torch.",))
    found = load_data(data, {}, where="x", allowed_prefixes=("collections.",))
    assert isinstance(found, Record)


BOMBS = {
    "text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes of eight exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b".",
    "a byte array of eight exabytes": b"\x80\x05\x96" + struct.pack("<Q", 2**63 - 1) + b".",
    "a number of a billion bits": b"\x80\x02\x8b" + struct.pack("<i", 2**27) + bytes(64) + b".",
    "a number in text": b"I" + b"9" * 10000 + b"\n.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
    "an unknown opcode": b"\x80\x02\xff.",
    "marks only": b"(" * 1000 + b"t" * 1001 + b".",
    "items without a dictionary": b"\x80\x02N(NNu.",
    "a list of no list": b"\x80\x02N(NNe.",
    "an odd number of items": b"\x80\x02}(Nu.",
    "a call of text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "state for a list": b"\x80\x02]Nb.",
    "outside data": b"\x80\x02NQ.",
    "a name that is not a string": b"\x80\x04NN\x93.",
    "text that is not UTF-8": b"\x80\x04\x8c\x02\xff\xfe.",
    "a memo that is not there": b"\x80\x02h\x07.",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_a_malformed_pickle_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(
        CheckpointError, match=r"x: its pickle is damaged \(.+\); write or copy the file again"
    ):
        load_data(data, {}, where="x")


def repeated(prepare: bytes, again: bytes, count: int) -> bytes:
    return b"\x80\x02" + prepare + again * count + b"."


LONG_TUPLE = b"(" + b"N" * 100_000 + b"tq\x01"
SLOW = {
    "hashing a long tuple again and again": (b"}q\x00" + LONG_TUPLE + b"0", b"h\x01Ns"),
    "a call with many arguments": (b"ca\nb\nq\x00" + LONG_TUPLE + b"0", b"h\x00h\x01R0"),
    "tuples in tuples as a key": (b"}N" + b"\x85" * 200_000, b"Ns"),
    "colliding large numbers as keys": (b"}", b"\x8a\x10" + bytes(15) + b"\x40Ns"),
}


@pytest.mark.parametrize(("prepare", "again"), SLOW.values(), ids=SLOW.keys())
def test_no_small_pickle_takes_quadratic_time_or_the_stack(prepare: bytes, again: bytes) -> None:
    """Each of these takes minutes, or the process, in an unpickler that hashes or spreads what it
    is given.
    """
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="its pickle is damaged"):
        load_data(repeated(prepare, again, 100_000), {"a.b": None}, where="x")
    assert time.monotonic() - began < 30


def test_deep_nesting_neither_crashes_nor_fills_memory() -> None:
    code = """
import resource
from relexkit.checkpoints.torchfile.safe_pickle import load_data
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
value = load_data(b"\\x80\\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", {}, where="x")
assert isinstance(value, list)
value = load_data(b"\\x80\\x02N" + b"\\x85" * 300_000 + b".", {}, where="x")
del value
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_memo_index_of_four_billion_takes_no_memory() -> None:
    """The C unpickler grows an array up to the index."""
    assert load_data(b"\x80\x02Nr\xff\xff\xff\xff.", {}, where="x") is None


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        load_data(b"\x80\x02" + data, {}, where="x")


@given(trees, st.data())
def test_any_mutation_of_a_real_pickle_is_read_or_refused(tree: Any, draw: st.DataObject) -> None:
    data = bytearray(pickle.dumps(tree, 4))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        load_data(bytes(data), {}, where="x")
