"""Randomized Gram matrices, for runs of very many steps."""
