"""One file a step in one folder, as nanochat writes it: ``model_000060.pt``, a state dict, beside
``meta_000060.json`` and the optimizer's files, which are not read.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from relexkit.checkpoints.formats.huggingface import TorchFiles
from relexkit.checkpoints.formats.key_names import model_names
from relexkit.checkpoints.small_files import read_small
from relexkit.checkpoints.view import CheckpointView
from relexkit.errors import CheckpointError

STEP_FILE = re.compile(r"model_(\d{6,15})\.pt")


def find(path: Path) -> Path | None:
    """The file, if it is one of these."""
    return path if path.is_file() and STEP_FILE.fullmatch(path.name) else None


class _File(TorchFiles):
    def __init__(self, path: Path):
        super().__init__({path: None})
        self.description = f"state dict {path}"
        self._meta = path.with_name(path.name.replace("model_", "meta_").replace(".pt", ".json"))

    def files(self) -> dict[str, bytes]:
        """Nothing: there is no configuration that Hugging Face's libraries know."""
        return {}

    def metrics(self) -> dict[str, float]:
        """The numbers in the file beside."""
        if not self._meta.is_file():
            return {}
        try:
            content = json.loads(read_small(self._meta))
            return {
                key: float(value)
                for key, value in content.items()
                if type(value) in (int, float) and math.isfinite(value) and key != "step"
            }
        except (CheckpointError, ValueError, AttributeError, RecursionError, OverflowError):
            return {}


class FlatFile(CheckpointView):
    """One state dict under the model's names; see ``relexkit.checkpoints.Checkpoint``."""

    def __init__(self, path: Path):
        file = _File(path)
        super().__init__(
            file, stored={name: key for key, name in model_names(file.tensors).items()}
        )
