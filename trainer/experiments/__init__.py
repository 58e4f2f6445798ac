"""Experiments on a recorded run: G2D, DPO, sweeps, probes."""
