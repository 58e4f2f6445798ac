"""The options by which commands that write checkpoints write weight-sync versions instead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from relexkit.errors import RelexkitError
from relexkit.options import option

if TYPE_CHECKING:
    from relexkit.materialize import WeightSync


@dataclass(frozen=True, kw_only=True)
class Sync:
    """``--as``, ``--against`` and ``--version``."""

    written_as: Literal["folder", "weight-sync"] = option("--as", default="folder")
    """a folder, or a version that an inference engine pulls"""
    against: str | None = option(default=None, metavar="BASE")
    """weight-sync: what the engine has, a folder or a recorded step (0: the base)"""
    version: int | None = None
    """weight-sync: number of the version (default: after the last in OUT, or 1)"""

    def chosen(self, *, adapter: bool) -> WeightSync | None:
        """What these options ask for beside ``--adapter``; None for folders.

        Raises:
            RelexkitError: they contradict one another.
        """
        from relexkit.materialize import WeightSync

        if self.written_as == "folder":
            if self.against is not None or self.version is not None:
                raise RelexkitError(
                    "--against and --version belong to --as weight-sync; add it or leave them out"
                )
            return None
        if adapter:
            raise RelexkitError("--as weight-sync holds whole weights; leave --adapter out")
        if self.against is None:
            raise RelexkitError(
                "--as weight-sync needs --against: the folder that the engine was started with, or"
                " the number of the recorded step that it has"
            )
        if Path(self.against).is_dir():
            return WeightSync(self.against, self.version)
        if not self.against.isdecimal():
            raise RelexkitError(
                f"--against {self.against} is neither a folder nor a step; expected one of them"
            )
        return WeightSync(int(self.against), self.version)
