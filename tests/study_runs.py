"""Real runs: the Gram matrices that the study left in docs/study/results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kept_gram import load_gram
from strategies import gram_from

from relexkit.gram_matrix import Gram

RESULTS = Path(__file__).parents[1] / "docs" / "study" / "results"


def study_run(arm: str, seed: int, until: int, every: int = 1) -> Gram:
    """The run up to a step, as if only every so many steps had been saved."""
    kept, _ = load_gram(RESULTS / arm / f"seed-{seed}-gram.npz")
    rows = np.flatnonzero((kept.steps <= until) & (kept.steps % every == 0))
    matrices = kept.matrices[:, rows[:, None], rows]
    return gram_from(matrices, kept.steps[rows], int(kept.num_parameters[0]))


def stretch(whole: Gram, start: int, count: int) -> Gram:
    """So many steps after one, relative to the weights there, of a run of which every step is
    there.
    """
    matrix = np.pad(whole.matrices[0], (1, 0))  # the base, step 0
    rows = np.arange(start + 1, start + count + 1)
    part = matrix[np.ix_(rows, rows)] - matrix[rows, start][:, None] - matrix[start, rows]
    return gram_from((part + matrix[start, start])[None], rows - start, whole.num_parameters[0])
