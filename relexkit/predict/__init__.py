"""The methods of extrapolation: Gram matrix, steps and target to weights over the deltas."""
