"""The Pallas kernels for TPUs."""
