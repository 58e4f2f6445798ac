"""Pickled data read as data: an interpreter of the pickle opcodes that checkpoints use, which calls
nothing.

Python's unpickler looks functions up and calls them, and its C version can be made to allocate
without bound or to overflow the stack by a file of a few bytes. PyTorch's weights-only unpickler
needs the classes that it rebuilds to be importable. Here a global is a name and nothing else. A
name that the caller does not list is refused; a listed one becomes a ``Record`` of its arguments
and state, or what the caller's own plain function makes of the arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from relexkit.errors import CheckpointError

MAX_BYTES = 2**28
"""Largest pickle that is read; the description of a model takes a few hundred bytes a tensor and
rank.
"""
MAX_OPCODES = 2**25  # a million chunks in the description of a distributed checkpoint
MAX_INTEGER_BYTES = 17  # of a 128-bit state of a random generator
_MAX_ARGUMENTS = 64


class Global:
    """The name of a class or function in a pickle, never looked up."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any] | None = None):
        self.name = name
        self.build = build

    def __repr__(self) -> str:
        return f"Global({self.name})"


class Record:
    """An object of class ``kind`` as what it was pickled from: constructor arguments, then
    state.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]):
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the state, if the state is a dictionary of attributes."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"Record({self.kind})"


_KEYS = (str, bytes, int, float, type(None), Global, Record)


class _Mark:
    """Start of a sequence on the stack."""


class _BadPickle(Exception):
    """The pickle cannot be read; the text says why."""


_MALFORMED = (
    _BadPickle,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    struct.error,
)

Builders = Mapping[str, Callable[..., Any] | None]
"""Allowed global -> plain function of the pickled arguments, or None for a ``Record``."""


def load_data(
    data: bytes,
    allowed: Builders,
    *,
    where: str,
    allowed_prefixes: tuple[str, ...] = (),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The content of a pickle: built-in containers, scalars, ``Record`` and ``Global``, and what
    builders return.

    Time and memory are proportional to ``len(data)``. Sets come back as lists.

    Args:
        allowed: names (``module.name``) that may occur.
        allowed_prefixes: beginnings of names that may occur as a ``Record``.
        where: what is read, for messages.
        persistent: resolves persistent ids, such as the storages of tensors.

    Raises:
        CheckpointError: the pickle names anything else (the message names it), or it is damaged.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(
            f"{where}: its pickle has {len(data):,} bytes; expected at most {MAX_BYTES:,}"
        )
    try:
        return _Reader(data, allowed, allowed_prefixes, persistent).run()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except _MALFORMED as error:
        reason = str(error) if isinstance(error, _BadPickle) else "it is not well-formed"
        raise CheckpointError(
            f"{where}: its pickle is damaged ({reason}); write or copy the file again"
        ) from None


class _Reader:
    def __init__(
        self,
        data: bytes,
        allowed: Builders,
        prefixes: tuple[str, ...],
        persistent: Callable[[Any], Any] | None,
    ):
        self._data = data
        self._at = 0
        self._allowed = allowed
        self._prefixes = prefixes
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[str, Global] = {}

    def run(self) -> Any:
        data, size = self._data, len(self._data)
        for _ in range(MAX_OPCODES):
            if self._at >= size:
                raise _BadPickle("it ends early")
            opcode = data[self._at]
            self._at += 1
            if opcode == 0x2E:  # STOP
                return self._pop()
            step = _OPCODES.get(opcode)
            if step is None:
                raise _BadPickle(f"opcode {opcode:#04x} does not occur in checkpoints")
            step(self)
        raise _BadPickle(f"it has more than {MAX_OPCODES:,} opcodes")

    # -- bytes and stack --

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _BadPickle("it ends early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise _BadPickle("it ends early")
        text = self._data[self._at : end].decode()
        self._at = end + 1
        return text

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _Mark:
            raise _BadPickle("a mark stands where a value is expected")
        return value

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _Mark:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise _BadPickle("a mark is missing")

    def _tuple(self, count: int) -> None:
        stack = self._stack
        if len(stack) < count or any(stack[-i] is _Mark for i in range(1, count + 1)):
            raise _BadPickle("values are missing")
        stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]

    def _memoize(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # -- containers --

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise _BadPickle("values are added to something that is not a list")
        target.extend(values)

    def _set_items(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(flat) % 2:
            raise _BadPickle("items are set on something that is not a dictionary")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Tuples and large integers can be made to collide, or their hash to recurse without a
            # limit.
            if not isinstance(key, _KEYS) or (isinstance(key, int) and abs(key) >> 63):
                raise _BadPickle(f"a key is a {type(key).__name__}")
            target[key] = value

    # -- names and objects --

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _BadPickle("a name is not a string")
        full = f"{module}.{name}"
        reference = self._globals.get(full)
        if reference is None:
            if full not in self._allowed and not full.startswith(self._prefixes or ("\0",)):
                raise CheckpointError(
                    f"cannot be read safely: it refers to {full[:200]!r}, which no checkpoint"
                    " needs; nothing was executed. Do not load the file with other tools unless"
                    " you trust where it comes from"
                )
            reference = self._globals[full] = Global(full, self._allowed.get(full))
        self._stack.append(reference)

    def _call(self, target: Any, arguments: Any) -> None:
        if (
            not isinstance(target, Global)
            or not isinstance(arguments, tuple)
            or len(arguments) > _MAX_ARGUMENTS
        ):
            raise _BadPickle("it calls something that is not a name")
        made = Record(target.name, arguments) if target.build is None else target.build(*arguments)
        self._stack.append(made)

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(
            target, dict
        ):  # a dictionary's attributes (`_metadata` of a state_dict) are not needed
            raise _BadPickle("state is set on something that has none")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise _BadPickle("it refers to data outside of it")
        self._stack.append(self._persistent(self._pop()))


def _text(reader: _Reader, width: int) -> None:
    reader.push(reader.take(reader.number(width)).decode("utf-8", "surrogatepass"))


def _bytes(reader: _Reader, width: int) -> None:
    reader.push(reader.take(reader.number(width)))


def _integer(reader: _Reader, width: int) -> None:
    count = reader.number(width)
    if count > MAX_INTEGER_BYTES:
        raise _BadPickle("it holds an absurdly large number")
    reader.push(int.from_bytes(reader.take(count), "little", signed=True))


def _call_with_keywords(reader: _Reader) -> None:
    keywords, arguments = reader._pop(), reader._pop()
    if keywords:
        raise _BadPickle("it makes an object with keyword arguments")
    reader._call(reader._pop(), arguments)


def _stack_global(reader: _Reader) -> None:
    name = reader._pop()
    reader._global(reader._pop(), name)


def _reduce(reader: _Reader) -> None:
    arguments = reader._pop()
    reader._call(reader._pop(), arguments)


def _set_item(reader: _Reader) -> None:
    value = reader._pop()
    reader._set_items([reader._pop(), value])


def _dictionary(reader: _Reader) -> None:
    flat = reader._pop_to_mark()
    reader.push({})
    reader._set_items(flat)


_OPCODES: dict[int, Callable[[_Reader], None]] = {
    ord(code): step
    for code, step in {
        "\x80": lambda r: r.take(1),  # PROTO
        "\x95": lambda r: r.take(8),  # FRAME
        "(": lambda r: r.push(_Mark),
        "0": lambda r: r._stack.pop(),
        "1": lambda r: r._pop_to_mark(),
        "2": lambda r: r.push(r._stack[-1]),
        "N": lambda r: r.push(None),
        "\x88": lambda r: r.push(True),
        "\x89": lambda r: r.push(False),
        "J": lambda r: r.push(int.from_bytes(r.take(4), "little", signed=True)),
        "K": lambda r: r.push(r.number(1)),
        "M": lambda r: r.push(r.number(2)),
        "\x8a": lambda r: _integer(r, 1),
        "\x8b": lambda r: _integer(r, 4),
        "G": lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
        "\x8c": lambda r: _text(r, 1),
        "X": lambda r: _text(r, 4),
        "\x8d": lambda r: _text(r, 8),
        "C": lambda r: _bytes(r, 1),
        "B": lambda r: _bytes(r, 4),
        "\x8e": lambda r: _bytes(r, 8),
        "}": lambda r: r.push({}),
        "]": lambda r: r.push([]),
        "\x8f": lambda r: r.push([]),  # EMPTY_SET
        ")": lambda r: r.push(()),
        "\x85": lambda r: r._tuple(1),
        "\x86": lambda r: r._tuple(2),
        "\x87": lambda r: r._tuple(3),
        "t": lambda r: r.push(tuple(r._pop_to_mark())),
        "l": lambda r: r.push(r._pop_to_mark()),
        "\x91": lambda r: r.push(r._pop_to_mark()),  # FROZENSET
        "d": _dictionary,
        "a": lambda r: r._append([r._pop()]),
        "e": lambda r: r._append(r._pop_to_mark()),
        "\x90": lambda r: r._append(r._pop_to_mark()),  # ADDITEMS
        "s": _set_item,
        "u": lambda r: r._set_items(r._pop_to_mark()),
        "c": lambda r: r._global(r.line(), r.line()),
        "\x93": _stack_global,
        "R": _reduce,
        "\x81": _reduce,  # NEWOBJ
        "\x92": _call_with_keywords,
        "b": lambda r: r._build(),
        "Q": lambda r: r._persistent_id(),
        "q": lambda r: r._memoize(r.number(1)),
        "r": lambda r: r._memoize(r.number(4)),
        "\x94": lambda r: r._memoize(len(r._memo)),
        "h": lambda r: r.push(r._memo[r.number(1)]),
        "j": lambda r: r.push(r._memo[r.number(4)]),
    }.items()
}
