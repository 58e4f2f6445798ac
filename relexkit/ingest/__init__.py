"""Checkpoints into a store: import, watch, estimate, and reading back what was written."""
