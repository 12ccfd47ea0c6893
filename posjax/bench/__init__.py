"""Benchmarks: ``posjax bench attention``, timed; ``schedule``, for TPUs that are not attached; ``gpu`` and ``tune``, on a GPU."""
