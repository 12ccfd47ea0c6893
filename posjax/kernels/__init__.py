"""Attention kernels, one file a backend. They see queries, keys, values, a mask and bias terms, never encodings."""
