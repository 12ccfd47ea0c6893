"""Weights of other libraries: read, converted to this package's Transformer, and written back."""
