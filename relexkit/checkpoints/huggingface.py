"""Hugging Face folders: what ``save_pretrained``, Trainer and TRL write, and verl's exports.

A step is a sub-folder ``checkpoint-N``, ``global_step_N``, ``step_N`` or ``step-N``; its weights lie in
``actor/huggingface/``, ``huggingface/`` or the folder itself, as safetensors (one file or shards with an index) or as
``pytorch_model.bin``, which is read with PyTorch's weights-only unpickler, never with code execution.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np

from relexkit.dtypes import FLOAT_DTYPES
from relexkit.errors import CheckpointError
from relexkit.safetensors_io import ITEM_BYTES, SafetensorsFile, TensorInfo

_STEP = re.compile(r"(?:checkpoint-|global_step_?|step_|step-)(\d+)")
_INSIDE = ("actor/huggingface", "huggingface", ".")

_SAFE_INDEX, _SAFE = "model.safetensors.index.json", "model.safetensors"
_BIN_INDEX, _BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
_WEIGHTS = (_SAFE, _SAFE_INDEX, _BIN, _BIN_INDEX)  # the order in which transformers looks

_MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config"
    r"|video_preprocessor_config|processor_config|tekken|chat_template)\.(json|jinja|txt|model)|merges\.txt|.*\.tiktoken|spiece\.model|sentencepiece.*\.model"
)


class HuggingFaceCheckpoint:
    """One folder with weights. Opening reads headers only; see ``relexkit.checkpoints.Checkpoint``."""

    def __init__(self, folder: Path):
        self.folder = _weights_folder(folder)
        self.description = f"Hugging Face folder {self.folder}"
        kind = next(name for name in _WEIGHTS if (self.folder / name).is_file())
        self._weights: SafetensorsFiles | TorchFiles
        if kind in (_SAFE_INDEX, _SAFE):
            self._weights = SafetensorsFiles(_files_of(self.folder, kind))
        else:
            self._weights = TorchFiles(_files_of(self.folder, kind))
        self.tensors = self._weights.tensors
        self.read_into = self._weights.read_into
        self.close = self._weights.close

    def files(self) -> dict[str, bytes]:
        """Configuration, tokenizer, generation configuration and chat template."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.folder.iterdir())
            if path.is_file() and _MODEL_FILES.fullmatch(path.name)
        }

    def metrics(self) -> dict[str, float]:
        """The last entry of ``trainer_state.json`` for its own step (Trainer and TRL write one beside the weights)."""
        path = self.folder / "trainer_state.json"
        if not path.is_file():
            return {}
        try:
            state = json.loads(path.read_text())
            entries = [e for e in state["log_history"] if e.get("step") == state["global_step"]]
            merged = {key: value for entry in entries for key, value in entry.items() if key not in ("step", "epoch")}
            numbers = {key: float(value) for key, value in merged.items() if isinstance(value, int | float)}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return {}
        return {key: value for key, value in numbers.items() if math.isfinite(value)}


class HuggingFaceRun:
    """A folder of step folders; see ``relexkit.checkpoints.Run``."""

    def __init__(self, source: Path, folders: dict[int, Path]):
        self.description = f"Hugging Face folders in {source.name}"
        self.steps = sorted(folders)
        self._folders = folders

    def checkpoint(self, step: int) -> HuggingFaceCheckpoint:
        """Open one step.

        Raises:
            CheckpointError: the folder holds no weights, or they are damaged; the message names the step.
        """
        try:
            return HuggingFaceCheckpoint(self._folders[step])
        except CheckpointError as error:
            raise CheckpointError(f"step {step}: {error}") from None


def detect(source: Path) -> HuggingFaceRun | None:
    """The run in ``source`` if it has step folders, else None."""
    folders: dict[int, Path] = {}
    for path in sorted(source.iterdir()):
        match = _STEP.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        step = int(match.group(1))
        if step in folders:
            raise CheckpointError(
                f"step {step} occurs twice in {source}: {folders[step].name} and {path.name}; remove or rename one"
            )
        folders[step] = path
    return HuggingFaceRun(source, folders) if folders else None


def _weights_folder(folder: Path) -> Path:
    for inside in _INSIDE:
        candidate = folder / inside
        if any((candidate / name).is_file() for name in _WEIGHTS):
            return candidate
    raise CheckpointError(
        f"{folder}: holds no weights; expected {_SAFE}, {_BIN} or their index there, in huggingface/ or in actor/huggingface/"
    )


def _files_of(folder: Path, kind: str) -> dict[Path, list[str] | None]:
    """Weight files with the tensors that the index takes from each (None: all)."""
    if kind in (_SAFE, _BIN):
        return {folder / kind: None}
    path = folder / kind
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        by_file: dict[str, list[str]] = {}
        for tensor, file in weight_map.items():
            by_file.setdefault(str(file), []).append(str(tensor))
        if not by_file:
            raise ValueError("it names no tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a valid index ({error}); write or download it again") from None
    for file in by_file:
        if Path(file).name != file:
            raise CheckpointError(f"{path}: names the file {file!r}; expected a plain file name in the same folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{path}: names {file}, which does not exist; the checkpoint is incomplete")
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
                        raise CheckpointError(f"{path}: tensor {name!r} is in the index but not in the file")
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


class TorchFiles:
    """The tensors of ``pytorch_model.bin`` files, memory-mapped and read by PyTorch's weights-only unpickler."""

    def __init__(self, files: dict[Path, list[str] | None]):
        import torch

        names = {getattr(torch, name): name for name in ITEM_BYTES if hasattr(torch, name)}
        self.tensors: dict[str, TensorInfo] = {}
        self._flat: dict[str, np.ndarray] = {}
        for path, wanted in files.items():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # the unpickler and the zip reader raise many kinds
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise CheckpointError(f"{path}: cannot be read safely ({reason}); convert it to safetensors") from None
            if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
                raise CheckpointError(f"{path}: is not a dictionary of tensors; expected the weights of a model")
            for name in wanted or state:
                if name not in state:
                    raise CheckpointError(f"{path}: tensor {name!r} is in the index but not in the file")
                tensor = state[name].detach().contiguous()
                if tensor.dtype not in names:
                    raise CheckpointError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, which is not supported")
                self.tensors[name] = TensorInfo(tuple(tensor.shape), names[tensor.dtype])
                self._flat[name] = tensor.reshape(-1).view(torch.uint8).numpy()

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Copy raw bits out of the mapped file; see ``Checkpoint.read_into``."""
        item = out.itemsize if self.tensors[name].dtype in FLOAT_DTYPES else 1
        out.view(np.uint8)[:] = self._flat[name][start * item : start * item + out.nbytes]

    def close(self) -> None:
        """Unmap."""
        self._flat.clear()
