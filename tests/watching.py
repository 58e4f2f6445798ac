"""``watch`` with its settings as keywords."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from relexkit import TrajectoryStore
from relexkit.ingest import watch as module
from relexkit.ingest.reading import Reading


def watch(
    source: str | Path,
    out: str | Path,
    say: Callable[[str], None] = lambda message: None,
    **settings: Any,
) -> TrajectoryStore:
    """Fields of ``Watching`` go there, the others to ``Reading``."""
    names = {field.name for field in fields(module.Watching)}
    watching = {name: value for name, value in settings.items() if name in names}
    reading = {name: value for name, value in settings.items() if name not in names}
    return module.watch(source, out, Reading(**reading), module.Watching(**watching), say)
