"""Core types: positional encodings, the bias terms that attention kernels evaluate, and masks."""
