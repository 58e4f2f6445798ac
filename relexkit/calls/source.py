"""A run as the calls accept it: a path, an open store, or what ``relexkit.open`` returns."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from relexkit.materialize.tensors import tensor_delta, tensor_weights
from relexkit.predict.asked import past_the_end
from relexkit.predict.prediction import Prediction
from relexkit.results import Result, frame_of
from relexkit.store import TrajectoryStore, describe_steps

if TYPE_CHECKING:
    import pandas

_P = ParamSpec("_P")
_R = TypeVar("_R")


class OpenRun(Result):
    """A run, opened for reading; what ``relexkit.open`` returns.

    Every function of relexkit that takes a run takes this too.

    Attributes:
        store: the trajectory store below.
        path: where it lies.
    """

    def __init__(self, store: TrajectoryStore):
        self.store = store
        self.path = store.path

    @property
    def steps(self) -> np.ndarray:
        """The recorded optimizer steps, ``int64 [T]``, ascending."""
        return self.store.steps

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every float tensor; of tied ones the one that is kept."""
        return {t.name: t.shape for t in self.store.layout.moving_tensors}

    @property
    def metrics(self) -> pandas.DataFrame:
        """What was logged, a row for each step; NaN where nothing was.

        Raises:
            RelexkitError: pandas is not installed; ``run.store.metrics()`` needs none.
        """
        frame = frame_of(self.store.metrics(), index=self.steps)
        frame.index.name = "step"
        return frame

    def delta(self, name: str, step: int) -> np.ndarray:
        """``theta_step - theta_0`` of a tensor, float32 in its shape; see ``tensor_delta``."""
        return tensor_delta(self.store, name, step)

    def weights(self, name: str, step: int) -> np.ndarray:
        """A tensor at a recorded step, 0 for the base, as float32 in its shape: what ``checkout``
        writes.
        """
        return tensor_weights(self.store, name, step)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each step, with what was logged."""
        logged = self.store.metrics()
        return [
            {"step": step} | {name: float(values[row]) for name, values in logged.items()}
            for row, step in enumerate(self.steps.tolist())
        ]

    def sentences(self) -> list[str]:
        """What it is."""
        kept = "bit for bit" if self.store.exact else f"{self.store.mantissa_bits} mantissa bits"
        return [
            f"{self.path}: {describe_steps(self.steps)}, {self.store.layout.num_parameters:,}"
            f" parameters in {len(self.tensors)} tensors, kept {kept}."
        ]


Source = str | PathLike[str] | TrajectoryStore | OpenRun
"""A path or URL of a store, an open one, or an open run."""


def open_run(source: Source) -> OpenRun:
    """Open a run: a few small reads, whatever the number of steps.

        run = relexkit.open("run.zarr")
        run.delta("model.layers.0.mlp.up_proj.weight", step=40)

    Raises:
        StoreError: there is no store, or one that this version cannot read.
    """
    return source if isinstance(source, OpenRun) else OpenRun(store_of(source))


def store_of(source: Source) -> TrajectoryStore:
    """The store of a run.

    Raises:
        StoreError: see ``open_run``.
    """
    if isinstance(source, OpenRun):
        return source.store
    return source if isinstance(source, TrajectoryStore) else TrajectoryStore(str(source))


def warn_past_the_end(steps: np.ndarray, until: int | None) -> None:
    """Warn, as the commands say it, if ``until`` is past the last of ``steps [T]``."""
    for line in past_the_end(steps, until):
        warnings.warn(line, stacklevel=3)


def of_run(
    function: Callable[Concatenate[TrajectoryStore, _P], _R],
) -> Callable[Concatenate[Source, _P], _R]:
    """The function of a store as one of whatever is accepted for a run."""

    @functools.wraps(function)
    def called(source: Source, /, *args: _P.args, **options: _P.kwargs) -> _R:
        store = store_of(source)
        until: Any = options.get("until")
        for prediction in (a for a in (*args, *options.values()) if isinstance(a, Prediction)):
            until = prediction.until
        warn_past_the_end(store.steps, until)
        return function(store, *args, **options)

    return called
