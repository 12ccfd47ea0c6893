"""Benchmarks: ``posjax bench attention``. Contestants run in processes of their own; the parent times them side by side."""
