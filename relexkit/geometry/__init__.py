"""The shape of a trajectory from its Gram matrices: spectrum, null, trajectory model, linearity."""
