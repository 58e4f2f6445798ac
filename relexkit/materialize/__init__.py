"""Weights over deltas become checkpoints: folders that any tool loads, or a model in memory changed
in place.

On top of the store, the Gram matrices and the extrapolators. Inside, each module uses those before
it:

- ``sums``: the pass over the deltas; ``folders``: checkpoint folders that are complete or not there
- ``versions``: folders turned into deltas that inference engines pull
- ``card``: their README; ``planning``: weights and provenance of every target
- ``predicted``: ``extrapolate``; ``recorded``: ``checkout``; ``rounded``: ``round_checkpoint``;
  ``in_place``: ``apply``, ``apply_step``
- ``adapters``: the same from and to PEFT adapters; ``directions``: principal directions as files
"""

from relexkit.materialize.folders import temporary_folder
from relexkit.materialize.in_place import apply, apply_step
from relexkit.materialize.output import Output, Written
from relexkit.materialize.predicted import extrapolate
from relexkit.materialize.recorded import checkout
from relexkit.materialize.rounded import round_checkpoint
from relexkit.materialize.versions import WeightSync

__all__ = [
    "Output",
    "WeightSync",
    "Written",
    "apply",
    "apply_step",
    "checkout",
    "extrapolate",
    "round_checkpoint",
    "temporary_folder",
]
