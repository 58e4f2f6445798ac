"""Where the metrics of a run go beside ``metrics.jsonl``: one class each, and ``LOGGERS``.

Of several processes only the first one has loggers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from relexkit import RelexkitError
from relexkit.trainer.config import GRPOConfig
from relexkit.trainer.loop.events import EventFile


class Logger(Protocol):
    """Takes the metrics of one step after the other."""

    def __init__(self, folder: Path, step: int, config: GRPOConfig):
        """Begin, or go on with, the log of the run in ``folder`` after ``step``."""

    def write(self, step: int, metrics: Mapping[str, float], advice: str | None) -> None:
        """Log a step; ``advice`` is a sentence."""

    def close(self) -> None:
        """Wait until everything is written."""


class TensorBoard:
    """Event files in ``events/`` of the run's folder."""

    def __init__(self, folder: Path, step: int, config: GRPOConfig):
        self._events = EventFile(folder / "events", step + 1 if step else None)

    def write(self, step: int, metrics: Mapping[str, float], advice: str | None) -> None:
        """Scalars, and the advice as text."""
        if advice is not None:
            self._events.text("advice", advice, step)
        for name, value in metrics.items():
            self._events.scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()


class Trackio:
    """A run named after the folder, in trackio's own place (``TRACKIO_DIR``) and the project
    ``TRACKIO_PROJECT`` or ``relexkit``.

    A resumed run continues it; steps that it has already are not logged twice.
    """

    def __init__(self, folder: Path, step: int, config: GRPOConfig):
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            import trackio

            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "relexkit"),
                name=folder.resolve().name,
                config=asdict(config),
                resume="allow" if step else "never",
                embed=False,
                auto_log_cpu=False,
            )
        self._next: int = getattr(self._run, "_next_step", 0)  # after what was logged before

    def write(self, step: int, metrics: Mapping[str, float], advice: str | None) -> None:
        """One row."""
        if step >= self._next:
            self._run.log({**metrics, **({} if advice is None else {"advice": advice})}, step=step)

    def close(self) -> None:
        """Wait for trackio's thread."""
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()


class WeightsAndBiases:
    """A run named after the folder, below ``wandb/`` in it, in the project ``WANDB_PROJECT`` or
    ``relexkit``; offline, for ``wandb sync``, unless ``WANDB_MODE`` says otherwise.

    A resumed run writes a further offline run with the same id, which ``wandb sync`` appends.
    """

    def __init__(self, folder: Path, step: int, config: GRPOConfig):
        import wandb

        kept = folder / "wandb" / "run-id"
        kept.parent.mkdir(exist_ok=True)
        if not kept.is_file():
            kept.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "relexkit"),
            name=folder.resolve().name,
            id=kept.read_text().strip(),
            dir=folder,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            resume="allow",
            config=asdict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, metrics: Mapping[str, float], advice: str | None) -> None:
        """One row of the history."""
        self._run.log({**metrics, **({} if advice is None else {"advice": advice})}, step=step)

    def close(self) -> None:
        """Wait for wandb's process."""
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}
"""By the names of ``report_to``; each needs the package of its name."""


def logger_names(report_to: str | Sequence[str]) -> list[str]:
    """The loggers that ``report_to`` asks for: ``none``, ``all`` (that are installed), a name, or
    several.

    Raises:
        RelexkitError: a name is unknown, or its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names == ["none"]:
        return []
    if names == ["all"]:
        return [name for name in LOGGERS if find_spec(name) is not None]
    for name in names:
        if name not in LOGGERS:
            raise RelexkitError(
                f"report_to: {name!r} is unknown; expected {', '.join(LOGGERS)}, several of them"
                " as a list, all, or none"
            )
        if find_spec(name) is None:
            raise RelexkitError(
                f"report_to: {name} is not installed; install relexkit[log], or leave it out"
            )
    return list(dict.fromkeys(names))
