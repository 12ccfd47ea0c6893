"""Experiments: configurations, training runs, comparisons of encodings, and their metrics and tables."""
