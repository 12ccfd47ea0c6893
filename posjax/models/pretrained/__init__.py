"""Checkpoints of other libraries: their configurations, weights and files."""
