"""Readers of what trainers write, one module a format, and their table."""
