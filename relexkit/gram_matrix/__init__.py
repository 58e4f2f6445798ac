"""Gram matrices of a run: one pass over the deltas, after which no question about the run's shape
reads weights again.

On top of the store. Inside, each module uses those before it:

- ``matrices``: ``Gram``, the value that all analysis takes; ``jumps``: steps that were predicted,
  not trained
- ``device``, ``distributed``: where products are computed and who computes them; ``onepass``: the
  pass over a part
- ``factors``: low-rank deltas in closed form; ``parts``: what the passes share
- ``exact``: ``gram``; ``subspace``, ``randomized``: ``randomized_gram`` for long runs; ``pca``:
  ``pca_gram`` takes either
- ``segment``: a stretch of a run as a trajectory of its own
"""

from relexkit.gram_matrix.exact import gram
from relexkit.gram_matrix.lowrank.randomized import randomized_gram
from relexkit.gram_matrix.matrices import Gram
from relexkit.gram_matrix.pca import pca_gram

__all__ = ["Gram", "gram", "pca_gram", "randomized_gram"]
