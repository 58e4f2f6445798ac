"""relexkit: trajectory stores, spectra and extrapolated checkpoints for reinforcement-learning runs
of language models.

    from relexkit import Prediction, extrapolate, import_checkpoints, observe, spectrum

    store = import_checkpoints("run/checkpoints", "run.zarr", base="base").store
    table = spectrum(observe(store).gram, scope="module")
    extrapolate(store, [500, 1000], "predicted", Prediction(until=50))

What is not in ``__all__`` may change freely.
"""

from relexkit.assess.observed import Observed, observe
from relexkit.errors import CheckpointError, ExtrapolationError, RelexkitError, StoreError
from relexkit.geometry.spectrum import Spectrum, spectrum
from relexkit.gram_matrix import Gram, gram
from relexkit.gram_matrix.compute.settings import Compute
from relexkit.ingest.importer import import_checkpoints
from relexkit.materialize import Output, apply, checkout, extrapolate, round_checkpoint
from relexkit.predict.extrapolators import METHODS, predict_weights
from relexkit.predict.fits import Options
from relexkit.predict.prediction import Prediction
from relexkit.record.recorder import Recorder
from relexkit.store import TrajectoryStore
from relexkit.version import __version__

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
