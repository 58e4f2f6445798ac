"""Readers of what trainers write: one module per format behind one small protocol, and detection.

A *run* is a folder with one checkpoint per recorded step; a *checkpoint* is one set of weights. To
add a format, add a line to the table in ``formats``.
"""

from __future__ import annotations

from pathlib import Path

from relexkit.checkpoints.protocol import ChangingCheckpoint, Checkpoint, Run, SavedRun
from relexkit.checkpoints.runs import FolderRun, best_checkpoint, hub_hint, read_step_map
from relexkit.checkpoints.version_run import WeightSyncRun, find_versions
from relexkit.errors import CheckpointError
from relexkit.store import TrajectoryStore

__all__ = ["ChangingCheckpoint", "Checkpoint", "Run", "SavedRun", "open_checkpoint", "open_run"]


def open_run(
    source: str | Path,
    *,
    source_format: str | None = None,
    step_map: str | None = None,
    kept: TrajectoryStore | None = None,
    scratch: Path | None = None,
) -> SavedRun:
    """A folder of checkpoints in any format that is known; where several lie side by side, the most
    precise one. Of URLs only those of weight-sync versions.

    Args:
        source_format: name of the format to take (``formats.FORMATS``).
        step_map: optimizer steps per label, or a JSON file ``{label: step}``, for folders that are
            not numbered by optimizer steps.
        kept: a store of the run, from whose last step deltas may go on.
        scratch: folder for what has to be unpacked; the system's if not given.

    Reads the headers of every checkpoint.

    Raises:
        CheckpointError: no folder, no steps, none of them whole, or two folders for the same step.
    """
    label_step = None if step_map is None else read_step_map(step_map)
    is_url = "://" in str(source) and not str(source).startswith("hf://")
    if not is_url and not Path(source).is_dir():
        raise CheckpointError(
            f"{source}: no such folder; expected one with a sub-folder for each"
            f" step{hub_hint(source)}"
        )
    if is_url or (source_format in (None, "weight-sync") and find_versions(source)):
        return WeightSyncRun(source, label_step=label_step, kept=kept, scratch=scratch)
    return FolderRun(Path(source), source_format, label_step)


def open_checkpoint(folder: Path, *, source_format: str | None = None) -> Checkpoint:
    """Open a single checkpoint folder (a base model, or the input of ``relexkit round``), the most
    precise one in it.
    """
    return best_checkpoint(folder, source_format)
