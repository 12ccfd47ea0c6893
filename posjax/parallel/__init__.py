"""Parallelism: device meshes, shardings of states and batches, and runs of several processes."""
