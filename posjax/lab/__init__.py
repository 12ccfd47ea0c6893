"""The laboratory: configurations, whole runs and comparisons, their numbers and tables."""
