"""How the deltas of a step are kept: sparse update log, dense rows, low-rank factors."""
