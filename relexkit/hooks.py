"""What an early room calls of a later one: registered by its name when the package is imported, and
loaded when it is called.
"""

from importlib import import_module
from typing import Any

_openers: list[str] = []


def register_opener(place: str) -> None:
    """Let ``open_checkpoint`` be the function that ``place`` names, as ``module:function``."""
    _openers[:] = [place]


def open_checkpoint(place: str) -> Any:
    """The ``relexkit.checkpoints.Checkpoint`` in a folder, or in a repository of the hub.

    Raises:
        CheckpointError: there is none.
    """
    module, _, function = _openers[0].partition(":")
    return getattr(import_module(module), function)(place)
