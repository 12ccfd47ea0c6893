"""The Pallas kernels for NVIDIA GPUs."""
