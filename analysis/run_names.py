"""Short names of runs that tell them apart: file names alone do not, since most are `run.zarr`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from relexkit import RelexkitError

USUAL = "run.zarr"
"""What training and the examples call a store: its folder says which run it is."""


def name_runs(given: Sequence[str | Path]) -> dict[str, str]:
    """Paths by name, in their order; each of ``given`` is a path or address, or ``NAME=PATH``.

    A name is the end of the path, with as many of its folders as tell it from the others.

    Raises:
        RelexkitError: a run or a name is given twice.
    """
    pairs = [_split(str(text)) for text in given]
    places = [_place(path) for _, path in pairs]
    _refuse_twice("run", [path for _, path in pairs], places)
    lengths = [2 if place[-1] == USUAL else 1 for place in places]
    while True:
        names = [
            name or "/".join(place[-length:])
            for (name, _), place, length in zip(pairs, places, lengths, strict=True)
        ]
        count = Counter(names)
        short = [
            i
            for i, (name, _) in enumerate(pairs)
            if name is None and count[names[i]] > 1 and lengths[i] < len(places[i])
        ]
        if not short:
            break
        for i in short:
            lengths[i] += 1
    _refuse_twice("name", names, names)
    return {name: path for name, (_, path) in zip(names, pairs, strict=True)}


def _split(text: str) -> tuple[str | None, str]:
    name, equals, path = text.partition("=")
    if not (equals and name and path) or "/" in name or Path(text).exists():
        return None, text
    return name, path


def _place(path: str) -> tuple[str, ...]:
    """The parts of a path or an address, from its root."""
    whole = path if "://" in path else str(Path(path).resolve())
    return tuple(part for part in whole.split("/") if part)


def _refuse_twice(what: str, shown: Sequence[str], keys: Sequence[object]) -> None:
    for text, key in zip(shown, keys, strict=True):
        if keys.count(key) > 1:
            raise RelexkitError(
                f"{text}: the same {what} is given twice; give each run once, as PATH or NAME=PATH"
            )
