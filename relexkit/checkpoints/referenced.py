"""A base that a store refers to: said when the store is made, opened whenever it is read."""

from __future__ import annotations

import os
from pathlib import Path

from relexkit.checkpoints import open_checkpoint
from relexkit.checkpoints.formats.hub import in_cache, is_hub
from relexkit.checkpoints.protocol import Checkpoint
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import CheckpointError
from relexkit.store import Reference


def open_base(place: str, *, check: bool = False) -> Checkpoint:
    """The base in a folder, or ``hf://OWNER/NAME@REVISION`` in the cache of the hub's client, into
    which it is downloaded if it is not there.

    Args:
        check: compare what is there with the hub's hashes.

    Raises:
        CheckpointError: there is none.
    """
    if is_hub(place):
        return in_cache(place, check=check)
    if "://" in place:
        raise CheckpointError(
            f"{place}: a base is read from a folder or from the hub; copy it into a folder"
        )
    return open_checkpoint(Path(place))


def reference_to(opened: Checkpoint, words: str, base: Checkpoint) -> Reference:
    """What a store has to know of a base that ``open_base`` gave as ``opened``.

    Args:
        words: its folder, or repository and commit.
        base: the view of it that has the names of the store.
    """
    places = {name: (name, 0) for name in base.tensors}
    view = base
    while view is not opened:
        assert isinstance(view, CheckpointView), "a base is seen through views alone"
        for name, (inside, first) in places.items():
            deeper, further = view.place(inside)
            places[name] = deeper, first + further
        view = view.inner
    moved = {name: place for name, place in places.items() if place != (name, 0)}
    return Reference(place=words if is_hub(words) else os.path.abspath(words), tensors=moved)


def no_reference(source: str | Path) -> CheckpointError:
    """The error for a base that is a step of the run itself."""
    return CheckpointError(
        f"{source}: its step 0 is the base, and --base-by-reference needs one that stays when the"
        " run's checkpoints go; give a folder or hf://OWNER/NAME with --base, or leave"
        " --base-by-reference out"
    )
