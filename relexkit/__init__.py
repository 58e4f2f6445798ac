"""relexkit: trajectory stores, spectra and extrapolated checkpoints for reinforcement-learning runs
of language models.

    from relexkit import Prediction, extrapolate, import_checkpoints, observe, spectrum

    store = import_checkpoints("run/checkpoints", "run.zarr", base="base").store
    table = spectrum(observe(store).gram, scope="module")
    extrapolate(store, [500, 1000], "predicted", Prediction(until=50))

What is not in ``__all__`` may change freely.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relexkit.assess.observed import Observed, observe
    from relexkit.errors import CheckpointError, ExtrapolationError, RelexkitError, StoreError
    from relexkit.geometry.spectrum import Spectrum, spectrum
    from relexkit.gram_matrix import Gram, gram
    from relexkit.gram_matrix.compute.settings import Compute
    from relexkit.ingest.importer import import_checkpoints
    from relexkit.materialize import (
        Output,
        WeightSync,
        apply,
        checkout,
        extrapolate,
        round_checkpoint,
    )
    from relexkit.predict.extrapolators import METHODS, predict_weights
    from relexkit.predict.fits import Options
    from relexkit.predict.prediction import Prediction
    from relexkit.record.recorder import Recorder
    from relexkit.store import TrajectoryStore
    from relexkit.version import __version__

_HOMES = {
    "Compute": "relexkit.gram_matrix.compute.settings",
    "Observed": "relexkit.assess.observed",
    "observe": "relexkit.assess.observed",
    "Output": "relexkit.materialize",
    "Prediction": "relexkit.predict.prediction",
    "METHODS": "relexkit.predict.extrapolators",
    "CheckpointError": "relexkit.errors",
    "ExtrapolationError": "relexkit.errors",
    "Gram": "relexkit.gram_matrix",
    "Options": "relexkit.predict.fits",
    "Recorder": "relexkit.record.recorder",
    "RelexkitError": "relexkit.errors",
    "Spectrum": "relexkit.geometry.spectrum",
    "StoreError": "relexkit.errors",
    "TrajectoryStore": "relexkit.store",
    "WeightSync": "relexkit.materialize",
    "__version__": "relexkit.version",
    "apply": "relexkit.materialize",
    "checkout": "relexkit.materialize",
    "extrapolate": "relexkit.materialize",
    "gram": "relexkit.gram_matrix",
    "import_checkpoints": "relexkit.ingest.importer",
    "predict_weights": "relexkit.predict.extrapolators",
    "round_checkpoint": "relexkit.materialize",
    "spectrum": "relexkit.geometry.spectrum",
}
"""Where each public name lives. It is loaded when it is first asked for: the command answers a
signal, and says its help, before a second of imports.
"""

__all__ = [
    "METHODS",
    "CheckpointError",
    "Compute",
    "ExtrapolationError",
    "Gram",
    "Observed",
    "Options",
    "Output",
    "Prediction",
    "Recorder",
    "RelexkitError",
    "Spectrum",
    "StoreError",
    "TrajectoryStore",
    "WeightSync",
    "__version__",
    "apply",
    "checkout",
    "extrapolate",
    "gram",
    "import_checkpoints",
    "observe",
    "predict_weights",
    "round_checkpoint",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'relexkit' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
