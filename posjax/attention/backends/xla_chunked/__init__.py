"""Attention as a walk over tiles, in plain XLA."""
