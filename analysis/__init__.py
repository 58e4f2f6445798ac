"""Figures of what relexkit computes. Uses the library's results and never recomputes them; knows
nothing of the trainer.
"""
