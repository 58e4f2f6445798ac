"""Readers of what trainers write: one module per format behind one small protocol, and detection.

A *run* is a folder with one checkpoint per recorded step; a *checkpoint* is one set of weights. To
add a format, add a line to the table in ``formats``.
"""

from __future__ import annotations

from pathlib import Path

from relexkit.checkpoints.protocol import Checkpoint, Run
from relexkit.checkpoints.runs import FolderRun, best_checkpoint, hub_hint, read_step_map
from relexkit.errors import CheckpointError

__all__ = ["Checkpoint", "Run", "open_checkpoint", "open_run"]


def open_run(source: Path, *, source_format: str | None = None, step_map: str | None = None) -> Run:
    """A folder of checkpoints in any format that is known; where several lie side by side, the most
    precise one.

    Args:
        source_format: name of the format to take (``formats.FORMATS``).
        step_map: optimizer steps per label, or a JSON file ``{label: step}``, for folders that are
            not numbered by optimizer steps.

    Reads the headers of every checkpoint.

    Raises:
        CheckpointError: no folder, no steps, none of them whole, or two folders for the same step.
    """
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no such folder; expected one with a sub-folder for each"
            f" step{hub_hint(source)}"
        )
    return FolderRun(source, source_format, None if step_map is None else read_step_map(step_map))


def open_checkpoint(folder: Path, *, source_format: str | None = None) -> Checkpoint:
    """Open a single checkpoint folder (a base model, or the input of ``relexkit round``), the most
    precise one in it.
    """
    return best_checkpoint(folder, source_format)
