"""relexkit: trajectory stores, spectra and extrapolated checkpoints for reinforcement-learning runs
of language models.

    import relexkit as rk

    run = rk.import_checkpoints("run/checkpoints", "run.zarr", base="base").store
    rk.spectrum(run, scope="module").to_frame()
    rk.advise(run)
    rk.extrapolate(run, [500, 1000], "predicted", rk.Prediction(until=50))

Every command is a function of the same name (``import`` is ``import_checkpoints``) that takes a
path or an open store. What is not in ``__all__`` may change freely.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from relexkit.hooks import register_opener

if TYPE_CHECKING:
    from relexkit.assess.advice import Advice
    from relexkit.assess.backtest import Backtest
    from relexkit.assess.jump_decision import FixedJumps, Jumps
    from relexkit.assess.observed import Observed
    from relexkit.calls.actions import (
        apply,
        apply_step,
        checkout,
        extrapolate,
        info,
        mergekit_config,
        project,
        verify,
    )
    from relexkit.calls.questions import (
        advise,
        backtest,
        compare_directions,
        directions,
        forecast,
        gram,
        linearity,
        observe,
        predict_weights,
        spectrum,
        update_cosines,
    )
    from relexkit.calls.source import OpenRun
    from relexkit.calls.source import open_run as open
    from relexkit.errors import CheckpointError, ExtrapolationError, RelexkitError, StoreError
    from relexkit.geometry.linearity import Linearity
    from relexkit.geometry.spectrum import Spectrum
    from relexkit.gram_matrix import Gram
    from relexkit.gram_matrix.compute.settings import Compute
    from relexkit.ingest.importer import import_checkpoints
    from relexkit.ingest.watch import watch
    from relexkit.materialize import Output, WeightSync
    from relexkit.materialize import round_checkpoint as round
    from relexkit.materialize.directions import Directions
    from relexkit.materialize.sharing import push
    from relexkit.predict.extrapolators import METHODS
    from relexkit.predict.fits import Options
    from relexkit.predict.prediction import Extrapolator, Prediction
    from relexkit.record.recorder import Recorder
    from relexkit.results import Result, Table
    from relexkit.store import TrajectoryStore
    from relexkit.version import __version__

    demo: Callable[..., Any]
    evaluate: Callable[..., Any]
    g2d: Callable[..., Any]
    probe: Callable[..., Any]
    report: Callable[..., Any]
    sweep: Callable[..., Any]
    tokens: Callable[..., Any]
    train: Callable[..., Any]

_HOMES = {
    "Advice": "relexkit.assess.advice",
    "Backtest": "relexkit.assess.backtest",
    "CheckpointError": "relexkit.errors",
    "Compute": "relexkit.gram_matrix.compute.settings",
    "Directions": "relexkit.materialize.directions",
    "ExtrapolationError": "relexkit.errors",
    "Extrapolator": "relexkit.predict.prediction",
    "FixedJumps": "relexkit.assess.jump_decision",
    "Gram": "relexkit.gram_matrix",
    "Jumps": "relexkit.assess.jump_decision",
    "Linearity": "relexkit.geometry.linearity",
    "METHODS": "relexkit.predict.extrapolators",
    "Observed": "relexkit.assess.observed",
    "OpenRun": "relexkit.calls.source",
    "Options": "relexkit.predict.fits",
    "Output": "relexkit.materialize",
    "Prediction": "relexkit.predict.prediction",
    "Recorder": "relexkit.record.recorder",
    "RelexkitError": "relexkit.errors",
    "Result": "relexkit.results",
    "Spectrum": "relexkit.geometry.spectrum",
    "StoreError": "relexkit.errors",
    "Table": "relexkit.results",
    "TrajectoryStore": "relexkit.store",
    "WeightSync": "relexkit.materialize",
    "__version__": "relexkit.version",
    "advise": "relexkit.calls.questions",
    "apply": "relexkit.calls.actions",
    "apply_step": "relexkit.calls.actions",
    "backtest": "relexkit.calls.questions",
    "checkout": "relexkit.calls.actions",
    "compare_directions": "relexkit.calls.questions",
    "directions": "relexkit.calls.questions",
    "extrapolate": "relexkit.calls.actions",
    "forecast": "relexkit.calls.questions",
    "gram": "relexkit.calls.questions",
    "import_checkpoints": "relexkit.ingest.importer",
    "info": "relexkit.calls.actions",
    "linearity": "relexkit.calls.questions",
    "mergekit_config": "relexkit.calls.actions",
    "observe": "relexkit.calls.questions",
    "open": "relexkit.calls.source:open_run",
    "predict_weights": "relexkit.calls.questions",
    "project": "relexkit.calls.actions",
    "push": "relexkit.materialize.sharing",
    "round": "relexkit.materialize:round_checkpoint",
    "spectrum": "relexkit.calls.questions",
    "update_cosines": "relexkit.calls.questions",
    "verify": "relexkit.calls.actions",
    "watch": "relexkit.ingest.watch",
}
"""Where each public name lives, as ``module`` or ``module:name there``. It is loaded when it is
first asked for: the command answers a signal, and says its help, before a second of imports.
Commands of the packages on top come from their table of commands.
"""

__all__ = [
    "METHODS",
    "Advice",
    "Backtest",
    "CheckpointError",
    "Compute",
    "Directions",
    "ExtrapolationError",
    "Extrapolator",
    "FixedJumps",
    "Gram",
    "Jumps",
    "Linearity",
    "Observed",
    "OpenRun",
    "Options",
    "Output",
    "Prediction",
    "Recorder",
    "RelexkitError",
    "Result",
    "Spectrum",
    "StoreError",
    "Table",
    "TrajectoryStore",
    "WeightSync",
    "__version__",
    "advise",
    "apply",
    "apply_step",
    "backtest",
    "checkout",
    "compare_directions",
    "demo",
    "directions",
    "evaluate",
    "extrapolate",
    "forecast",
    "g2d",
    "gram",
    "import_checkpoints",
    "info",
    "linearity",
    "mergekit_config",
    "observe",
    "open",
    "predict_weights",
    "probe",
    "project",
    "push",
    "report",
    "round",
    "spectrum",
    "sweep",
    "tokens",
    "train",
    "update_cosines",
    "verify",
    "watch",
]

register_opener("relexkit.checkpoints.referenced:open_base")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, other = _HOMES[name].partition(":")
        value = getattr(import_module(module), other or name)
    elif name.startswith("_"):
        raise AttributeError(f"module 'relexkit' has no attribute {name!r}")
    else:
        from relexkit.registry import function_of  # the command answers signals before this

        try:
            value = function_of(name)
        except KeyError:
            raise AttributeError(f"module 'relexkit' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
