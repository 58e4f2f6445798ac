"""Every rollout of a run: a folder with one Parquet file for each generation (and process),
readable as one table.

A file is written under another name and renamed, so a kill leaves whole files only.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from relexkit import RelexkitError
from relexkit.extension import write_file

if TYPE_CHECKING:
    import pyarrow

_NAME = re.compile(r"step-(\d+)-process-(\d+)\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout.

    Attributes:
        step: the first optimizer step that learns from it.
        problem: the key of the problem in its task.
        prompt, text: what the model read and wrote, special tokens of the completion left out.
        prompt_ids, completion_ids: token numbers, the end-of-sequence token included.
        logprobs: of the completion tokens under the policy that sampled them, at its temperature.
        truncated: the length ran out before an end.
        right: the task's own reward is 1 or more.
        token_norms, token_weights: by token, where they were computed: ``|v|``
            (``trainer.credit.token_states``) and coefficients.
    """

    step: int
    problem: str
    prompt: str
    text: str
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    truncated: bool
    reward: float
    right: bool
    advantage: float
    token_norms: list[float] | None = None
    token_weights: list[float] | None = None


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        {
            "step": pa.int64(),
            "problem": pa.string(),
            "prompt": pa.string(),
            "text": pa.string(),
            "prompt_ids": pa.list_(pa.int32()),
            "completion_ids": pa.list_(pa.int32()),
            "logprobs": pa.list_(pa.float32()),
            "truncated": pa.bool_(),
            "reward": pa.float32(),
            "right": pa.bool_(),
            "advantage": pa.float32(),
            "token_norms": pa.list_(pa.float32()),
            "token_weights": pa.list_(pa.float32()),
        }
    )


def as_table(rollouts: Sequence[Rollout]) -> pyarrow.Table:
    """Rollouts as a table, a column for each field."""
    import pyarrow as pa

    schema = _schema()
    return pa.table(
        {name: [getattr(rollout, name) for rollout in rollouts] for name in schema.names},
        schema=schema,
    )


def write_step(folder: Path, step: int, rollouts: Sequence[Rollout], *, process: int = 0) -> Path:
    """Add the rollouts of the generation that ``step`` begins; replaces those of a former try."""
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}-process-{process}.parquet"
    content = io.BytesIO()
    parquet.write_table(as_table(rollouts), content, compression="zstd")
    write_file(path, content.getvalue())
    return path


def read_rollouts(
    folder: str | Path, *, columns: Sequence[str] | None = None, steps: Sequence[int] | None = None
) -> pyarrow.Table:
    """All rollouts, or those whose ``step`` is among ``steps``, in order of step and process, as
    one table.

    Raises:
        RelexkitError: the folder holds none, or a file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    paths = [path for step, path in _files(Path(folder)) if steps is None or step in set(steps)]
    if not paths:
        raise RelexkitError(
            f"{folder}: holds no rollouts{' of these steps' if steps else ''}; expected those of a"
            " training run"
        )
    try:
        return pa.concat_tables(
            [parquet.read_table(path, columns=columns and list(columns)) for path in paths]
        )
    except (OSError, ValueError) as error:
        raise RelexkitError(
            f"{folder}: a file of rollouts cannot be read ({error}); restore it from a copy"
        ) from error


def truncate_after(folder: Path, step: int) -> None:
    """Remove the rollouts of generations that begin after ``step``."""
    for begins, path in _files(folder):
        if begins > step:
            path.unlink()


def _files(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matched = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    ordered = sorted(matched, key=lambda pair: (int(pair[0][1]), int(pair[0][2])))
    return [(int(match[1]), path) for match, path in ordered]
