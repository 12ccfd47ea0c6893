"""Benchmarks: ``posjax bench attention``, timed, and ``posjax bench schedule``, compiled for TPUs that are not attached."""
