"""What ``trainer``, ``analysis`` and other packages may build on, beside ``relexkit`` itself.

A package joins the ``relexkit`` command by an entry point of the group ``relexkit.extensions`` that
names an ``Extension`` (``docs/architecture.md`` has an example). Everything else inside relexkit
may change freely.
"""

from relexkit.assess.advice import Advice, advise
from relexkit.assess.backtest import CHEAP, Backtest, backtest
from relexkit.assess.forecast import Forecast, forecast
from relexkit.assess.jump_decision import FixedJumps, JumpRule, Jumps
from relexkit.assess.metrics import informative_steps
from relexkit.assess.observed import Observed, observe
from relexkit.calls.source import OpenRun
from relexkit.commands.console import (
    console,
    number,
    percent,
    print_json,
    print_pairs,
    print_table,
    progress_bar,
    say,
    show,
)
from relexkit.errors import printable
from relexkit.geometry.linearity import Linearity
from relexkit.geometry.null import STATISTICS
from relexkit.geometry.shape import center, cosines_of_updates, decompose, r_squared, walk_gram
from relexkit.geometry.spectrum import ScopeSpectrum, Spectrum, agreement, spectrum
from relexkit.gram_matrix import Gram, gram
from relexkit.gram_matrix.compute.blas import single_threaded_blas
from relexkit.gram_matrix.jumps import Attempt, attempts, described, jumps
from relexkit.materialize import apply_step, temporary_folder
from relexkit.materialize.alignment import Alignment, Projection
from relexkit.materialize.directions import Directions
from relexkit.predict.asked import less_than_asked, past_the_end
from relexkit.predict.extrapolators import BASELINE, METHODS, check_request, step_text
from relexkit.predict.fits import FitName, Options
from relexkit.predict.prediction import Prediction
from relexkit.processes import Processes, joined
from relexkit.record.jumping import Jumper
from relexkit.record.live_advice import LiveAdvice
from relexkit.record.live_weights import named_weights
from relexkit.registry import Command, Extension, plot
from relexkit.store import NotAStoreError, ProgressCallback, TrajectoryStore, describe_steps
from relexkit.store.durable import replace_folder, write_file
from relexkit.version import __version__
from relexkit.weights.dtypes import random_bits
from relexkit.weights.layout import layer_of, module_of

__all__ = [
    "BASELINE",
    "CHEAP",
    "METHODS",
    "STATISTICS",
    "Advice",
    "Alignment",
    "Attempt",
    "Backtest",
    "Command",
    "Directions",
    "Extension",
    "FitName",
    "FixedJumps",
    "Forecast",
    "Gram",
    "JumpRule",
    "Jumper",
    "Jumps",
    "Linearity",
    "LiveAdvice",
    "NotAStoreError",
    "Observed",
    "OpenRun",
    "Options",
    "Prediction",
    "Processes",
    "ProgressCallback",
    "Projection",
    "ScopeSpectrum",
    "Spectrum",
    "TrajectoryStore",
    "__version__",
    "advise",
    "agreement",
    "apply_step",
    "attempts",
    "backtest",
    "center",
    "check_request",
    "console",
    "cosines_of_updates",
    "decompose",
    "describe_steps",
    "described",
    "forecast",
    "gram",
    "informative_steps",
    "joined",
    "jumps",
    "layer_of",
    "less_than_asked",
    "module_of",
    "named_weights",
    "number",
    "observe",
    "past_the_end",
    "percent",
    "plot",
    "print_json",
    "print_pairs",
    "print_table",
    "printable",
    "progress_bar",
    "r_squared",
    "random_bits",
    "replace_folder",
    "say",
    "show",
    "single_threaded_blas",
    "spectrum",
    "step_text",
    "temporary_folder",
    "walk_gram",
    "write_file",
]
