"""Hugging Face folders: what ``save_pretrained``, Trainer and TRL write, and verl's exports.

The weights lie in ``actor/huggingface/``, ``huggingface/`` or the folder itself, as safetensors
(one file or shards with an index) or as ``pytorch_model.bin``. A folder with a configuration only,
as verl writes beside its shards, is not a checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from relexkit.checkpoints.formats.key_names import renamed
from relexkit.checkpoints.protocol import WholeTensors
from relexkit.checkpoints.small_files import model_files, read_small
from relexkit.checkpoints.torchfile.regions import PiecewiseTensor, PiecewiseTensors, ReadOnlyFile
from relexkit.checkpoints.torchfile.torch_files import StoredTensor, TorchFile, tensors_in
from relexkit.errors import CheckpointError
from relexkit.weights.safetensors_io import SafetensorsFile, TensorInfo

_INSIDE = (
    "actor/huggingface",
    "huggingface",
    ".",
    "policy/weights/model/consolidated",  # NeMo-RL
)

_INFO = "training_info.json"
_SAFE_INDEX, _SAFE = "model.safetensors.index.json", "model.safetensors"
_BIN_INDEX, _BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
_FSDP_BIN = "pytorch_model_fsdp.bin"  # accelerate's FULL_STATE_DICT
_WEIGHTS = (
    _SAFE,
    _SAFE_INDEX,
    _BIN,
    _BIN_INDEX,
    _FSDP_BIN,
)  # the order in which transformers looks, then accelerate's


def trainer_metrics(folder: Path) -> dict[str, float]:
    """The last entries of ``trainer_state.json`` for its own step, as Trainer and TRL write it, or
    the numbers of NeMo-RL's ``training_info.json``, which lies above the weights; nothing if there
    is neither.
    """
    path = folder / "trainer_state.json"
    places = (folder, *folder.parents[:4])
    info = next((p / _INFO for p in places if (p / _INFO).is_file()), None)
    try:
        if path.is_file():
            state = json.loads(read_small(path))
            entries = [e for e in state["log_history"] if e.get("step") == state["global_step"]]
        elif info is not None:
            entries = [json.loads(read_small(info))]
        else:
            return {}
        numbers = {
            key: float(value)
            for entry in entries
            for key, value in entry.items()
            if key not in ("step", "epoch") and isinstance(value, int | float)
        }
    except (
        CheckpointError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ):
        return {}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


class HuggingFaceCheckpoint(WholeTensors):
    """One folder with weights. Opening reads headers only; see
    ``relexkit.checkpoints.Checkpoint``.
    """

    def __init__(self, folder: Path):
        weights_folder = find(folder)
        if weights_folder is None:
            raise CheckpointError(
                f"{folder}: holds no weights; expected {_SAFE}, {_BIN} or their index there, in"
                " huggingface/ or in actor/huggingface/"
            )
        self.folder = weights_folder
        self.description = f"Hugging Face folder {self.folder}"
        kind = next(name for name in _WEIGHTS if (self.folder / name).is_file())
        self._weights: SafetensorsFiles | TorchFiles
        if kind in (_SAFE_INDEX, _SAFE):
            self._weights = SafetensorsFiles(_files_of(self.folder, kind))
        else:
            self._weights = TorchFiles(_files_of(self.folder, kind))
        self.close = self._weights.close
        try:
            self._keys = renamed({key: key for key in self._weights.tensors}, str(self.folder))
        except BaseException:
            self.close()
            raise
        self.tensors = {name: self._weights.tensors[key] for name, key in self._keys.items()}

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``relexkit.checkpoints.Checkpoint``."""
        self._weights.read_into(self._keys[name], start, out)

    def files(self) -> dict[str, bytes]:
        """Configuration, tokenizer, generation configuration and chat template."""
        return model_files(self.folder)

    def metrics(self) -> dict[str, float]:
        """See ``trainer_metrics``."""
        return trainer_metrics(self.folder)


def find(folder: Path) -> Path | None:
    """The folder with the weights, in or below a step's folder."""
    for inside in _INSIDE:
        if any((folder / inside / name).is_file() for name in _WEIGHTS):
            return folder / inside
    return None


def _files_of(folder: Path, kind: str) -> dict[Path, list[str] | None]:
    """Weight files with the tensors that the index takes from each (None: all)."""
    if kind in (_SAFE, _BIN, _FSDP_BIN):
        return {folder / kind: None}
    path = folder / kind
    try:
        index = json.loads(read_small(path))
        if "delta_encoding" in (index.get("metadata") or {}):
            raise CheckpointError(
                f"{folder}: holds weight-sync deltas, which mean nothing without the versions"
                f" before; give the folder of all versions, {folder.parent}"
            )
        weight_map = index["weight_map"]
        by_file: dict[str, list[str]] = {}
        for tensor, file in weight_map.items():
            by_file.setdefault(str(file), []).append(str(tensor))
        if not by_file:
            raise ValueError("it names no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is not a valid index ({error}); write or download it again"
        ) from None
    for file in by_file:
        if Path(file).name != file:
            raise CheckpointError(
                f"{path}: names the file {file!r}; expected a plain file name in the same folder"
            )
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{path}: names {file}, which does not exist; the checkpoint is incomplete"
            )
    return {folder / file: tensors for file, tensors in by_file.items()}


class SafetensorsFiles:
    """The tensors of one or several safetensors files."""

    def __init__(self, files: dict[Path, list[str] | None]):
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        self._open: list[SafetensorsFile] = []
        try:
            for path, wanted in files.items():
                file = SafetensorsFile(path)
                self._open.append(file)
                for name in wanted or file.tensors:
                    if name not in file.tensors:
                        raise CheckpointError(
                            f"{path}: tensor {name!r} is in the index but not in the file"
                        )
                for name in sorted(wanted or file.tensors, key=file.offset):
                    self.tensors[name] = file.tensors[name]
                    self._file_of[name] = file
        except BaseException:
            self.close()
            raise

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See ``SafetensorsFile.read_into``."""
        self._file_of[name].read_into(name, start, out)

    def close(self) -> None:
        """Close every file."""
        while self._open:
            self._open.pop().close()


class TorchFiles(PiecewiseTensors):
    """The tensors of ``pytorch_model.bin`` files."""

    def __init__(self, files: dict[Path, list[str] | None]):
        tensors: dict[str, PiecewiseTensor] = {}
        for path, wanted in files.items():
            file = TorchFile(ReadOnlyFile(path))
            try:
                state = dict(tensors_in(file.content))
                for name in wanted or state:
                    if name not in state:
                        raise CheckpointError(
                            f"tensor {name!r} is in the index but not in the file"
                        )
                    if not isinstance(state[name], StoredTensor):
                        raise CheckpointError(
                            f"tensor {name!r} is one rank's shard; expected whole tensors"
                        )
                    tensors[name] = file.whole(state[name])
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        super().__init__(tensors)

    def close(self) -> None:
        """Nothing is held open."""
