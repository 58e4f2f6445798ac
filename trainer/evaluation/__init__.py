"""Accuracy on a task, with intervals."""
