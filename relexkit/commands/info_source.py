"""``relexkit info`` of checkpoints, before they are imported: what they are, and what an import
would take.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from relexkit.checkpoints import open_checkpoint, open_run
from relexkit.checkpoints.formats.hub import Hub, HubRun, is_hub
from relexkit.checkpoints.formats.table import FORMATS
from relexkit.checkpoints.formats.weight_sync import DeltaFiles
from relexkit.checkpoints.runs import has_steps, main_dtype
from relexkit.checkpoints.version_run import find_versions
from relexkit.commands.console import print_json, print_pairs, size_text
from relexkit.errors import CheckpointError
from relexkit.store.opening import store_inside

_SHOWN = 20


def print_source(path: str, as_json: bool) -> None:
    """Print format, precision, steps and what would be left out, for a folder of steps or a single
    checkpoint; of a hub repository, its steps.

    Raises:
        CheckpointError: it is none of these.
    """
    document = _describe_hub(path) if is_hub(path) else _describe(path)
    if as_json:
        print_json(document)
        return
    rows = [("format", ", ".join(document[k] for k in ("format", "dtype") if k in document))]
    if "steps" in document:
        from relexkit.store import describe_steps

        rows.append(("steps", describe_steps(np.asarray(document["steps"]))))
    if "num_tensors" in document:
        size, tensors = size_text(document["checkpoint_bytes"]), document["num_tensors"]
        if document["num_elements"] is None:
            rows.append(("the first", f"changes {tensors} tensors, {size} compressed"))
        else:
            count = document["num_elements"]
            rows.append(("each", f"{count:,} elements in {tensors} tensors, {size}"))
    rows += [("note", note) for note in document.get("notes", [])]
    left_out = list(document.get("left_out", {}).items())
    rows += [("left out", f"{what}: {reason}") for what, reason in left_out[:_SHOWN]]
    if len(left_out) > _SHOWN:
        rows.append(("left out", f"and {len(left_out) - _SHOWN} more (--json lists them)"))
    print_pairs(path, rows)


def _describe_hub(source: str) -> dict[str, Any]:
    """Asks for the names of branches and tags; downloads nothing."""
    with tempfile.TemporaryDirectory() as scratch, closing(Hub(Path(scratch) / "hub")) as hub:
        run = HubRun(source, hub)
    return {
        "path": source,
        "format": run.description,
        "steps": run.steps,
        "notes": ["nothing was downloaded; `relexkit import` takes one step at a time"],
        "left_out": run.left_out,
    }


def _describe(path: str) -> dict[str, Any]:
    is_url = "://" in path
    if not is_url and not Path(path).is_dir():
        raise CheckpointError(
            f"{path}: no such store or folder; expected a trajectory store, a run's folder or a"
            " checkpoint"
        )
    document: dict[str, Any] = {"path": path}
    if is_url or find_versions(path) or has_steps(Path(path)):
        run = open_run(path)
        document |= {
            "format": run.description,
            "steps": run.steps,
            "notes": run.notes,
            "left_out": run.left_out,
        }
        checkpoint = run.checkpoint(run.steps[0])
    else:
        if not any(f.find(Path(path)) for f in FORMATS):
            raise CheckpointError(
                f"{path}: is not a trajectory store, and holds neither folders of steps nor a"
                f" checkpoint{store_inside(str(path))}"
            )
        checkpoint = open_checkpoint(Path(path))
        document["format"] = checkpoint.description
    with closing(checkpoint):
        infos = checkpoint.tensors.values()
        inner = getattr(checkpoint, "inner", checkpoint)
        deltas = inner.deltas.values() if isinstance(inner, DeltaFiles) else ()
        kinds = sorted({f"{d.encoding} deltas with {d.algorithm} checksums" for d in deltas})
        is_whole = not isinstance(inner, DeltaFiles)
        return document | {
            "dtype": main_dtype(checkpoint) if is_whole else ", ".join(kinds) or "no changes",
            "num_tensors": len(infos),
            "num_elements": sum(info.numel for info in infos) if is_whole else None,
            "checkpoint_bytes": sum(info.num_bytes for info in infos),
        }
